"""Cost of the inductive protocol in a training step and in scoring, compared with the transductive one.

training: forward and backward of a method's head on features; scoring: one episode from its features; step: training
and the backbone, extrapolated from one clip. Both protocols take turns on the same features; times are processor times,
the shortest of several turns. Methods in which queries do not affect each other cost the same under both. The
training step of CLIP-SPM is also measured as its released code computes it: transductive, one pass after the other
(benchmarks/literal_evaluation.py). Without dropout, its loss has to agree with ours.

python benchmarks/protocols.py
python benchmarks/protocols.py --methods clipspm clipmei --backbone ViT-B/16
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import models
from benchmarks.literal_evaluation import clipspm_loss
from benchmarks.machine import machine
from models.base import Episode, EpisodeLabels, FewShotModel, ProtocolName
from run.command import run_command

FRAMES, CLASSES = 8, 31  # frames of a clip, classes of a training split
LITERAL = "literal"  # beside the names of the protocols
LOSSES_AGREE = 1e-5  # relative
Seconds = dict[tuple[str, str], float]  # ("training", "scoring" or "step", protocol or LITERAL) -> seconds


def build(method: str, options: argparse.Namespace) -> FewShotModel:
    """Returns a method with random weights."""
    torch.manual_seed(0)
    return models.build(method, options.image_size, BACKBONE=options.backbone, CLIP_WEIGHTS="random")


def random_episode(model: Any, shot: int, options: argparse.Namespace) -> tuple[Episode, EpisodeLabels]:
    """Returns random features of one episode, which have gradients, and its labels."""
    way, queries, width = options.way, options.way * options.query, model.clip.width
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, way * shot + queries, FRAMES, width, generator=generator, requires_grad=True)
    texts = torch.randn(CLASSES, width, generator=generator)
    classes = torch.randperm(CLASSES, generator=generator)[None, :way]
    support, query = features[:, : way * shot].unflatten(1, (way, shot)), features[:, way * shot :]
    query_labels = torch.arange(way).repeat_interleave(options.query)[None]
    return Episode(support, query, texts[classes]), EpisodeLabels(query_labels, classes, texts)


def literal_loss(model: FewShotModel, episode: Episode, labels: EpisodeLabels) -> Tensor:
    """Computes the loss of CLIP-SPM as its released code does."""
    ways, shots = episode.support.shape[1:3]
    support_labels = torch.arange(ways).repeat_interleave(shots)
    return clipspm_loss(
        model,
        episode.support[0].flatten(0, 1),
        support_labels,
        episode.query[0],
        labels.query[0],
        episode.class_text[0],
    )


def measure(model: FewShotModel, is_clipspm: bool, shot: int, options: argparse.Namespace) -> Seconds:
    """Returns the seconds of a training step and of scoring an episode."""
    episode, labels = random_episode(model, shot, options)
    losses: dict[str, Callable[[], Tensor]] = {
        protocol: lambda protocol=protocol: model.training_losses(episode, labels, protocol).total
        for protocol in get_args(ProtocolName)
    }
    if is_clipspm:
        losses[LITERAL] = partial(literal_loss, model, episode, labels)
        model.eval()
        ours, literal = losses["transductive"]().item(), losses[LITERAL]().item()
        assert abs(ours - literal) <= LOSSES_AGREE * literal, f"losses differ: {ours} and {literal}"
    seconds: Seconds = {}
    for _ in range(options.repeats):
        model.train()
        for name, loss in losses.items():
            start = time.process_time()
            loss().backward(retain_graph=True)
            keep_shortest(seconds, ("training", name), start)
        model.eval()
        for protocol in get_args(ProtocolName):
            start = time.process_time()
            with torch.no_grad():
                model.score(*episode, protocol)
            keep_shortest(seconds, ("scoring", protocol), start)
    return seconds


def keep_shortest(seconds: Seconds, key: tuple[str, str], start: float) -> None:
    """Records the processor time since `start` if it is the shortest."""
    passed = time.process_time() - start
    seconds[key] = min(seconds.get(key, passed), passed)


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
    head = "method | shots | | literal, ms | transductive, ms | inductive, ms | to transductive | to literal"
    print(f"\n| {head} |\n|{'---|' * 8}")
    for method in options.methods:
        model = build(method, options)
        clip_seconds = seconds_of_backbone(model, options)
        for shot in options.shots:
            seconds = measure(model, method == "clipspm", shot, options)
            clips = options.way * (shot + options.query)
            for part, name in list(seconds):
                if part == "training":
                    seconds["step", name] = seconds[part, name] + clips * clip_seconds
            for part in ("training", "scoring", "step"):
                print(f"| {method} | {shot} | {part} | {' | '.join(cells(part, seconds))} |", flush=True)


def cells(part: str, seconds: Seconds) -> list[str]:
    """Returns the times in milliseconds and the ratios of the inductive protocol to the others, "-" without a time."""
    literal, together, alone = (seconds.get((part, name)) for name in (LITERAL, "transductive", "inductive"))
    assert alone is not None
    times = ["-" if value is None else f"{1e3 * value:.0f}" for value in (literal, together, alone)]
    return times + ["-" if value is None else f"{alone / value:.2f}" for value in (together, literal)]


if __name__ == "__main__":
    run_command(main)
