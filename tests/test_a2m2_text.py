"""The class text in A2M2: its term in the score and in the weights of candidates, and which backbones have it."""

import pytest
import torch
from torch import Tensor

from models.clip_fsar import ClipTowers
from models.model_a2m2 import A2m2, A2m2Options
from tests.helpers.a2m2 import IMAGE_SIZE, build, random_tensor
from utils.errors import UserError
from utils.schema import ModelOptions


def of_videos(model: A2m2) -> tuple[Tensor, Tensor, Tensor]:
    """Returns support and query of one episode with 3 classes, and the class texts."""
    candidates = model.encode(random_tensor(5, 4, 3, IMAGE_SIZE, IMAGE_SIZE))
    return candidates[None, :3, None], candidates[None, 3:], model.class_text(["clap", "ride a bike", "jump"])[None]


@torch.no_grad()
def test_the_text_score_adds_a_cosine_to_the_visual_score():
    with_text, without = build(TEXT_WEIGHT=0.4), build()
    without.load_state_dict({key: value for key, value in with_text.state_dict().items() if "to_text" not in key})
    support, query, text = of_videos(with_text)
    frames = random_tensor(5, 4, 3, IMAGE_SIZE, IMAGE_SIZE)
    visual_support, visual_query, no_text = of_videos(without)
    assert no_text.shape == (1, 3, 1)
    visual = without.score(visual_support, visual_query, no_text)
    videos = with_text.to_text(with_text.backbone_features(frames).mean(dim=(1, 2, 3)))[3:]
    cosines = torch.stack([torch.stack([v @ t / (v.norm() * t.norm() + 0.01) for t in text[0]]) for v in videos])
    added = with_text.score(support, query, text) - visual
    torch.testing.assert_close(added[0], 50 * 0.4 * cosines, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_guidance_weights_candidates_by_class_text():
    model = build(TEXT_GUIDANCE=True)
    support, query, text = of_videos(model)
    scores = model.score(support, query, text)
    other = text.clone()
    other[:, 1] = text[:, 2]
    changed = (model.score(support, query, other) != scores).any(dim=1)[0]
    assert changed.tolist() == [False, True, False]
    plain = build()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "A2.text.weight"})
    model.A2.text.weight.zero_()
    assert torch.equal(model.score(support, query, text), plain.score(support, query, torch.zeros(1, 3, 1)))


def test_every_parameter_of_the_text_terms_has_a_gradient():
    model = build(TEXT_WEIGHT=0.4, TEXT_GUIDANCE=True).train()
    support, query, text = of_videos(model)
    model.drop_text_tower()
    model.score(support, query, text)[0, 0, 0].backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["RN50", "ViT-B-32"])
def test_the_text_projection_equals_the_towers_for_equal_positions(backbone):
    """An attention pool attends equally to positions with equal features."""
    torch.manual_seed(0)
    towers = ClipTowers(ModelOptions(BACKBONE=backbone, CLIP_WEIGHTS="random"), 64).eval()
    layer, feature = towers.text_projection(), random_tensor(2, 2048 if backbone == "RN50" else 768)
    if backbone == "RN50":
        towers.visual.attnpool.positional_embedding.zero_()
        expected = towers.visual.attnpool(feature[:, :, None, None].expand(-1, -1, 2, 2))
    else:
        expected = feature @ towers.visual.proj
    torch.testing.assert_close(layer(feature), expected, rtol=1e-4, atol=1e-5)


def test_text_options_refuse_unsuitable_backbones_and_settings():
    with pytest.raises(UserError, match="resnet18 has no text tower"):
        build(TEXT_WEIGHT=1.0, BACKBONE="resnet18", WEIGHTS="random")
    with pytest.raises(ValueError, match=r"MODEL\.TEXT_GUIDANCE"):
        A2m2Options(TEXT_GUIDANCE=True, ADAPTIVE=False)
