"""Time that A2M2 saves by comparing only candidates of one scale, and by exponents that are not denormal.

    python benchmarks/a2m2_scales.py

The other side computes the cost of all pairs of candidates, excludes pairs of different scales with an infinite cost,
and does not limit the exponents. Both score the same random candidates with the same weights. The two sides take turns,
and the shortest of several repeats counts. A training step here means scores, loss and backward pass, starting from the
candidates.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models
from benchmarks.machine import machine
from models.base import cross_entropy
from models.model_a2m2 import BOUNDS, A2m2
from run.command import run_command
from utils.config import load_config

CONFIGS = ("demo", "hmdb51")
WAYS, SHOTS, FRAMES, IMAGE_SIZE = 5, 1, 8, 64  # gives 4 x 4 positions in the tiny tower's maps
AGREEMENT = 1e-5  # relative to the largest score


def all_pairs(model: A2m2, support: Tensor, query: Tensor) -> Tensor:
    """Computes the scores with optimal transport in one matrix over all scales; see `A2m2.match`."""
    assert model.A2
    options, prototypes = model.options, support.mean(dim=2)
    first, second = (F.normalize(videos[..., 1 + BOUNDS :], dim=-1) for videos in (query, prototypes))
    cost = 1 - torch.einsum("bqcm,bnsm->bqncs", first, second)
    scales, places = query[0, 0, :, 0], query[0, 0, :, 1 : 1 + BOUNDS]
    same = scales[:, None] == scales
    apart = (places[:, None] - places).square().sum(dim=-1)
    log_rows = log_weights(model, query, prototypes, same)
    log_columns = log_weights(model, prototypes, query, same).transpose(1, 2)
    kernel = -(cost + options.PLACE_COST * apart).masked_fill(~same, torch.inf) / options.SINKHORN_EPSILON
    row, column = torch.zeros_like(kernel[..., :1]), torch.zeros_like(kernel[..., :1, :])
    for _ in range(options.SINKHORN_ITERATIONS):
        row = log_rows.unsqueeze(-1) - torch.logsumexp(kernel + column, dim=-1, keepdim=True)
        column = log_columns.unsqueeze(-2) - torch.logsumexp(kernel + row, dim=-2, keepdim=True)
    distances = (torch.exp(kernel + row + column) * cost).sum(dim=(-2, -1))
    return -options.SCORE_SCALE * distances / len(scales.unique())


def log_weights(model: A2m2, candidates: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """Computes the weights of A2 with masks instead of scales: [B, X, C, ...], [B, Y, C, ...] -> [B, X, Y, C]."""
    assert model.A2
    share = same / same.sum(dim=-1, keepdim=True)
    guide = model.A2.other(share @ others[..., 1:]).unsqueeze(1)
    weights = model.A2.weigh(F.relu(model.A2.own(candidates[..., 1:]).unsqueeze(2) + guide)).squeeze(-1)
    return weights - weights.unsqueeze(-2).masked_fill(~same, -torch.inf).logsumexp(dim=-1)


def seconds(score: Callable[[Tensor, Tensor], Tensor], support: Tensor, query: Tensor, backward: bool) -> float:
    """Returns the time of one call."""
    support, query = (videos.clone().requires_grad_(backward) for videos in (support, query))
    labels = (torch.arange(query.shape[1]) % WAYS)[None]
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        scores = score(support, query)
        if backward:
            cross_entropy(scores, labels).backward()
    return time.process_time() - start


def compare(name: str, repeats: int) -> str:
    """Returns the line of one A2M2 config, measured on the tiny tower."""
    options = load_config(ROOT / "configs" / "a2m2" / f"{name}.yaml").config.MODEL
    options = options.model_copy(update={"BACKBONE": "tiny", "CLIP_WEIGHTS": "random"})
    torch.manual_seed(0)
    model = models.build(options, IMAGE_SIZE).eval()
    assert isinstance(model, A2m2)
    with torch.no_grad():
        videos = model.encode(torch.rand(3 * WAYS, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE))
    videos[..., 1 + BOUNDS :] = torch.randn_like(videos[..., 1 + BOUNDS :])
    support, query, no_text = videos[None, : WAYS * SHOTS].unflatten(1, (WAYS, SHOTS)), videos[None, WAYS:], videos[:0]
    sides = {"all": lambda s, q: all_pairs(model, s, q), "scales": lambda s, q: model.match(s, q, no_text)}
    with torch.no_grad():
        literal, ours = (side(support, query) for side in sides.values())
    difference = ((ours - literal).abs().max() / literal.abs().max()).item()
    if difference > AGREEMENT:
        raise AssertionError(f"the sides differ by {difference:.1e}")
    texts = []
    for what, backward in (("scores", False), ("training step", True)):
        times = {side: float("inf") for side in sides}
        for _ in range(repeats):
            for side, score in sides.items():
                times[side] = min(times[side], seconds(score, support, query, backward))
        ratio = times["all"] / times["scales"]
        texts.append(f"{what} {1e3 * times['all']:.0f} -> {1e3 * times['scales']:.0f} ms ({ratio:.1f} times)")
    return f"{name}: {videos.shape[1]} candidates, {'; '.join(texts)}; scores differ by {difference:.1e}"


def main() -> None:
    """Prints a line for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{machine()}; {WAYS}-way {SHOTS}-shot, {2 * WAYS} queries, best of {repeats}")
    for name in CONFIGS:
        print(compare(name, repeats), flush=True)


if __name__ == "__main__":
    run_command(main)
