"""A tiny A2M2, and its equations as literal loops."""

import math

import numpy as np
import torch
from torch import Tensor

from models.model_a2m2 import A2m2, A2m2Options

TINY = {"NAME": "a2m2", "BACKBONE": "tiny", "CLIP_WEIGHTS": "random", "FREEZE_BN": False}
IMAGE_SIZE = 32  # the tiny backbone makes maps of 2 x 2 positions of them


def build(**options) -> A2m2:
    """Returns a small A2M2-Net, the same weights at every call, in evaluation mode."""
    torch.manual_seed(0)
    return A2m2(A2m2Options(**{**TINY, "REDUCED_WIDTH": 6, **options}), IMAGE_SIZE).eval()


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def literal_bounds(length: int, parts: int) -> list[range]:
    parts = min(parts, length)
    return [range(math.floor(i * length / parts), math.ceil((i + 1) * length / parts)) for i in range(parts)]


def literal_moment(vectors: list[np.ndarray], centred: bool) -> np.ndarray:
    mean = sum(vectors) / len(vectors) if centred else np.zeros_like(vectors[0])
    return sum(np.outer(vector - mean, vector - mean) for vector in vectors) / len(vectors)


def literal_sinkhorn(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Computes the textbook scaling, outside the logarithm."""
    kernel = np.exp(-cost / epsilon)
    right = np.ones(len(b))
    for _ in range(iterations):
        left = a / (kernel @ right)
        right = b / (kernel.T @ left)
    return np.array([[left[i] * kernel[i, j] * right[j] for j in range(len(b))] for i in range(len(a))])
