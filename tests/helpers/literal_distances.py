"""Distances between videos as literal loops."""

import math

import torch


def literal_otam(distances: torch.Tensor, smoothing: float) -> float:
    """Returns the recursion of the released code for one matrix, cell by cell, in float64."""
    rows, columns = distances.shape
    padded = torch.nn.functional.pad(distances.double(), (1, 1))
    cost = [[0.0] * (columns + 2) for _ in range(rows)]

    def softmin(*values: float) -> float:
        smallest = min(values)
        return smallest - smoothing * math.log(sum(math.exp((smallest - v) / smoothing) for v in values))

    for m in range(1, columns + 2):
        cost[0][m] = float(padded[0, m]) + cost[0][m - 1]
    for row in range(1, rows):
        for m in range(1, columns + 2):
            moves = [cost[row - 1][m - 1], cost[row][m - 1]]
            if m in (1, columns + 1):
                moves.append(cost[row - 1][m])
            cost[row][m] = float(padded[row, m]) + softmin(*moves)
    return cost[-1][-1]


def literal_cosine_distances(query: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Returns cosine distances of [T, D] and [S, D], pair by pair: float64 [T, S]."""
    rows = []
    for x in query.double():
        rows.append([1 - float((x * y).sum()) / (float(x.norm() * y.norm()) + 0.01) for y in video.double()])
    return torch.tensor(rows, dtype=torch.float64)


def literal_bi_mhm(distances: torch.Tensor) -> float:
    """Returns the summed distances of each row to its nearest column and each column to its nearest row."""
    rows = distances.tolist()
    columns = list(zip(*rows, strict=True))
    return sum(min(row) for row in rows) + sum(min(column) for column in columns)


def literal_distance_correlation(first: torch.Tensor, second: torch.Tensor, power: float) -> float:
    """trace(A B) / sqrt(trace(A A) trace(B B)) of the centred distances between channels, number by number, float64."""

    def centred(tokens: torch.Tensor) -> list[list[float]]:
        positions, channels = tokens.shape
        a = [[0.0] * channels for _ in range(channels)]
        for k in range(channels):
            for m in range(channels):
                square = sum((float(tokens[p, k]) - float(tokens[p, m])) ** 2 for p in range(positions))
                a[k][m] = (square / (2 * positions) + 1e-5) ** power
        rows = [sum(row) / channels for row in a]
        columns = [sum(row[m] for row in a) / channels for m in range(channels)]
        mean = sum(rows) / channels
        return [[a[k][m] - rows[k] - columns[m] + mean for m in range(channels)] for k in range(channels)]

    def trace(left: list[list[float]], right: list[list[float]]) -> float:
        return sum(left[k][m] * right[m][k] for k in range(len(left)) for m in range(len(left)))

    a, b = centred(first), centred(second)
    return trace(a, b) / math.sqrt(trace(a, a) * trace(b, b))
