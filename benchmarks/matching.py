"""Measures the matchers against literal loops in one run, and checks that values and gradients agree.

    OMP_NUM_THREADS=1 python benchmarks/matching.py

The literal side of OTAM fills the table cell by cell, for all queries and classes at once and for one direction at a
time; the other literal sides loop over queries and classes. Times are of forward and backward together, the shortest of
many. Operations are tensor operations other than views; on a GPU, each launches a kernel.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import machine
from models.matching import otam, sequence_distances
from run.command import run_command
from utils.errors import UserError

QUERIES, WAYS, FRAMES, WIDTH = 20, 5, 8, 1024
TOLERANCE = 1e-4
Matching = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Two ways to compute the same result, and their inputs."""

    name: str
    inputs: tuple[Tensor, ...]
    literal: Matching
    ours: Matching


# --- The literal sides ------------------------------------------------------------------------------------


def literal_otam_one_way(distances: Tensor, smoothing: float) -> Tensor:
    """Fills OTAM's table, one cell of all matrices after the other: float [..., T, S] -> [...]."""
    padded = F.pad(distances, (1, 1))
    rows, columns = padded.shape[-2:]
    cost = torch.zeros_like(padded)
    for m in range(1, columns):
        cost[..., 0, m] = padded[..., 0, m] + cost[..., 0, m - 1]
    for row in range(1, rows):
        for m in range(1, columns):
            moves = [cost[..., row - 1, m - 1], cost[..., row, m - 1]]
            if m in (1, columns - 1):
                moves.append(cost[..., row - 1, m])
            weights = [torch.exp(-move / smoothing) for move in moves]
            cost[..., row, m] = padded[..., row, m] - smoothing * torch.log(sum(weights[1:], start=weights[0]))
    return cost[..., -1, -1]


def literal_otam(distances: Tensor, smoothing: float) -> Tensor:
    """Adds the costs of both directions: float [..., T, S] -> [...]."""
    return literal_otam_one_way(distances, smoothing) + literal_otam_one_way(distances.mT, smoothing)


def literal_pairs(pair: Matching) -> Matching:
    """Maps queries [1, Q, T, D] and prototypes [1, N, S, D] -> [1, Q, N], one pair of videos after the other."""

    def all_pairs(query: Tensor, prototypes: Tensor) -> Tensor:
        rows = [torch.stack([pair(video, prototype) for prototype in prototypes[0]]) for video in query[0]]
        return torch.stack(rows)[None]

    return all_pairs


def literal_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Computes 1 - cosine similarity: float [T, D] and [S, D] -> [T, S]."""
    return 1 - first @ second.T / (first.norm(dim=1)[:, None] * second.norm(dim=1) + 0.01)


def literal_bi_mhm(video: Tensor, prototype: Tensor) -> Tensor:
    """Adds the distances of nearest frames in both directions: float [T, D] and [S, D] -> scalar."""
    distances = literal_cosine(video, prototype)
    return distances.min(dim=1).values.sum() + distances.min(dim=0).values.sum()


def literal_mean(video: Tensor, prototype: Tensor) -> Tensor:
    """Returns the distance of the averages: float [T, D] and [S, D] -> scalar."""
    return literal_cosine(video.mean(dim=0, keepdim=True), prototype.mean(dim=0, keepdim=True))[0, 0]


# --- Measurements -----------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the tensor operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def forward_and_backward(matching: Matching, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the values, and the gradient of their sum for each input."""
    leaves = tuple(each.detach().requires_grad_() for each in inputs)
    values = matching(*leaves)
    return values.detach(), *torch.autograd.grad(values.sum(), leaves)


