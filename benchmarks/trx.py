"""Measures the head of TRX against a literal loop over tuples and classes, and checks that scores and gradients agree.

    OMP_NUM_THREADS=1 python benchmarks/trx.py

The literal side forms all tuples of each video, [V, 28, 2 D] and [V, 56, 3 D], and matches one class at a time.
Both run in one process, on the same features and weights. Times are processor times, the shortest of several repeats;
memory is the peak of all tensors that a call allocates, without features and weights.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.memory import CountedMemory
from benchmarks.released_fixtures import FakeTowers, build_head
from models.layers import sinusoid_positions
from models.model_trx import Trx
from run.command import run_command
from utils.errors import UserError

WAYS, SHOTS, QUERIES, FRAMES = 5, 5, 25, 8
TOLERANCE = 1e-4
Score = Callable[[Tensor, Tensor], Tensor]


def literal_scores(model: Trx, support: Tensor, query: Tensor) -> Tensor:
    """Returns the scores of one episode: [1, N, K, T, D] and [1, Q, T, D] -> [1, Q, N]."""
    scores = []
    for transformer, size in zip(model.transformers, model.options.TUPLES, strict=True):

        def keys_and_values(videos: Tensor, transformer=transformer, size=size) -> tuple[Tensor, Tensor]:
            placed = videos + sinusoid_positions(*videos.shape[1:], model.options.POSITION_SCALE)
            chosen = [placed[:, list(times)].flatten(1) for times in combinations(range(videos.shape[1]), size)]
            tuples = torch.stack(chosen, dim=1)
            keys = F.linear(tuples, transformer.key.weight, transformer.key.bias)
            return transformer.norm(keys), F.linear(tuples, transformer.value.weight)

        query_keys, query_values = keys_and_values(query[0])
        distances = []
        for videos in support[0]:
            keys, values = (part.flatten(0, 1) for part in keys_and_values(videos))
            weights = (query_keys @ keys.T / math.sqrt(keys.shape[-1])).softmax(dim=-1)
            distances.append((query_values - weights @ values).square().sum(dim=-1).mean(dim=-1))
        scores.append(-torch.stack(distances, dim=-1))
    return torch.stack(scores).mean(dim=0)[None]


def measured(score: Score, support: Tensor, query: Tensor, train: bool, repeats: int) -> tuple[Tensor, float, int]:
    """Returns the scores, or in training the queries' gradient; the shortest time in seconds; peak memory in bytes."""
    query = query.requires_grad_(train)

    def call() -> Tensor:
        with torch.set_grad_enabled(train):
            scores = score(support, query)
            return torch.autograd.grad(scores.logsumexp(-1).sum(), query)[0] if train else scores

    seconds = math.inf
    for _ in range(repeats):
        begun = time.process_time()
        call()
        seconds = min(seconds, time.process_time() - begun)
    with CountedMemory() as memory:
        result = call()
    return result, seconds, memory.peak


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of a frame's feature")
    parser.add_argument("--tuple-width", type=int, default=1152, help="of keys and values")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_head("trx", FakeTowers(options.width), TUPLE_WIDTH=options.tuple_width, DROPOUT=0.0).eval()
    support = torch.randn(1, WAYS, SHOTS, FRAMES, options.width)
    query = torch.randn(1, QUERIES, FRAMES, options.width)
    text = torch.zeros(1, WAYS, 1)
    print(
        f"{WAYS}-way {SHOTS}-shot, {QUERIES} queries, {FRAMES} frames of {options.width}. {machine(uses_gpu=False)}\n"
    )
    print("| | literal s | ours s | ratio | literal MB | ours MB | ratio |\n|---|---|---|---|---|---|---|")

    def row(name: str, ours: Score, train: bool) -> None:
        expected, literal_s, literal_bytes = measured(
            lambda *videos: literal_scores(model, *videos), support, query, train, options.repeats
        )
        ours_result, our_s, our_bytes = measured(ours, support, query, train, options.repeats)
        if (ours_result - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise UserError(f"{name}: the two sides differ by {(ours_result - expected).abs().max().item():.1e}")
        megabytes = [round(size / 2**20) for size in (literal_bytes, our_bytes)]
        print(
            f"| {name} | {literal_s:.2f} | {our_s:.2f} | {literal_s / our_s:.1f} | {megabytes[0]} | {megabytes[1]} | "
            f"{literal_bytes / our_bytes:.1f} |"
        )

    def whole(support: Tensor, query: Tensor) -> Tensor:
        return model.score(support, query, text)

    row("forward and backward", whole, train=True)
    row("scores of one episode", whole, train=False)
    with torch.no_grad():
        keys = model.precompute_support(support, text), model.precompute_query(query)
    row("scores of precomputed videos", lambda *_: model.score_precomputed(*keys, text), train=False)


if __name__ == "__main__":
    run_command(main)
