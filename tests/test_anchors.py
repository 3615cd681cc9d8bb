"""The attention with anchors against its plain form: samples and anchors side by side in one transformer layer."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from models.clip_prompts import AnchorAttention
from models.layers import TransformerOptions

OPTIONS = TransformerOptions(HEADS=3, HEAD_DIM=4, HIDDEN=10, DROPOUT=0.3, HIDDEN_DROPOUT=0.2)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def anchor_attention() -> AnchorAttention:
    """Returns the layer with no weight equal to one or zero, including the layer norm."""
    torch.manual_seed(0)
    attention = AnchorAttention(6, OPTIONS)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention


def plain(attention: AnchorAttention, support: Tensor, group: Tensor) -> list[Tensor]:
    """Runs the layer over cat(anchors, samples) at each frame of each episode, for a group of queries [B, Q, T, D]."""
    ways, queries = support.shape[1], group.shape[1]
    anchors = [(support[:, n].sum(dim=1) + group.sum(dim=1)) / (support.shape[2] + queries) for n in range(ways)]
    sides = []
    for samples in ([*anchors, *support.flatten(1, 2).unbind(1)], [sum(anchors) / ways, *group.unbind(1)]):
        by_frame = torch.stack(samples, dim=1).transpose(1, 2)  # [B, T, S, D]
        sides.append(attention.among_samples(by_frame.flatten(0, 1)).unflatten(0, by_frame.shape[:2]).transpose(1, 2))
    class_side, query_side = sides
    prototypes = class_side[:, ways:].unflatten(1, support.shape[1:3]).mean(dim=2)
    return [class_side[:, :ways], query_side[:, :1], prototypes, query_side[:, 1:]]


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("queries", [1, 2])
def test_each_group_equals_the_plain_form(shots: int, queries: int) -> None:
    attention = anchor_attention().eval()
    support, groups = torch.randn(2, 4, shots, 5, 6), torch.randn(2, 3, queries, 5, 6)
    found = attention(support, groups)
    for group in range(3):
        expected = plain(attention, support, groups[:, group])
        for part, wanted in zip(found, expected, strict=True):
            assert relative_difference(part[:, group], wanted) < 1e-5


@pytest.mark.parametrize("queries", [1, 4])
def test_dropout_and_gradients_equal_the_plain_form(queries: int) -> None:
    """With one query per group, the plain form has B * G episodes of one query."""
    attention = anchor_attention().train()
    support, query = torch.randn(2, 3, 2, 5, 6), torch.randn(2, 4, 5, 6)
    groups = query.unflatten(1, (4 // queries, queries))
    other = deepcopy(attention)
    torch.manual_seed(1)
    found = attention(support, groups)
    torch.manual_seed(1)
    each = groups.shape[1]
    expected = plain(other, support.repeat_interleave(each, dim=0), groups.flatten(0, 1))
    for part, wanted in zip(found, expected, strict=True):
        assert relative_difference(part.flatten(0, 1), wanted) < 1e-5
    for parts in (found, expected):
        sum(part.square().sum() for part in parts).backward()
    for ours, theirs in zip(attention.parameters(), other.parameters(), strict=True):
        assert relative_difference(ours.grad, theirs.grad) < 1e-4
