"""The layers that several methods share."""

import math
from itertools import pairwise, product

import pytest
import torch

from models.layers import (
    Attention,
    PositionOptions,
    Positions,
    TransformerLayer,
    TransformerOptions,
    TupleLinear,
    feed_forward,
    frame_tuples,
    gate,
    sinusoid_positions,
)
from models.model_empnet import Reasoning
from models.model_hyrsm import Relation, RelationOptions


@torch.no_grad()
def test_a_very_narrow_gate_depends_on_its_input():
    narrow = gate(6, 0.1, 0.0025)
    assert narrow[0].out_features == 1
    assert gate(6, 0.5, 0.0025)[0].out_features == 3
    first, second = narrow(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "places"),
    [
        (Attention(6, TransformerOptions(HEADS=2, HEAD_DIM=3, DROPOUT=0.5)), 1),
        (feed_forward(6, 8, 0.5), 2),
        (Positions(PositionOptions(DROPOUT=0.5)), 1),
    ],
    ids=["attention", "feed_forward", "positions"],
)
def test_dropout_is_active_only_in_training_mode(layer, places):
    tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    layer.train()
    assert not torch.equal(layer(tokens), layer(tokens))
    assert 0.2 < (layer(tokens) == 0).float().mean() < 0.8  # dropout is the last step
    assert sum(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in layer.modules()) == places
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))


def test_each_dropout_option_belongs_to_its_layers():
    options = TransformerOptions(HEADS=2, HEAD_DIM=3, HIDDEN=4, DROPOUT=0.3, HIDDEN_DROPOUT=0.2)
    for module in (TransformerLayer(6, options), Reasoning(6, options)):
        found = {name: part.p for name, part in module.named_modules() if isinstance(part, torch.nn.Dropout)}
        assert found == {name: 0.2 if name.startswith("feed_forward") else 0.3 for name in found}
        assert set(found.values()) == {0.2, 0.3}
    relation = Relation(6, RelationOptions(HEADS=2, DROPOUT=0.3, WEIGHT_DROPOUT=0.2))
    assert (relation.dropout.p, relation.weight_dropout) == (0.3, 0.2)


@pytest.mark.parametrize(("frames", "size", "count"), [(8, 2, 28), (8, 3, 56), (5, 1, 5), (4, 4, 1)])
def test_frame_tuples_are_all_increasing_sequences(frames, size, count):
    expected = [t for t in product(range(frames), repeat=size) if all(a < b for a, b in pairwise(t))]
    assert frame_tuples(frames, size).tolist() == [list(t) for t in expected]
    assert len(expected) == count


def test_a_video_shorter_than_a_tuple_repeats_its_last_frame():
    assert frame_tuples(2, 3).tolist() == [[0, 1, 1]]


@torch.no_grad()
@pytest.mark.parametrize(("frames", "size"), [(5, 3), (4, 2), (3, 1), (1, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tuple_linear_layer_equals_a_linear_layer_on_joined_frames(frames, size, bias):
    torch.manual_seed(0)
    layer = TupleLinear(6, size, 7, bias).double()
    videos = torch.randn(2, 3, frames, 6, dtype=torch.float64)
    joined = torch.stack([torch.cat([videos[:, :, t] for t in one], dim=-1) for one in frame_tuples(frames, size)], 2)
    expected = torch.nn.functional.linear(joined, layer.weight, layer.bias)
    torch.testing.assert_close(layer(videos), expected)


@pytest.mark.parametrize("exponent", ["pair", "channel"])
def test_sinusoid_positions_equal_their_formula(exponent):
    length, width, scale = 8, 10, 0.1
    found = sinusoid_positions(length, width, scale, exponent)
    for t, i in product(range(length), range(width)):
        power = (i - i % 2) if exponent == "pair" else 2 * i
        angle = t / 10000 ** (power / width)
        assert found[t, i].item() == pytest.approx(scale * (math.cos(angle) if i % 2 else math.sin(angle)), abs=1e-7)