def milliseconds(matching: Matching, inputs: tuple[Tensor, ...]) -> float:
    """Returns the time of one forward and backward until the device has finished; with one CPU thread its CPU time."""
    clock = time.perf_counter if inputs[0].is_cuda or torch.get_num_threads() > 1 else time.process_time
    start = clock()
    forward_and_backward(matching, inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def operations(matching: Matching, inputs: tuple[Tensor, ...]) -> int:
    """Returns the number of operations in one forward and backward."""
    with Operations() as mode:
        forward_and_backward(matching, inputs)
    return mode.count


def kept_bytes(matching: Matching, inputs: tuple[Tensor, ...]) -> int:
    """Returns the bytes that a forward stores for the gradient, besides the inputs."""
    leaves = tuple(each.detach().requires_grad_() for each in inputs)
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = matching(*leaves)
    del values
    return sum(size for pointer, size in sizes.items() if pointer not in [leaf.data_ptr() for leaf in leaves])


def compare(case: Case, repeats: int) -> str:
    """Returns one line of the table.

    Raises:
        UserError: the results of the two sides differ.
    """
    literal, ours = (forward_and_backward(matching, case.inputs) for matching in (case.literal, case.ours))
    differences = [(left - right).abs().max().item() for left, right in zip(literal, ours, strict=True)]
    values, gradients = differences[0], max(differences[1:])
    if not max(values, gradients) < TOLERANCE:
        raise UserError(f"{case.name}: the two sides differ by {values:.1e} and their gradients by {gradients:.1e}")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, matching in zip(times, (case.literal, case.ours), strict=True):
            side.append(milliseconds(matching, case.inputs))
    slow, fast = (min(side) for side in times)
    counts = [operations(matching, case.inputs) for matching in (case.literal, case.ours)]
    return (
        f"{case.name:42s} {counts[0]:7d} {counts[1]:5d} {slow:10.2f} {fast:9.2f} {slow / fast:7.1f}"
        f" {values:9.0e} {gradients:9.0e}"
    )


def memory(distances: Tensor) -> str:
    """Returns two lines: the memory that many matrices store for the gradient, and the further peak memory of our side.

    A few matrices are computed first, since on a GPU the first ones of a size wait for Triton to compile.
    """
    few = distances[: 16 + len(distances) % 16]  # Triton compiles multiples of 16 separately
    forward_and_backward(lambda d: otam(d, 0.1), (few,))
    before = peak_bytes(distances)
    took = milliseconds(lambda d: otam(d, 0.1), (distances,))
    grown = peak_bytes(distances) - before
    size = distances.nbytes
    stored = [kept_bytes(lambda d, side=side: side(d, 0.1), (distances,)) / size for side in (literal_otam, otam)]
    return (
        f"{len(distances)} matrices of {FRAMES} x {FRAMES}, {size / 2**20:.0f} MiB: {took:.0f} ms, ours\n"
        f"  in units of the matrices: kept for the gradient literal {stored[0]:.1f}, ours {stored[1]:.2f};"
        f" taken by ours at most, gradient included, {grown / size:.1f}"
    )


def peak_bytes(tensor: Tensor) -> int:
    """Returns the peak memory so far on the tensor's device."""
    if tensor.is_cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cases(device: str) -> list[Case]:
    """Returns the cases to compare; distances are in [0, 1], for which the literal OTAM does not overflow."""
    generator = torch.Generator().manual_seed(0)

    def distances(queries: int) -> Tensor:
        return torch.rand(queries, WAYS, FRAMES, FRAMES, generator=generator).to(device)

    def videos(number: int) -> Tensor:
        return torch.randn(1, number, FRAMES, WIDTH, generator=generator).to(device)

    def matcher_case(matcher: Any, pair: Matching) -> Case:
        name = f"{matcher}, features of {QUERIES} x {WAYS} videos"
        inputs = (videos(QUERIES), videos(WAYS))
        return Case(name, inputs, literal_pairs(pair), lambda query, other: sequence_distances(query, other, matcher))

    def three_literal(*parts: Tensor) -> Tensor:
        return torch.cat([literal_otam(part, 0.5) for part in parts])

    def three_ours(*parts: Tensor) -> Tensor:
        return otam(torch.cat(parts), 0.5)

    both = [
        Case(
            f"otam, lambda {smoothing}, [{QUERIES}, {WAYS}, {FRAMES}, {FRAMES}]",
            (distances(QUERIES),),
            lambda d, smoothing=smoothing: literal_otam(d, smoothing),
            lambda d, smoothing=smoothing: otam(d, smoothing),
        )
        for smoothing in (0.1, 0.5)
    ]
    three = (distances(QUERIES), distances(QUERIES), distances(1))
    return [
        *both,
        Case("otam, the three distances of CLIP-SPM", three, three_literal, three_ours),
        matcher_case("bi-mhm", literal_bi_mhm),
        matcher_case("mean", literal_mean),
    ]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50, help="of each side")
    parser.add_argument("--matrices", type=int, default=100_000, help="of the measurement of memory")
    options = parser.parse_args()
    print(machine(uses_gpu=options.device == "cuda"))
    print(memory(torch.rand(options.matrices, FRAMES, FRAMES, device=options.device)))
    titles = ("operations literal", "ours", "ms literal", "ms ours", "ratio", "values", "gradients")
    print("".join(title.rjust(width) for title, width in zip(titles, (50, 6, 11, 10, 8, 10, 10), strict=True)))
    for case in cases(options.device):
        print(compare(case, options.repeats))


if __name__ == "__main__":
    run_command(main)
