"""Cost of the inductive protocol in a training step and in scoring, compared with the transductive one.

training: forward and backward of a method's head on features; scoring: one episode from its features; step: training
and the backbone, extrapolated from one clip. Both protocols take turns on the same features; times are processor times,
the shortest of several turns. Methods in which queries do not affect each other cost the same under both.

python benchmarks/protocols.py
python benchmarks/protocols.py --methods clipspm clipmei --backbone ViT-B/16
"""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import models
from benchmarks.machine import machine
from models.base import Episode, EpisodeLabels, FewShotModel, ProtocolName
from run.command import run_command

FRAMES, CLASSES = 8, 31  # frames of a clip, classes of a training split


def build(method: str, options: argparse.Namespace) -> FewShotModel:
    """Returns a method with random weights."""
    torch.manual_seed(0)
    return models.build(method, options.image_size, BACKBONE=options.backbone, CLIP_WEIGHTS="random")


def measure(model: FewShotModel, shot: int, options: argparse.Namespace) -> dict[tuple[str, ProtocolName], float]:
    """Returns the seconds of a training step and of scoring an episode under each protocol."""
    way, queries, width = options.way, options.way * options.query, model.clip.width
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, way * shot + queries, FRAMES, width, generator=generator, requires_grad=True)
    texts = torch.randn(CLASSES, width, generator=generator)
    classes = torch.randperm(CLASSES, generator=generator)[None, :way]
    support, query = features[:, : way * shot].unflatten(1, (way, shot)), features[:, way * shot :]
    episode = Episode(support, query, texts[classes])
    labels = EpisodeLabels(torch.arange(way).repeat_interleave(options.query)[None], classes, texts)
    seconds: dict[tuple[str, ProtocolName], float] = {}
    for _ in range(options.repeats):
        for protocol in get_args(ProtocolName):
            start = time.process_time()
            model.train().training_losses(episode, labels, protocol).total.backward(retain_graph=True)
            middle = time.process_time()
            with torch.no_grad():
                model.eval().score(*episode, protocol)
            for part, passed in (("training", middle - start), ("scoring", time.process_time() - middle)):
                seconds[part, protocol] = min(seconds.get((part, protocol), passed), passed)
    return seconds


def seconds_of_backbone(model: FewShotModel, options: argparse.Namespace) -> float:
    """Returns the seconds of forward and backward of one clip."""
    clip = torch.randn(1, FRAMES, 3, options.image_size, options.image_size)
    times = []
    for _ in range(2):  # the first one also allocates memory
        start = time.process_time()
        model.train().encode(clip).sum().backward()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["clipspm"])
    parser.add_argument("--backbone", default="RN50")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--query", type=int, default=4, help="queries per class")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.way}-way, {options.query} queries per class, {options.backbone}, float32")
    print(machine(uses_gpu=False))
    print("\n| method | shots | | transductive, ms | inductive, ms | ratio |\n|---|---|---|---|---|---|")
    for method in options.methods:
        model = build(method, options)
        of_clip = seconds_of_backbone(model, options)
        for shot in options.shots:
            seconds = measure(model, shot, options)
            for protocol in get_args(ProtocolName):
                clips = options.way * (shot + options.query)
                seconds["step", protocol] = seconds["training", protocol] + clips * of_clip
            for part in ("training", "scoring", "step"):
                together, alone = (seconds[part, protocol] for protocol in ("transductive", "inductive"))
                numbers = f"{1e3 * together:.0f} | {1e3 * alone:.0f} | {alone / together:.2f}"
                print(f"| {method} | {shot} | {part} | {numbers} |", flush=True)


if __name__ == "__main__":
    run_command(main)
