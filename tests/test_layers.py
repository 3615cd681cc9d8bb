"""The layers that several methods share."""

import pytest
import torch

from models.layers import Attention, TransformerOptions, feed_forward, gate


@torch.no_grad()
def test_a_gate_narrower_than_one_feature_still_sees_its_input():
    narrow = gate(6, 0.1, 0.0025)
    assert narrow[0].out_features == 1
    assert gate(6, 0.5, 0.0025)[0].out_features == 3
    first, second = narrow(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "places"),
    [(Attention(6, TransformerOptions(HEADS=2, HEAD_DIM=3, DROPOUT=0.5)), 1), (feed_forward(6, 8, 0.5), 2)],
    ids=["attention", "feed_forward"],
)
def test_dropout_acts_in_training_mode_alone(layer, places):
    tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    layer.train()
    assert not torch.equal(layer(tokens), layer(tokens))
    assert sum(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in layer.modules()) == places
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))
