"""Distances between two sequences of frames, shared by the methods; pure functions.

Shapes: B episodes, Q queries, N classes, T query frames, S support frames, D features.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from models.otam_table import OtamCosts

Matcher = Literal["otam", "bi-mhm", "mean"]
SMALLEST_DISTANCE = 1e-5  # added to squared distances, whose power has no gradient at 0


def cosine_distances(query: Tensor, support: Tensor, epsilon: float = 0.01) -> Tensor:
    """Computes the cosine distance of every query frame to every support frame.

    Args:
        query: frame features, float [..., T, D].
        support: frame features, float [..., S, D]; the leading axes broadcast against those of `query`.
        epsilon: added to the product of the norms, as all published OTAM code does.

    Returns:
        1 - cosine similarity, float32 [..., T, S], in [0, 2].
    """
    with torch.autocast(query.device.type, enabled=False):
        query, support = query.float(), support.float()
        norms = query.norm(dim=-1).unsqueeze(-1) * support.norm(dim=-1).unsqueeze(-2)
        return 1 - query @ support.mT / (norms + epsilon)


def video_distances(query: Tensor, prototypes: Tensor, epsilon: float = 0.01) -> Tensor:
    """Computes frame-by-frame cosine distances between all queries and all prototypes of each episode.

    Args:
        query: float [B, Q, T, D].
        prototypes: float [B, N, S, D].
        epsilon: see `cosine_distances`.

    Returns:
        float32 [B, Q, N, T, S].
    """
    # One matrix product per episode.
    distances = cosine_distances(query.flatten(1, 2), prototypes.flatten(1, 2), epsilon)
    return rearrange(distances, "b (q t) (n s) -> b q n t s", q=query.shape[1], n=prototypes.shape[1])


def otam(distances: Tensor, smoothing: float, both_directions: bool = True) -> Tensor:
    """Computes the cost of the best ordered alignment of two videos, the rows and the columns (OTAM, CVPR 2020).

    The recursion of the released code, with softmin(x) = -smoothing * log(sum(exp(-x / smoothing))) and a
    zero column added on both sides (c is the cumulative cost, row l, column m, columns counted from 1):

        c[0, m]     = d[0, m] + c[0, m-1]                                   first row, no choice
        c[l, 1]     = d[l, 1] + softmin(0, c[l-1, 1], 0)                    the path may enter at any row
        c[l, m]     = d[l, m] + softmin(c[l-1, m-1], c[l, m-1])
        c[l, S+1]   =           softmin(c[l-1, S], c[l-1, S+1], c[l, S])    and leave at any row
        result      = c[T-1, S+1]

    The number of steps does not depend on the number of matrices, so a model with several distances computes them in
    one call. The backward pass needs as much memory as the distances, or twice as much with both directions.

    Args:
        distances: float [..., T, S].
        smoothing: lambda of the softmin, > 0 (0.1 in the OTAM baselines, 0.5 in the CLIP methods).
        both_directions: adds the alignment of the transposed distances, which makes the result symmetric.

    Returns:
        float32 [...], or float64 for float64 distances; may be negative, since softmin is below the minimum.
    """
    rows, columns = distances.shape[-2:]
    if both_directions and rows != columns:
        return otam(distances, smoothing, False) + otam(distances.mT, smoothing, False)
    precise = distances if distances.dtype == torch.float64 else distances.float()
    return OtamCosts.apply(precise, smoothing, both_directions)


def bi_mhm(distances: Tensor) -> Tensor:
    """Computes the bidirectional mean Hausdorff distance (HyRSM, CVPR 2022), which ignores the order of the frames.

    As in the code of the CLIP-FSAR family, this is the sum of the row minima plus the sum of the column minima. HyRSM's
    paper uses the two means, which for T = S is the same distance divided by T.

    Args:
        distances: float [..., T, S].

    Returns:
        float [...].
    """
    return distances.amin(dim=-1).sum(dim=-1) + distances.amin(dim=-2).sum(dim=-1)


def mean_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """Computes cosine distances between the features averaged over time.

    Args:
        query: float [B, Q, T, D].
        prototypes: float [B, N, S, D].

    Returns:
        float32 [B, Q, N].
    """
    return cosine_distances(query.float().mean(dim=2), prototypes.float().mean(dim=2))


def sequence_distances(
    query: Tensor,
    prototypes: Tensor,
    matcher: Matcher = "otam",
    smoothing: float = 0.5,
    both_directions: bool = True,
) -> Tensor:
    """Computes the distances of all queries to all prototypes of each episode with the matcher of a config.

    Args:
        query: float [B, Q, T, D].
        prototypes: float [B, N, S, D].
        matcher: otam aligns the frames in order, bi-mhm pairs them in any order, mean compares the averages.
        smoothing: see `otam`; not used by the other matchers.
        both_directions: see `otam`; the other matchers are symmetric.

    Returns:
        float32 [B, Q, N].
    """
    if matcher == "mean":
        return mean_distances(query, prototypes)
    return sequence_cost(video_distances(query, prototypes), matcher, smoothing, both_directions)


def sequence_cost(distances: Tensor, matcher: Matcher, smoothing: float, both_directions: bool) -> Tensor:
    """Computes `sequence_distances` from distances of frames, for a matcher that compares frames.

    Args:
        distances: float [..., T, S].
        matcher: otam or bi-mhm.
        smoothing, both_directions: see `otam`.

    Returns:
        float [...].
    """
    return bi_mhm(distances) if matcher == "bi-mhm" else otam(distances, smoothing, both_directions)


def distance_matrices(tokens: Tensor, power: float, off_diagonal: float = math.sqrt(2)) -> Tensor:
    """Computes descriptors of frames whose cosine similarity is the distance correlation of their channels.

    With the channels X_k of a frame as observations over its L positions:

        D[k, l] = |X_k - X_l|^2 / (2 L)
        a[k, l] = (D[k, l] + 1e-5)^power
        A       = a - row means - column means + mean                       double centring
        v       = [ A[k, l] for l = k, off_diagonal * A[k, l] for l > k ]

    Then v . v' = trace(A A') for the default sqrt(2), and cos(v, v') is the distance correlation for power 0.5, the
    alpha-distance correlation for power alpha / 2 (DeepBDC, CVPR 2022; TS-FSAR, AAAI 2026).

    Args:
        tokens: float [..., L, d], the d channels at the L positions of a frame.
        power: of the squared distance, in (0, 1).
        off_diagonal: factor on the entries off the diagonal, each of which represents two; the released code of both
            papers uses 1, which doubles the relative weight of the diagonal.

    Returns:
        float32 [..., d (d + 1) / 2].
    """
    with torch.autocast(tokens.device.type, enabled=False):
        channels = tokens.float().mT
        products = channels @ tokens.float()
        squares = products.diagonal(dim1=-2, dim2=-1)
        distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * products
        powers = (distances.clamp(min=0) / (2 * channels.shape[-1]) + SMALLEST_DISTANCE) ** power
        means = powers.mean(dim=-1, keepdim=True)
        centred = powers - means - means.mT + means.mean(dim=-2, keepdim=True)
        row, column = torch.triu_indices(*centred.shape[-2:], device=tokens.device)
        factors = torch.where(row == column, 1.0, off_diagonal)
        return centred[..., row, column] * factors


def squared_distance(first: Tensor, second: Tensor, dims: int) -> Tensor:
    """Computes d(x, y) of the auxiliary losses: squares summed over tokens and features, averaged over videos.

    Args:
        first, second: float [..., L, D] or [..., D], of the same shape.
        dims: number of last axes that belong to one video.

    Returns:
        scalar.
    """
    return (first - second).square().flatten(-dims).sum(dim=-1).mean()
