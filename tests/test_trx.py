"""TRX and STRM equal their equations, written out tuple by tuple.

Shapes: B episodes, N ways, K shots, Q queries, T frames, D features.
"""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.released_fixtures import FakeTowers, build_head
from models.layers import sinusoid_positions
from models.model_strm import Strm
from models.model_trx import CrossTransformer

WIDTH, FRAMES = 6, 4
NO_TEXT = torch.zeros(1, 1, 1)


def head(name: str, width: int = WIDTH, **options: Any) -> Any:
    """Returns a small head with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = build_head(name, FakeTowers(width), TUPLE_WIDTH=8, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def joined(video: Tensor, size: int) -> Tensor:
    """Returns the frames of every tuple joined: [T, D] -> [P, size * D]."""
    return torch.stack([torch.cat([video[t] for t in times]) for times in combinations(range(len(video)), size)])


def literal_distance(transformer: CrossTransformer, query: Tensor, videos: list[Tensor], size: int) -> Tensor:
    """Returns D_m of one query [T, D] and the videos of one class, query tuple by query tuple."""

    def keys_and_values(video: Tensor) -> tuple[Tensor, Tensor]:
        tuples = joined(video + sinusoid_positions(*video.shape, 0.1), size)
        keys = F.linear(tuples, transformer.key.weight, transformer.key.bias)
        # The bias of the values in the released code, which must not matter.
        return transformer.norm(keys), F.linear(tuples, transformer.value.weight, torch.ones(8))

    query_keys, query_values = keys_and_values(query)
    keys, values = (torch.cat(parts) for parts in zip(*map(keys_and_values, videos), strict=True))
    total = torch.zeros(())
    for key, value in zip(query_keys, query_values, strict=True):
        weights = torch.stack([key @ other for other in keys]).div(math.sqrt(8)).softmax(dim=0)
        prototype = sum(weight * other for weight, other in zip(weights, values, strict=True))
        total = total + (value - prototype).square().sum()
    return total / len(query_keys)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[2, 3], [1], [3, 2]])
@pytest.mark.parametrize("shots", [1, 3])
def test_trx_scores_equal_its_equations(sizes, shots):
    model = head("trx", TUPLES=sizes)
    support, query = features(1, 3, shots, FRAMES, WIDTH), features(1, 2, FRAMES, WIDTH, seed=1)
    scores = model.score(support, query, NO_TEXT.expand(1, 3, 1))
    for q in range(2):
        for n in range(3):
            distances = [
                literal_distance(transformer, query[0, q], list(support[0, n]), size)
                for transformer, size in zip(model.transformers, sizes, strict=True)
            ]
            assert -scores[0, q, n].item() == pytest.approx(sum(distances).item() / len(sizes), rel=1e-4)


@torch.no_grad()
def test_trx_query_and_support_may_differ_in_length():
    model = head("trx")
    scores = model.score(features(1, 2, 1, 5, WIDTH), features(1, 1, 3, WIDTH, seed=1), NO_TEXT.expand(1, 2, 1))
    support, query = features(1, 2, 1, 5, WIDTH), features(1, 1, 3, WIDTH, seed=1)
    for n in range(2):
        distances = [
            literal_distance(transformer, query[0, 0], [support[0, n, 0]], size)
            for transformer, size in zip(model.transformers, (2, 3), strict=True)
        ]
        assert -scores[0, 0, n].item() == pytest.approx(sum(distances).item() / 2, rel=1e-4)


@torch.no_grad()
def test_frame_order_matters_only_with_tuples_or_positions():
    support, query = features(1, 2, 1, FRAMES, WIDTH), features(1, 1, FRAMES, WIDTH, seed=1)
    model = head("trx", TUPLES=[2], POSITION_SCALE=0.0)
    text = NO_TEXT.expand(1, 2, 1)
    assert not torch.allclose(model.score(support, query, text), model.score(support, query.flip(2), text), rtol=1e-3)
    model = head("trx", TUPLES=[1], POSITION_SCALE=0.0)
    torch.testing.assert_close(model.score(support, query, text), model.score(support, query.flip(2), text))


@torch.no_grad()
def test_the_pairing_of_trx_is_its_attention_over_frames():
    model = head("trx", TUPLES=[1, 2])
    support, query = features(1, 2, 3, FRAMES, WIDTH), features(1, 1, FRAMES, WIDTH, seed=1)
    pairings = model.explain(support, query, NO_TEXT.expand(1, 2, 1)).pairings
    assert list(pairings) == ["tuples of 1", "tuples of 2"]
    for size, pairing in zip((1, 2), pairings.values(), strict=True):
        assert pairing.shape == (1, 1, 2, FRAMES, FRAMES)
        # Each of a frame's tuples spends a weight of 1 at the frame's place.
        tuples_of_a_frame = math.comb(FRAMES - 1, size - 1)
        torch.testing.assert_close(pairing.sum(dim=-1), torch.full((1, 1, 2, FRAMES), float(tuples_of_a_frame)))


# STRM


@torch.no_grad()
def test_the_pairing_of_strm_does_not_depend_on_its_projections():
    support, query, text = features(1, 2, 2, 8, WIDTH), features(1, 1, 8, WIDTH, seed=1), NO_TEXT.expand(1, 2, 1)
    both, relation = head("strm"), head("strm", PROXIMITY_WEIGHT=0.0)
    relation.load_state_dict(both.state_dict(), strict=False)
    expected = relation.explain(support, query, text).pairings["tuples of 2"]
    torch.testing.assert_close(both.explain(support, query, text).pairings["tuples of 2"], expected)


def literal_patch_enrichment(model: Strm, patches: Tensor) -> Tensor:
    """Returns PLE of one frame's patches: [L, D] -> [D]."""
    layer = model.patch_enrichment
    z = patches + sinusoid_positions(*patches.shape, 0.1)
    # A bias of the keys, as in the released code, adds the same number to all products of a query.
    logits = layer.query(z) @ (layer.key(z) + 1).T
    y = layer.gate * logits.softmax(dim=-1) @ layer.value(z) + z
    return torch.stack([layer.expand(F.relu(layer.mix(F.relu(layer.reduce(patch))))) + patch for patch in y]).mean(0)


