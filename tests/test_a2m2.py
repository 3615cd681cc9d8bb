"""The reconstruction of A2M2-Net equals its equations written out one number at a time.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, C candidates, M length of a descriptor.
"""

import math

import numpy as np
import pytest
import torch

from models import model_a2m2
from models.clip_fsar import ClipTowers
from models.model_a2m2 import BOUNDS, A2m2, A2m2Options, A2Module, M2Block
from tests.helpers.a2m2 import IMAGE_SIZE, TINY, build, literal_bounds, literal_moment, literal_sinkhorn, random_tensor
from utils.errors import UserError
from utils.schema import ModelOptions

RIDGE = 1e-3  # written out, so that a change in the method is detected
NO_TEXT = torch.empty(0)


# The equations, one number at a time, in float64


def literal_positions(*shape: int) -> np.ndarray:
    """Returns time, row and column of the centre of each position, between -1 and 1: [T, h, w, 3]."""
    positions = np.empty((*shape, 3))
    for place in np.ndindex(*shape):
        positions[place] = [-1 + 2 * (number + 0.5) / length for number, length in zip(place, shape, strict=True)]
    return positions


def literal_descriptor(moment: np.ndarray, iterations: int) -> np.ndarray:
    """Computes Newton-Schulz on A / tr(A), as in iSQRT-COV, and returns the upper triangle."""
    identity = np.eye(len(moment))
    y, z = moment / np.trace(moment), identity
    for _ in range(iterations):
        y, z = 0.5 * y @ (3 * identity - z @ y), 0.5 * (3 * identity - z @ y) @ z
    return np.array([y[i, j] for i in range(len(y)) for j in range(i, len(y))])


def literal_candidates(video: np.ndarray, temporal: list[int], spatial: list[int], options: A2m2Options) -> list:
    """Returns all candidates of one video [T, h, w, d]: scale and bounds of each cell, and its descriptor."""
    candidates = []
    frames, height, width, size = video.shape
    for scale, (windows_of_time, regions) in enumerate((t, r) for t in temporal for r in spatial):
        for time in literal_bounds(frames, windows_of_time):
            for rows in literal_bounds(height, regions):
                for columns in literal_bounds(width, regions):
                    vectors = [video[t, y, x] for t in time for y in rows for x in columns]
                    moment = literal_moment(vectors, options.CENTRED) + RIDGE * np.eye(size)
                    place = [scale, time[0] / frames, (time[-1] + 1) / frames]
                    place += [rows[0] / height, (rows[-1] + 1) / height]
                    place += [columns[0] / width, (columns[-1] + 1) / width]
                    candidates.append([*place, *literal_descriptor(moment, options.NEWTON_ITERATIONS)])
    return candidates


def literal_weights(candidates: list[np.ndarray], others: list[np.ndarray], guide: A2Module) -> np.ndarray:
    """Returns softmax_i( w relu( W u_i + b + W' mean(u') ) ) over the candidates with their positions."""
    own, bias, other, weigh = (
        parameter.detach().double().numpy()
        for parameter in (guide.own.weight, guide.own.bias, guide.other.weight, guide.weigh.weight[0])
    )
    mean = sum(others)[1:] / len(others)
    exponentials = np.array([math.exp(weigh @ np.maximum(own @ u[1:] + bias + other @ mean, 0)) for u in candidates])
    return exponentials / exponentials.sum()


def literal_distance(query: list[np.ndarray], prototype: list[np.ndarray], model: A2m2) -> float:
    """Returns the distance of one query and one class from their candidates [1 + BOUNDS + M], scale by scale."""
    distances = []
    for scale in {candidate[0] for candidate in query}:
        q, s = ([candidate for candidate in side if candidate[0] == scale] for side in (query, prototype))
        distances.append(literal_distance_of_scale(q, s, model))
    return sum(distances) / len(distances)


def literal_distance_of_scale(query: list[np.ndarray], prototype: list[np.ndarray], model: A2m2) -> float:
    """Returns the distance of the candidates of one scale."""
    options = model.options
    if model.A2 is None:
        return sum(literal_cost(q, s) for q, s in zip(query, prototype, strict=True)) / len(query)
    rows, columns = literal_weights(query, prototype, model.A2), literal_weights(prototype, query, model.A2)
    cost = np.array([[literal_cost(q, s) for s in prototype] for q in query])
    if options.METRIC == "bi-mhm":
        nearest_row = sum(weight * min(line) for weight, line in zip(rows, cost, strict=True))
        nearest_column = sum(weight * min(line) for weight, line in zip(columns, cost.T, strict=True))
        return (nearest_row + nearest_column) / 2
    if options.METRIC == "mean":
        return (np.outer(rows, columns) * cost).sum()
    apart = np.array([[sum((q[1 : 1 + BOUNDS] - s[1 : 1 + BOUNDS]) ** 2) for s in prototype] for q in query])
    total = cost + options.PLACE_COST * apart
    plan = literal_sinkhorn(total, rows, columns, options.SINKHORN_EPSILON, options.SINKHORN_ITERATIONS)
    return (plan * cost).sum()


