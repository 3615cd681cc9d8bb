"""OTAM's recursion for any number of matrices at once, and its gradient; `models.matching.otam` has the equations.

The recursion uses u = -c / smoothing instead of the cost c: exp(u) is the sum of exp(-cost / smoothing) over all
alignments that end in a cell. Everything is computed in logarithms, so nothing underflows or overflows.

u is stored in a table [S, T, P], P matrices side by side, and a step computes one column of all matrices. The steps are
implemented twice: here for any device, and in `models.otam_kernel` as one kernel for GPUs.

Shapes: M matrices, T rows, S columns, P = M or 2 M matrices to align, one for each direction.
"""

import functools
import itertools
import logging
import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LOG2 = math.log(2)
LARGEST_KERNEL_TABLE = 2**31  # cells; the kernels count them with 32 bits


class OtamCosts(torch.autograd.Function):
    """`OtamCosts.apply(distances, smoothing, both_directions)`: [..., T, S] -> [...], T = S for both directions.

    Stores only the table: as much memory as the distances, or twice as much for both directions.
    """

    @staticmethod
    def forward(ctx: Any, distances: Tensor, smoothing: float, both_directions: bool) -> Tensor:
        """Fills the table; distances float32 or float64, smoothing > 0."""
        (*ctx.leading, rows, columns), matrices = distances.shape, distances.shape[:-2].numel()
        scaled = (distances.movedim((-2, -1), (0, 1)) * (-1 / smoothing)).reshape(rows, columns, matrices)
        by_column = scaled.transpose(0, 1)
        table = torch.cat([by_column, scaled], dim=-1) if both_directions else by_column.contiguous()
        total = _steps_for(table).fill_table(table)
        ctx.save_for_backward(table, total)
        ctx.both_directions = both_directions
        return -smoothing * total.view(1 + both_directions, *ctx.leading).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Computes d cost / d distance as d total / d u: the smoothing cancels, and the share of the paths remains."""
        if torch.is_grad_enabled():  # create_graph=True: the result would be treated as a constant
            raise RuntimeError("OTAM has no second derivative; compute its gradient without create_graph=True.")
        table, total = ctx.saved_tensors
        weights = gradient.flatten().repeat(1 + ctx.both_directions)
        shares = _steps_for(table).soft_alignment(table, total, weights)
        matrices = gradient.numel()
        by_row = shares[..., :matrices].transpose(0, 1)
        if ctx.both_directions:
            by_row += shares[..., matrices:]
        return by_row.view(*by_row.shape[:2], *ctx.leading).movedim((0, 1), (-2, -1)), None, None


def fill_table(table: Tensor) -> Tensor:
    """Replaces x = -distance / smoothing with u, in place.

        u[0, m] = x[0, m] + u[0, m-1]
        u[l, 1] = x[l, 1] + log(2 + exp u[l-1, 1])
        u[l, m] = x[l, m] + log(exp u[l-1, m-1] + exp u[l, m-1])

    Args:
        table: x, float [S, T, P].

    Returns:
        -cost / smoothing, float [P]: the log of the sum of 2 exp u[l, S] over l < T-1, plus exp u[T-1, S].
    """
    columns = table.unbind(0)
    enter = table.new_tensor(LOG2)
    for above, cell in itertools.pairwise(columns[0].unbind(0)):
        cell += torch.logaddexp(above, enter)
    table[:, 0] = table[:, 0].cumsum(dim=0)
    for before, column in itertools.pairwise(columns):
        column[1:] += torch.logaddexp(before[:-1], before[1:])
    return _leaving(columns[-1]).logsumexp(dim=0)


def soft_alignment(table: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Computes d total / d u of each cell, the share of the alignments through it, from the last column to the first.

    Of the share that arrives in a cell, exp u[l-1, m-1] / (exp u[l-1, m-1] + exp u[l, m-1]) came from the row above.

    Args:
        table, total: from `fill_table`, float [S, T, P] and [P].
        weights: the gradient of each total, float [P].

    Returns:
        float [S, T, P].
    """
    shares = torch.empty_like(table)
    torch.mul((_leaving(table[-1]) - total).exp_(), weights, out=shares[-1])
    for m in range(len(table) - 1, 0, -1):
        before = table[m - 1]
        from_above = (before[:-1] - before[1:]).sigmoid_().mul_(shares[m, 1:])
        shares[m - 1] = shares[m]
        shares[m - 1, 1:] -= from_above
        shares[m - 1, :-1] += from_above
    down = (table[0] - LOG2).sigmoid_()  # part of the share one row below in the first column; the rest entered there
    for row in range(table.shape[1] - 2, -1, -1):
        shares[0, row].addcmul_(shares[0, row + 1], down[row])
    return shares


def _leaving(column: Tensor) -> Tensor:
    """Computes the log of each row's part of the total from u[:, S], [T, P]: two moves leave a row, one the last."""
    leaving = column.clone()
    leaving[:-1] += LOG2
    return leaving


def _steps_for(table: Tensor) -> ModuleType:
    """Returns the module that computes the steps: the kernels if they support the table, otherwise this module."""
    fits = table.is_cuda and table.dtype == torch.float32 and 0 < table.numel() < LARGEST_KERNEL_TABLE
    return (_kernels() if fits else None) or sys.modules[__name__]


@functools.cache
def _kernels() -> ModuleType | None:
    """Returns the kernels after a trial on one number, or None, with a warning, if they cannot be compiled.

    Triton needs a C compiler and a recent GPU, and raises many types of errors without them. The steps of this module
    return the same results.
    """
    try:
        from models import otam_kernel

        one = torch.zeros(1, 1, 1, device="cuda")
        otam_kernel.soft_alignment(one, otam_kernel.fill_table(one), one[0, 0])
    except Exception as error:
        logger.warning("OTAM runs without its GPU kernel, which needs Triton and a C compiler (%s).", error)
        return None
    return otam_kernel
