"""Speed of the number of episodes that TEST.BATCH_EPISODES chooses on a CPU, beside fixed numbers.

Measures scoring from precomputed videos (noise in the shape of the method's features), inductive, one query per class.
The sizes take turns on the same episodes; times are processor times, the shortest of several turns. Scores must not
depend on the size.

python benchmarks/batch_episodes.py
python benchmarks/batch_episodes.py --methods trx --backbone ViT-B/16 --shots 5
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.evaluation import CLASSES, CPU, build, difference_of, shortest_time, synthetic_index
from benchmarks.machine import machine
from episodes.sampler import EpisodeSampler
from run.command import run_command
from run.evaluation import fast_batch, precompute_queries, precompute_supports, score_episodes
from run.features import FeatureBank

VIDEOS_PER_CLASS = 13  # few, since scoring does not depend on it


def measure(method: str, shot: int, options: argparse.Namespace) -> str:
    """Returns a row of the table; the largest difference of a score is relative to the largest score."""
    model, index = build(method, options), synthetic_index(VIDEOS_PER_CLASS * CLASSES)
    with torch.no_grad():
        shape = model.encode(torch.zeros(1, options.frames, 3, options.image_size, options.image_size)).shape[1:]
    videos = range(len(index))
    bank = FeatureBank(torch.randn(len(index), *shape), np.arange(len(index)))
    text = model.class_text(index.prompts)
    banks = precompute_supports(model, bank, index, videos, text), precompute_queries(model, bank, videos, CPU)
    sampler = EpisodeSampler(index, options.way, shot, 1, seed=1)
    specs = [sampler.episode(number) for number in range(options.episodes)]
    chosen = fast_batch(specs[0], *banks, CPU)
    scores: dict[int, torch.Tensor] = {}

    def score(size: int) -> None:
        scores[size] = torch.cat(score_episodes(model, specs, *banks, text, ["inductive"], size)["inductive"])

    sizes = [0, *options.sizes]
    seconds = shortest_time(options.repeats, *(partial(score, size) for size in sizes))
    difference = max(difference_of(scores[size], scores[0], f"{method}, {size} in a call") for size in options.sizes)
    times = " | ".join(f"{1e3 * value / len(specs):.2f}" for value in seconds)
    return f"| {method} | {shot} | {chosen} | {times} | {difference:.1e} |"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["clipspm", "clipfsar", "otam"])
    parser.add_argument("--backbone", default="RN50")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 10, 50], help="episodes in a call")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.way}-way, one query per class, inductive, {options.backbone}, {options.episodes} episodes")
    print(machine(uses_gpu=False))
    print("\nProcessor milliseconds an episode, by the number of episodes in a call.")
    head = " | ".join(["method", "shots", "chosen size", "chosen", *map(str, options.sizes)])
    print(f"\n| {head} | largest difference |\n|{'---|' * (5 + len(options.sizes))}")
    for method in options.methods:
        for shot in options.shots:
            print(measure(method, shot, options), flush=True)


if __name__ == "__main__":
    run_command(main)
