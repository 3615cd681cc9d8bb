"""OTAM's steps for CUDA, as one kernel for all columns; `models.otam_table` describes the computation.

Each lane processes one matrix, cell by cell as in the equations. The tables [S, T, P] store the same cell of
neighbouring matrices side by side, so neighbouring lanes read and write neighbouring numbers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2 = tl.constexpr(math.log(2))
BLOCK = 64  # matrices per program
WARPS = 2  # one lane per matrix


def fill_table(table: Tensor) -> Tensor:
    """Fills the table like `models.otam_table.fill_table`; contiguous float32 of fewer than 2^31 cells."""
    columns, rows, matrices = table.shape
    total = table.new_empty(matrices)
    with torch.cuda.device_of(table):
        _fill[_programs(matrices)](table, total, matrices, rows, columns, BLOCK, num_warps=WARPS)
    return total


def soft_alignment(table: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Computes the same as `models.otam_table.soft_alignment`, for contiguous float32 tensors."""
    columns, rows, matrices = table.shape
    shares = torch.empty_like(table)
    with torch.cuda.device_of(table):
        _align[_programs(matrices)](table, total, weights, shares, matrices, rows, columns, BLOCK, num_warps=WARPS)
    return shares


def _programs(matrices: int) -> tuple[int]:
    return (triton.cdiv(matrices, BLOCK),)


@triton.jit
def _log_add_exp(a, b):
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _fill(table, totals, matrices, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes u over x, column by column; `left` and `above` are the cells u[l, m-1] and u[l-1, m-1]."""
    matrix = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = matrix < matrices
    cell = table + matrix
    current = tl.load(cell, mask=inside)
    for _ in range(1, ROWS):
        cell += matrices
        current = tl.load(cell, mask=inside) + _log_add_exp(current, LOG2)
        tl.store(cell, current, mask=inside)

    for column in range(1, COLUMNS):
        tl.debug_barrier()  # the previous column is written
        before = table + (column - 1) * ROWS * matrices + matrix
        cell = before + ROWS * matrices
        above = tl.load(before, mask=inside)
        tl.store(cell, tl.load(cell, mask=inside) + above, mask=inside)
        for _ in range(1, ROWS):
            before += matrices
            cell += matrices
            left = tl.load(before, mask=inside)
            tl.store(cell, tl.load(cell, mask=inside) + _log_add_exp(above, left), mask=inside)
            above = left

    tl.debug_barrier()
    cell = table + (COLUMNS * ROWS - 1) * matrices + matrix
    total = tl.load(cell, mask=inside)
    for _ in range(1, ROWS):
        cell -= matrices
        total = _log_add_exp(total, tl.load(cell, mask=inside) + LOG2)
    tl.store(totals + matrix, total, mask=inside)


@triton.jit
def _align(table, totals, weights, shares, matrices, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the shares from the last column to the first, then up the first column, which paths may descend."""
    matrix = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = matrix < matrices
    total = tl.load(totals + matrix, mask=inside)
    weight = tl.load(weights + matrix, mask=inside)
    cell = (COLUMNS * ROWS - 1) * matrices + matrix
    tl.store(shares + cell, weight * tl.exp(tl.load(table + cell, mask=inside) - total), mask=inside)
    for _ in range(1, ROWS):
        cell -= matrices
        tl.store(shares + cell, weight * tl.exp(tl.load(table + cell, mask=inside) + LOG2 - total), mask=inside)

    for back in range(1, COLUMNS):
        tl.debug_barrier()  # the shares of this column are written
        cell = (COLUMNS - back) * ROWS * matrices + matrix
        before = cell - ROWS * matrices
        above = tl.load(table + before, mask=inside)
        kept = tl.load(shares + cell, mask=inside)
        for _ in range(1, ROWS):
            cell += matrices
            left = tl.load(table + before + matrices, mask=inside)
            arriving = tl.load(shares + cell, mask=inside)
            from_above = arriving * _sigmoid(above - left)
            tl.store(shares + before, kept + from_above, mask=inside)
            kept = arriving - from_above
            above = left
            before += matrices
        tl.store(shares + before, kept, mask=inside)

    tl.debug_barrier()
    cell = (ROWS - 1) * matrices + matrix
    share = tl.load(shares + cell, mask=inside)
    for _ in range(1, ROWS):
        cell -= matrices
        share = tl.load(shares + cell, mask=inside) + share * _sigmoid(tl.load(table + cell, mask=inside) - LOG2)
        tl.store(shares + cell, share, mask=inside)
