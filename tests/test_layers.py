"""The layers that several methods share."""

import torch

from models.layers import gate


@torch.no_grad()
def test_a_gate_narrower_than_one_feature_still_sees_its_input():
    narrow = gate(6, 0.1, 0.0025)
    assert narrow[0].out_features == 1
    assert gate(6, 0.5, 0.0025)[0].out_features == 3
    first, second = narrow(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(first, second)