def literal_frame_enrichment(model: Strm, video: Tensor) -> Tensor:
    """Returns FLE of one video: [T, D] -> [T, D]."""
    first, _, last = model.frame_enrichment.over_time
    x = video + sinusoid_positions(*video.shape, 0.1)
    mixed = torch.stack([last(F.relu(first(channel))) for channel in x.T], dim=1) + x
    first, _, last = model.frame_enrichment.each_frame
    return torch.stack([last(F.relu(first(frame))) + frame for frame in mixed])


@torch.no_grad()
@pytest.mark.parametrize("patch_level", [True, False])
@pytest.mark.parametrize("frame_level", [True, False])
def test_strm_scores_equal_its_equations(patch_level, frame_level):
    model = head("strm", PATCH_LEVEL=patch_level, FRAME_LEVEL=frame_level, MAP_SIZE=2, FRAMES=FRAMES)
    maps = features(8, FRAMES, WIDTH, 4, 4)  # six support videos of two classes, two queries
    f = model.encode(maps)
    blocks = maps.unflatten(3, (2, 2)).unflatten(5, (2, 2)).amax(dim=(4, 6)).flatten(3).mT
    for v in range(8):
        for t in range(FRAMES):
            expected = literal_patch_enrichment(model, blocks[v, t]) if patch_level else maps[v, t].mean(dim=(1, 2))
            torch.testing.assert_close(f[v, t], expected)
    x = [literal_frame_enrichment(model, video) if frame_level else video for video in f]
    (projection,) = model.projections
    e = [F.relu(F.linear(joined(video, 2), projection.weight, projection.bias)) for video in f]
    support, query = f[:6].unflatten(0, (1, 2, 3)), f[6:][None]
    scores = model.score(support, query, NO_TEXT.expand(1, 2, 1))
    for q in range(2):
        for n in range(2):
            videos = range(3 * n, 3 * n + 3)
            relation = -literal_distance(model.transformers[0], x[6 + q], [x[v] for v in videos], 2)
            others = torch.cat([e[v] for v in videos])
            nearest = [min((own - other).norm().item() for other in others) for own in e[6 + q]]
            expected = relation.item() - 0.1 * sum(nearest) / len(nearest)
            assert scores[0, q, n].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_longer_clips_are_resampled_linearly_for_the_layers_along_time():
    layer, video = head("strm", FRAMES=2).frame_enrichment, features(1, 4, WIDTH)
    x = video + sinusoid_positions(4, WIDTH, 0.1)
    pairs = x.unflatten(1, (2, 2)).mean(dim=2)
    mixed = layer.over_time(pairs.mT) @ torch.tensor([[1, 0.75, 0.25, 0], [0, 0.25, 0.75, 1]])
    torch.testing.assert_close(layer(video), layer.each_frame(mixed.mT + x) + mixed.mT + x)


def test_the_projection_of_strm_is_trained_unless_disabled():
    for trained in (True, False):
        model = head("strm", TRAIN_PROJECTION=trained)
        assert "projections.0.weight" in model.state_dict()
        assert all(parameter.requires_grad == trained for parameter in model.projections.parameters())
        assert model.transformers[0].key.weight.requires_grad
    assert not any("projection" in name for name in head("strm", PROXIMITY_WEIGHT=0.0).state_dict())


@torch.no_grad()
def test_dropout_of_strm_is_disabled_in_evaluation():
    support, query, text = features(1, 2, 1, 8, WIDTH), features(1, 1, 8, WIDTH, seed=1), NO_TEXT.expand(1, 2, 1)
    maps = features(1, 8, WIDTH, 4, 4)
    model = head("strm", DROPOUT=0.5)
    assert torch.equal(model.score(support, query, text), model.score(support, query, text))
    assert torch.equal(model.encode(maps), model.encode(maps))
    model.train()
    assert not torch.equal(model.encode(maps), model.encode(maps))
    for weight in (0.0, 1.0):  # in the relation, and in the projection
        model = head("strm", DROPOUT=0.5, PROXIMITY_WEIGHT=weight, TUPLES=[2]).train()
        assert not torch.equal(model.score(support, query, text), model.score(support, query, text))