def literal_cost(query: np.ndarray, prototype: np.ndarray) -> float:
    return 1 - literal_cosine(query[1 + BOUNDS :], prototype[1 + BOUNDS :])


def literal_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return first @ second / (np.linalg.norm(first) * np.linalg.norm(second))


# The M2 block


@pytest.mark.parametrize(("centred", "position_weight"), [(True, 0.0), (False, 0.0), (False, 0.7)])
@pytest.mark.parametrize("shape", [(8, 4, 4), (5, 3, 2), (1, 2, 2)])
def test_descriptors_equal_literal_loops(centred, position_weight, shape):
    torch.manual_seed(0)
    block = M2Block(7, A2m2Options(**TINY, REDUCED_WIDTH=3, CENTRED=centred, POSITION_WEIGHT=position_weight)).eval()
    maps = random_tensor(2, *shape, 7)
    weights = block.reduce[0].weight[:, :, 0, 0]
    features = (maps @ weights.T / math.sqrt(1 + block.reduce[1].eps)).relu()  # batch norm as it was built
    frames, height, width = shape
    temporal = [scale for scale in (1, 2, 4, 8) if scale < frames] + [frames] * (frames <= 8)
    spatial = [scale for scale in (1, 2) if scale <= max(height, width)]
    for video, found in zip(features.detach().double().numpy(), block(maps).detach(), strict=True):
        if position_weight:
            video = np.concatenate([video, position_weight * literal_positions(*shape)], axis=-1)
        expected = literal_candidates(video, temporal, spatial, block.options)
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-3, atol=1e-4)


def test_large_maps_are_averaged_to_the_maximum_size():
    block = M2Block(5, A2m2Options(**TINY, REDUCED_WIDTH=3, MAP_SIZE=2)).eval()
    maps = random_tensor(1, 2, 4, 4, 5)
    small = maps.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(block(maps), block(small))


@pytest.mark.parametrize("lists", [{}, {"TEMPORAL_SCALES": [8, 2, 4], "SPATIAL_SCALES": [2, 1]}], ids=str)
def test_without_multi_scale_only_the_finest_scale_is_used(lists):
    block = M2Block(5, A2m2Options(**TINY, REDUCED_WIDTH=3, MULTI_SCALE=False, **lists)).eval()
    fine = M2Block(5, A2m2Options(**TINY, REDUCED_WIDTH=3, TEMPORAL_SCALES=[8], SPATIAL_SCALES=[2])).eval()
    fine.load_state_dict(block.state_dict())
    maps = random_tensor(1, 8, 4, 4, 5)
    assert block(maps).shape[1] == 8 * 4
    torch.testing.assert_close(block(maps), fine(maps))


def test_position_channels_encode_place_and_time():
    maps = random_tensor(1, 4, 2, 2, 5)
    for weight, is_shown in ((0.0, False), (1.0, True)):
        options = A2m2Options(**TINY, REDUCED_WIDTH=3, TEMPORAL_SCALES=[1], SPATIAL_SCALES=[1], POSITION_WEIGHT=weight)
        block = M2Block(5, options).eval()
        for axis in (1, 2, 3):
            difference = (block(maps) - block(maps.flip(axis))).abs().max()
            assert (difference > 1e-3) == is_shown


def test_moments_are_computed_in_float32_under_autocast():
    block = M2Block(5, A2m2Options(**TINY, REDUCED_WIDTH=3)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(random_tensor(1, 4, 2, 2, 5)).dtype == torch.float32


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("frames", [1, 4])
def test_constant_frames_give_finite_gradients(centred, frames):
    model = build(CENTRED=centred).train()
    videos = torch.full((6, frames, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5, requires_grad=True)
    candidates = model.encode(videos)
    scores = model.match(candidates[None, :2, None], candidates[None, 2:], torch.empty(0))
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor([0, 1, 0, 1])).backward()
    assert candidates.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert videos.grad.isfinite().all()
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 1e3


# The score


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"PLACE_COST": 2.0, "POSITION_WEIGHT": 1.0},
        {"METRIC": "bi-mhm"},
        {"METRIC": "mean"},
        {"ADAPTIVE": False},
        {"CENTRED": False, "MULTI_SCALE": False},
    ],
    ids=str,
)
def test_scores_equal_literal_scores(shots, options):
    model = build(**options)
    candidates = model.encode(random_tensor(2 * shots + 3, 4, 3, IMAGE_SIZE, IMAGE_SIZE))
    support, query = candidates[: 2 * shots].unflatten(0, (1, 2, shots)), candidates[2 * shots :][None]
    found = model.match(support, query, torch.empty(0))
    prototypes = [
        [sum(shots) / len(shots) for shots in zip(*of_class, strict=True)] for of_class in support[0].double().numpy()
    ]
    expected = [
        [-model.options.SCORE_SCALE * literal_distance(list(one), prototype, model) for prototype in prototypes]
        for one in query[0].double().numpy()
    ]
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_without_a_position_cost_no_position_distance_is_computed(monkeypatch):
    videos, scores = random_tensor(5, 4, 3, IMAGE_SIZE, IMAGE_SIZE), {}
    for cost in (0.0, 1e-30):  # the second is negligible beside the costs of pairs
        model = build(PLACE_COST=cost)
        candidates = model.encode(videos)
        with monkeypatch.context() as patch:
            if not cost:
                patch.setattr(model_a2m2, "_squared_distances", None)
            scores[cost] = model.match(candidates[None, :2, None], candidates[None, 2:], torch.empty(0))
    assert torch.equal(scores[0.0], scores[1e-30])


