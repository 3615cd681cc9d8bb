"""Compares a method with the released head on given numbers, and prints one JSON line.

    python benchmarks/parity.py --fixtures DIR --method clipspm

DIR contains the released numbers (released_fixtures.py describes the two layouts); released_heads.py has an entry for
each method. Every episode is scored, and gives its losses, alone and in one call with a copy whose classes and
queries are permuted. The line gives the largest difference of a score, relative to the largest score of its episode,
and the largest relative difference of each loss term; NaN on one side counts as an infinite difference.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.released_fixtures import Fixtures, encoded
from benchmarks.released_heads import HEADS
from models.base import FewShotModel
from run.command import run_command


def largest(differences: Iterable[float]) -> float:
    """Returns the largest value, or infinity if one is NaN, which `max` may ignore."""
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def relative_difference(ours: Tensor | float, released: Tensor | float) -> float:
    """Returns the largest |ours - released| / largest |released|."""
    ours, released = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(released, dtype=torch.float64)
    return ((ours - released).abs().max() / released.abs().max().clamp(min=1e-12)).item()


def score_difference(fixtures: Fixtures, model: FewShotModel) -> float:
    """Returns the largest relative difference over all episodes and modes, single and batched."""
    return largest(
        relative_difference(model.score(*encoded(model, episode), "transductive"), released)
        for name in fixtures.episodes
        for mode in ("eval", "train")
        for episode, _, released in (fixtures.batch(name, mode, batched) for batched in (False, True))
    )


def loss_differences(fixtures: Fixtures) -> dict[str, float]:
    """Returns the largest relative difference of each loss term over all episodes, in training with dropout off."""
    differences: dict[str, list[float]] = {}
    for name in fixtures.episodes:
        for batched in (False, True):
            for term, (ours, released) in fixtures.head.terms(fixtures, name, batched).items():
                differences.setdefault(term, []).append(relative_difference(ours, released))
    return {term: largest(values) for term, values in differences.items()}


@torch.no_grad()
def main() -> None:
    """Parses the command line and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, required=True, help="folder with meta*.json and <method>.npz")
    parser.add_argument("--method", choices=sorted(HEADS), required=True)
    options = parser.parse_args()
    fixtures = Fixtures(options.fixtures, HEADS[options.method])
    result = {
        "method": options.method,
        "episodes": fixtures.episodes,
        "score_relative_difference": score_difference(fixtures, fixtures.build()),
        "loss_relative_differences": loss_differences(fixtures),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
