"""Second-order moments of cells of a video, their matrix square roots, and optimal transport: pure functions.

Shapes: V videos, T frames, h x w positions of a frame, P positions of a cell, C cells, d features, M = d (d + 1) / 2.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_EXPONENT = -80.0  # exp(-80) is a normal float32, even divided by several hundred

Cell = tuple[slice, slice, slice]  # frames, rows and columns of a feature map


def windows(length: int, parts: int) -> list[slice]:
    """Cuts an axis into equal windows that cover it.

    If `parts` does not divide `length`, neighbours share the position on their border, as in adaptive pooling. An axis
    of fewer than `parts` positions has one window per position.
    """
    parts = min(parts, length)
    return [slice(part * length // parts, -(-(part + 1) * length // parts)) for part in range(parts)]


def cells(
    shape: Sequence[int], temporal_scales: Sequence[int], spatial_scales: Sequence[int]
) -> list[tuple[int, Cell]]:
    """Returns all time windows at all temporal scales, each with all regions of the map at all spatial scales.

    Args:
        shape: T, h, w.
        temporal_scales: number of windows of the frames at each scale.
        spatial_scales: number of regions of the rows, and of the columns, at each scale.

    Returns:
        C cells, scale by scale, each with the number of its scale (a pair of a temporal and a spatial scale); scales
        finer than the map allows are merged into one.
    """
    frames, height, width = shape
    temporal = sorted({min(scale, frames) for scale in temporal_scales})
    spatial = sorted({min(scale, max(height, width)) for scale in spatial_scales})
    return [
        (number, (time, rows, columns))
        for number, (time_scale, region_scale) in enumerate(itertools.product(temporal, spatial))
        for time in windows(frames, time_scale)
        for rows in windows(height, region_scale)
        for columns in windows(width, region_scale)
    ]


def bounds(cell: Cell, shape: Sequence[int]) -> list[float]:
    """Returns both borders of a cell along time, rows and columns: six fractions of T, h and w in [0, 1]."""
    return [end / length for window, length in zip(cell, shape, strict=True) for end in (window.start, window.stop)]


def second_moment(features: Tensor, centred: bool) -> Tensor:
    """Averages x x^T over the positions of a cell; centred: (x - mean)(x - mean)^T, the covariance.

    Args:
        features: float [V, P, d].
        centred: subtract the cell's mean.

    Returns:
        float32 [V, d, d], symmetric positive semidefinite.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        if centred:
            features = features - features.mean(dim=1, keepdim=True)
        return features.mT @ features / features.shape[1]


def normalised_square_root(matrices: Tensor, iterations: int) -> Tensor:
    """Computes the square root of A / trace(A) by coupled Newton-Schulz iterations (iSQRT-COV, CVPR 2018).

        Y = A / trace(A), Z = I;   each iteration: S = (3 I - Z Y) / 2,  Y = Y S,  Z = S Z;   result Y

    iSQRT-COV then multiplies by sqrt(trace(A)), a factor that cosine similarity ignores.

    Args:
        matrices: float [..., d, d], symmetric positive semidefinite, with a positive trace.
        iterations: 3 in iSQRT-COV, where small eigenvalues have not converged; with 15 most have.

    Returns:
        float32 [..., d, d], of Frobenius norm 1 once it has converged.
    """
    with torch.autocast(matrices.device.type, enabled=False):
        matrices = matrices.float()
        identity = torch.eye(matrices.shape[-1], device=matrices.device)
        trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        root, inverse_root = matrices / trace[..., None, None], identity
        for _ in range(iterations):
            step = (3 * identity - inverse_root @ root) / 2
            root, inverse_root = root @ step, step @ inverse_root
        return root


def upper_triangle(matrices: Tensor) -> Tensor:
    """Returns the diagonal and the entries above it, row by row: [..., d, d] -> [..., M]."""
    size = matrices.shape[-1]
    row, column = torch.triu_indices(size, size, device=matrices.device)
    return matrices[..., row, column]


def sinkhorn(cost: Tensor, log_rows: Tensor, log_columns: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Computes the transport plan of minimal cost minus epsilon times the plan's entropy.

    Everything except the result is computed in logarithms. Terms too small to change a float32 sum are raised to the
    smallest exponential that is a normal number, since subnormal numbers slow a processor down many times.

    Args:
        cost: float [..., R, S].
        log_rows: logarithms of the masses to move, float [..., R]; their sum is that of the masses to arrive.
        log_columns: logarithms of the masses to arrive, float [..., S].
        epsilon: > 0; for large values the plan is the product of the masses, for small ones nearly a matching.
        iterations: number of times that the rows and then the columns are scaled.

    Returns:
        float32 [..., R, S]; once converged, its sums over rows are the masses to arrive, and those over columns the
        masses to move.
    """
    with torch.autocast(cost.device.type, enabled=False):
        kernel = -cost.float() / epsilon
        row, column = torch.zeros_like(kernel[..., :, :1]), torch.zeros_like(kernel[..., :1, :])
        for _ in range(iterations):
            row = log_rows.unsqueeze(-1) - _log_sum_exp(kernel + column, dim=-1)
            column = log_columns.unsqueeze(-2) - _log_sum_exp(kernel + row, dim=-2)
        return torch.exp((kernel + row + column).clamp(min=MIN_EXPONENT))


def _log_sum_exp(values: Tensor, dim: int) -> Tensor:
    """Computes `torch.logsumexp` with the axis kept; values far below the largest are raised, see `sinkhorn`."""
    least = values.amax(dim=dim, keepdim=True).detach() + MIN_EXPONENT
    return torch.logsumexp(torch.maximum(values, least), dim=dim, keepdim=True)