def test_the_position_cost_is_the_squared_distance_of_bounds():
    """Tested directly, since in a transport plan all sufficiently large costs have the same effect."""
    candidates = random_tensor(5, 1 + BOUNDS + 3)
    expected = [[sum((first[1 : 1 + BOUNDS] - other[1 : 1 + BOUNDS]) ** 2) for other in candidates.double().numpy()]
                for first in candidates.double().numpy()]  # fmt: skip
    np.testing.assert_allclose(model_a2m2._squared_distances(candidates), expected, rtol=1e-5, atol=1e-6)


def distance_after_exchange(**options) -> float:
    """Returns the distance of four candidates to the same descriptors with exchanged positions."""
    model = build(SINKHORN_EPSILON=0.01, **options)
    scale_and_bounds = torch.cat([torch.zeros(4, 1), torch.linspace(0, 1, 4 * BOUNDS).view(4, BOUNDS)], dim=-1)
    descriptors = random_tensor(4, 21)
    moved_descriptors = descriptors[[2, 3, 0, 1]]
    first, moved = (
        torch.cat([scale_and_bounds, part], dim=-1)[None, None] for part in (descriptors, moved_descriptors)
    )
    with torch.no_grad():
        return -model.match(first[:, :, None], moved, torch.empty(0)).item() / model.options.SCORE_SCALE


def test_adaptive_alignment_follows_motion_without_a_position_cost():
    assert distance_after_exchange(PLACE_COST=0.0) < 0.1
    assert distance_after_exchange(PLACE_COST=100.0) > 0.5
    assert distance_after_exchange(ADAPTIVE=False) > 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [*({"METRIC": metric} for metric in ("optimal-transport", "bi-mhm", "mean")), {"ADAPTIVE": False}],
    ids=str,
)
def test_scales_are_compared_one_by_one_and_count_equally(options):
    """The score is the mean of the scores from each single scale."""
    model = build(**options, PLACE_COST=0.3)
    candidates = model.encode(random_tensor(5, 4, 3, IMAGE_SIZE, IMAGE_SIZE))
    candidates[..., 1 + BOUNDS :] = random_tensor(*candidates[..., 1 + BOUNDS :].shape, seed=1)
    support, query = candidates[None, :3, None], candidates[None, 3:]
    scales = candidates[0, :, 0]
    each = [model.match(support[..., scales == n, :], query[..., scales == n, :], NO_TEXT) for n in scales.unique()]
    assert len(each) == 3 * 2
    torch.testing.assert_close(model.match(support, query, NO_TEXT), torch.stack(each).mean(dim=0))


# Backbones


@pytest.mark.parametrize(("backbone", "size", "shape"), [("RN50", 64, (2, 2, 2048)), ("ViT-B-32", 64, (2, 2, 768))])
def test_maps_of_clip_towers_train_every_parameter(backbone, size, shape):
    torch.manual_seed(0)
    towers = ClipTowers(ModelOptions(BACKBONE=backbone, CLIP_WEIGHTS="random", FREEZE_BN=False), size)
    towers.drop_text_tower()
    assert towers.drop_pooling() == shape[-1]
    maps = towers.feature_maps(random_tensor(1, 2, 3, size, size))
    assert maps.shape == (1, 2, *shape)
    (maps * random_tensor(*maps.shape)).sum().backward()
    assert [name for name, parameter in towers.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_the_mean_of_imagenet_resnet_maps_is_its_feature():
    model = build(BACKBONE="resnet18", WEIGHTS="random")
    frames = random_tensor(1, 2, 3, 64, 64)
    torch.testing.assert_close(model.encoder.feature_maps(frames).mean(dim=(2, 3)), model.encoder(frames))
    assert model.encode(frames).shape == (1, (1 + 2) * (1 + 4), 1 + BOUNDS + 6 * 7 // 2)


@torch.no_grad()
def test_clip_resnet_maps_are_the_input_of_its_pooling():
    torch.manual_seed(0)
    options = ModelOptions(BACKBONE="RN50", CLIP_WEIGHTS="random")
    towers = ClipTowers(options, 64).eval()
    frames = random_tensor(1, 2, 3, 64, 64)
    pool, expected = towers.visual.attnpool, towers(frames)
    towers.drop_pooling()
    found = pool(towers.feature_maps(frames)[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(found[None], expected)


def test_a_tower_without_known_maps_is_refused():
    with pytest.raises(UserError, match="BACKBONE"):
        A2m2(A2m2Options(**{**TINY, "BACKBONE": "convnext_base"}), 64)
