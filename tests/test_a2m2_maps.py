"""A2M2-Net averages large maps down to the numbers of adaptive pooling, with a gradient that can be deterministic."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from models.model_a2m2 import A2m2Options, M2Block, _average_down
from tests.helpers.a2m2 import TINY, random_tensor


@pytest.mark.parametrize("shape", [(7, 7), (14, 14), (9, 9), (5, 5), (8, 6), (6, 15)], ids=str)
def test_maps_are_averaged_like_adaptive_pooling(shape):
    maps = random_tensor(2, 3, *shape, 4).requires_grad_()
    height, width = (min(side, 7) for side in shape)
    pooled = adaptive_avg_pool2d(maps.flatten(0, 1).permute(0, 3, 1, 2), (height, width))
    expected = pooled.permute(0, 2, 3, 1).unflatten(0, (2, 3))
    found, factors = _average_down(maps, 7), random_tensor(2, 3, height, width, 4, seed=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    of_found, of_expected = (torch.autograd.grad((side * factors).sum(), maps)[0] for side in (found, expected))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [7, 9])
def test_averaging_keeps_the_dtype_under_autocast(side):
    maps = random_tensor(1, 2, side, side, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert _average_down(maps.bfloat16(), 7).dtype == torch.bfloat16
        found = _average_down(maps, 7)
    torch.testing.assert_close(found, _average_down(maps, 7), rtol=0, atol=0)


@pytest.mark.parametrize("side", [7, 14])
def test_the_gradient_is_deterministic(side):
    block = M2Block(5, A2m2Options(**TINY, REDUCED_WIDTH=3))
    waiting, names = [block(random_tensor(2, 2, side, side, 5).requires_grad_()).grad_fn], set()
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [after for after, _ in node.next_functions if after is not None]
    assert any("Convolution" in name for name in names)
    assert not any("AdaptiveAvgPool" in name for name in names)
