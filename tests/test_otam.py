"""OTAM and the zero-shot row equal their definitions written out video by video, and use nothing else.

Shapes: B episodes, N ways, K shots, Q queries, T frames, D features.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import models.model_otam
from models.clip_method import ClipMethodOptions
from models.model_otam import Otam, OtamOptions
from models.model_zeroshot import ZeroShot
from tests.helpers.literal_distances import (
    literal_bi_mhm,
    literal_cosine_distances,
    literal_distance_correlation,
    literal_otam,
)

IMAGE_SIZE = 32
TINY = {"BACKBONE": "tiny", "CLIP_WEIGHTS": "random", "FREEZE_BN": False}


def otam_model(**options) -> Otam:
    return Otam(OtamOptions(NAME="otam", **TINY, **options), IMAGE_SIZE).eval()


def random_features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def no_text(support: Tensor) -> Tensor:
    return torch.zeros(*support.shape[:2], 1)


def literal_distance(query: Tensor, video: Tensor, matcher: str, both_directions: bool) -> float:
    """Returns the distance of two videos [T, D], in float64."""
    if matcher == "mean":
        return literal_cosine_distances(query.mean(dim=0, keepdim=True), video.mean(dim=0, keepdim=True)).item()
    distances = literal_cosine_distances(query, video)
    if matcher == "bi-mhm":
        return literal_bi_mhm(distances)
    return literal_otam(distances, 0.1) + (literal_otam(distances.T, 0.1) if both_directions else 0.0)


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("matcher", ["otam", "bi-mhm", "mean"])
@pytest.mark.parametrize("shot_pool", ["distances", "features"])
@pytest.mark.parametrize("both_directions", [True, False])
def test_scores_equal_the_method_written_out_video_by_video(shots, matcher, shot_pool, both_directions):
    support, query = random_features(2, 3, shots, 4, 6), random_features(2, 2, 5, 6)
    model = otam_model(MATCHER=matcher, SHOT_POOL=shot_pool, OTAM_BOTH_DIRECTIONS=both_directions)
    scores = model.match(support, query, no_text(support))
    assert scores.shape == (2, 2, 3)
    for b in range(2):
        for q in range(2):
            for n in range(3):
                videos = list(support[b, n])
                if shot_pool == "features":
                    videos = [sum(videos) / shots]
                each = [literal_distance(query[b, q], video, matcher, both_directions) for video in videos]
                assert scores[b, q, n].item() == pytest.approx(-sum(each) / len(each), abs=2e-5)


def test_both_ways_to_pool_shots_agree_only_for_one_shot():
    for shots in (1, 2):
        support, query = random_features(1, 3, shots, 4, 6), random_features(1, 2, 4, 6)
        by_distance, by_feature = (
            otam_model(SHOT_POOL=pool).match(support, query, no_text(support)) for pool in ("distances", "features")
        )
        assert torch.allclose(by_distance, by_feature, atol=1e-5) == (shots == 1)


def test_the_published_settings_are_the_defaults():
    options = OtamOptions()
    assert (options.BACKBONE, options.WEIGHTS, options.MATCHER) == ("resnet50", "imagenet", "otam")
    assert (options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS, options.SHOT_POOL) == (0.1, True, "distances")


def test_orderless_matchers_pool_features_by_default():
    assert {matcher: OtamOptions(MATCHER=matcher).SHOT_POOL for matcher in ("otam", "bi-mhm", "mean")} == {
        "otam": "distances", "bi-mhm": "features", "mean": "features",
    }  # fmt: skip
    assert OtamOptions(MATCHER="mean", SHOT_POOL="distances").SHOT_POOL == "distances"
    for shots in (1, 5):
        support, query = random_features(2, 3, shots, 4, 6), random_features(2, 4, 4, 6)
        for matcher in ("bi-mhm", "mean"):
            by_default, by_feature, by_distance = (
                otam_model(MATCHER=matcher, **pool).match(support, query, no_text(support))
                for pool in ({}, {"SHOT_POOL": "features"}, {"SHOT_POOL": "distances"})
            )
            assert torch.equal(by_default, by_feature)
            assert torch.equal(by_default, by_distance) == (shots == 1)


@pytest.mark.parametrize("matcher", ["otam", "bi-mhm"])
def test_frames_may_be_compared_by_distance_correlation(matcher):
    torch.manual_seed(0)
    model = otam_model(MATCHER=matcher, FRAME_SIMILARITY="distance-correlation", DC_WIDTH=4, SHOT_POOL="distances")
    with torch.no_grad():
        frames = torch.rand(3, 2, 3, 64, 64)
        maps = model.reduce(model.encoder.feature_maps(frames).flatten(2, 3))
        encoded = model.encode(frames)
        scores = model.score(encoded[:2][None, :, None], encoded[None, 2:], torch.zeros(1, 2, 1))
    for n in range(2):
        correlations = [[literal_distance_correlation(q, s, 0.5) for s in maps[n]] for q in maps[2]]
        distances = 1 - torch.tensor(correlations) / 1.01  # unit vectors, and the 0.01 beside the product of norms
        literal = literal_bi_mhm(distances)
        if matcher == "otam":
            literal = literal_otam(distances, 0.1) + literal_otam(distances.T, 0.1)
        assert scores[0, 0, n].item() == pytest.approx(-literal, abs=1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "distance-correlation"])
def test_matchers_can_use_the_side_network_as_encoder(similarity):
    side = {"WIDTH": 16, "HEAD_DIM": 8}
    options = {"BACKBONE": "tiny-vit", "CLIP_WEIGHTS": "random", "ADAPTER": "side-network", "SIDE": side}
    model = models.build("otam", 32, MATCHER="bi-mhm", FRAME_SIMILARITY=similarity, **options).train()
    features = model.encode(torch.rand(3, 2, 3, 32, 32))
    assert features.shape == (3, 2, 16 if similarity == "cosine" else 16 * 17 // 2)
    model.score(features[:2][None, :, None], features[None, 2:], torch.zeros(1, 2, 1))[0, 0, 0].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("adapter.") for name in trained)
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in trained)


def test_the_text_tower_is_neither_used_nor_kept():
    model = otam_model()
    text = model.class_text(["clap", "jump"])
    assert (text.shape, text.dtype, text.any().item()) == ((2, 1), torch.float32, False)
    assert model.encoder._text_tower == []
    model.drop_text_tower()


@pytest.mark.parametrize("backbone", ["resnet18", "tiny"])
def test_an_imagenet_resnet_and_a_clip_tower_both_train(backbone):
    torch.manual_seed(0)
    options = OtamOptions(NAME="otam", BACKBONE=backbone, WEIGHTS="random", CLIP_WEIGHTS="random")
    model = Otam(options, IMAGE_SIZE).train()
    features = model.encode(random_features(3, 2, 3, IMAGE_SIZE, IMAGE_SIZE))
    scores = model.match(features[:2][None, :, None], features[None, 2:], torch.zeros(1, 2, 1))
    scores[0, 0, 0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert (model.pixel_mean, model.pixel_std) == (model.encoder.pixel_mean, model.encoder.pixel_std)


def test_otam_uses_the_encoder_that_the_backbone_names(monkeypatch):
    class Encoder(nn.Linear):
        pixel_mean, pixel_std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)

    monkeypatch.setattr(models.backbones, "frame_encoder", lambda options, image_size: Encoder(image_size, 5))
    model = Otam(OtamOptions(), 4)
    assert model.encode(torch.zeros(2, 3, 4)).shape == (2, 3, 5)
    assert (model.pixel_mean, model.pixel_std) == (Encoder.pixel_mean, Encoder.pixel_std)


# The zero-shot row


@pytest.fixture
def zero_shot() -> ZeroShot:
    return ZeroShot(ClipMethodOptions(NAME="zeroshot", **TINY), IMAGE_SIZE)


def test_zero_shot_scores_equal_the_cosine_of_mean_frame_and_text(zero_shot):
    support, query, text = random_features(2, 3, 1, 4, 6), random_features(2, 2, 4, 6), random_features(2, 3, 6)
    scores = zero_shot.match(support, query, text)
    assert scores.shape == (2, 2, 3)
    for b in range(2):
        for q in range(2):
            for n in range(3):
                x, w = query[b, q].double().mean(dim=0).tolist(), text[b, n].tolist()
                product = sum(x_i * w_i for x_i, w_i in zip(x, w, strict=True))
                norms = math.sqrt(sum(x_i**2 for x_i in x)) * math.sqrt(sum(w_i**2 for w_i in w))
                assert scores[b, q, n].item() == pytest.approx(product / norms, abs=1e-5)


def test_zero_shot_ignores_support_videos(zero_shot):
    query, text = random_features(1, 2, 4, 6), random_features(1, 3, 6)
    no_video = torch.full((1, 3, 1, 4, 6), float("nan"))
    assert torch.equal(zero_shot.match(no_video, query, text), zero_shot.match(torch.ones(1, 3, 5, 4, 6), query, text))


def test_zero_shot_scores_do_not_depend_on_feature_norms(zero_shot):
    support, query, text = random_features(1, 3, 1, 4, 6), random_features(1, 2, 4, 6), random_features(1, 3, 6)
    expected = zero_shot.match(support, query, text)
    torch.testing.assert_close(zero_shot.match(support, 1e-3 * query, 1e3 * text), expected)


def test_zero_shot_trains_no_parameter_and_updates_no_statistic(zero_shot):
    before = {key: value.clone() for key, value in zero_shot.state_dict().items()}
    features = zero_shot.train().encode(random_features(2, 4, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert not features.requires_grad
    assert not [key for key, parameter in zero_shot.named_parameters() if parameter.requires_grad]
    assert not [module for module in zero_shot.modules() if module.training]
    assert before.keys() == zero_shot.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in zero_shot.state_dict().items())
