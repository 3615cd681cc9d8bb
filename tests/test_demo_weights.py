"""The committed weights of the small CLIPs: how they were trained, and where they can be used."""

from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import models
from episodes.demo.actions import OBJECTS
from episodes.demo.captions import captioned_frame
from models.tiny_clip import DEMO_IMAGE_SIZE, DEMO_WEIGHTS, demo_clip, untrained_clip
from run.demo_pretraining import RECIPES, Recipe, build_objective, draw_batches, encode_text, pretrain
from run.pretrain_demo import main
from utils.errors import UserError

each_backbone = pytest.mark.parametrize("backbone", list(DEMO_WEIGHTS))


@each_backbone
def test_the_file_is_small_and_in_half_precision(backbone: str):
    assert DEMO_WEIGHTS[backbone].stat().st_size < 2_000_000
    with safe_open(DEMO_WEIGHTS[backbone], "pt") as file:
        types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert types <= {torch.float16, torch.int32, torch.int64}


@each_backbone
def test_the_first_steps_to_the_committed_weights_are_reproducible(backbone: str):
    with safe_open(DEMO_WEIGHTS[backbone], "pt") as file:
        note = file.metadata()
    recipe = RECIPES[backbone]
    assert note["recipe"] == str(recipe)
    expected = [float(loss) for loss in note["first_losses"].split()[:2]]
    steps = pretrain(build_objective(backbone, untrained_clip(backbone)), draw_batches(recipe), recipe)
    assert list(islice(steps, len(expected))) == pytest.approx(expected, rel=1e-3)


def test_text_features_do_not_depend_on_padding():
    clip = untrained_clip("tiny")
    tokens = next(draw_batches(Recipe(steps=1, batch=8, frames=8))).tokens
    torch.testing.assert_close(encode_text(clip, tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)


@each_backbone
def test_the_command_writes_weights_that_load(tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, backbone, replace(RECIPES[backbone], batch=32))
    main(["--backbone", backbone, "--steps", "1", "--out", str(tmp_path / "w.safetensors")])
    clip = demo_clip(backbone, DEMO_IMAGE_SIZE, tmp_path / "w.safetensors")
    before = untrained_clip(backbone).token_embedding.weight
    changed = (clip.token_embedding.weight != before).any(dim=1)
    assert 20 < changed.sum() < 200  # the words of captions, of 49,408


def test_both_backbones_have_the_same_text_tower():
    texts = torch.tensor([[49406, 320, 2862, 49407] + 73 * [0]])
    features = [demo_clip(backbone, DEMO_IMAGE_SIZE).encode_text(texts) for backbone in DEMO_WEIGHTS]
    assert torch.equal(*features)


@cache
def single_objects() -> tuple[torch.Tensor, list[str]]:
    """Returns frames of one object each that training did not use, float32 [V, 3, H, W], 0 to 1, and their captions."""
    captioned = [captioned_frame(seed=1, number=number) for number in range(600)]
    frames, captions = zip(*((frame, words) for frame, words in captioned if " and " not in words), strict=True)
    cropped = np.stack(frames)[:, 4 : 4 + DEMO_IMAGE_SIZE, 4 : 4 + DEMO_IMAGE_SIZE]
    return torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 255, list(captions)


@pytest.mark.parametrize(("backbone", "share"), [("tiny", 0.35), ("tiny-vit", 0.25)])  # by chance 0.125
@torch.no_grad()
def test_class_texts_match_the_objects_in_frames(backbone: str, share: float):
    towers = models.build("zeroshot", BACKBONE=backbone, CLIP_WEIGHTS="demo", image_size=DEMO_IMAGE_SIZE).eval()
    frames, captions = single_objects()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (towers.pixel_mean, towers.pixel_std))
    videos = towers.encode(((frames - mean) / std).unsqueeze(1))
    scores = towers.score(torch.zeros(1), videos[None], towers.class_text([f"a {name}" for name in OBJECTS])[None])
    right = [OBJECTS[answer] in words.split() for answer, words in zip(scores[0].argmax(-1), captions, strict=True)]
    assert np.mean(right) > share


@pytest.mark.parametrize(("backbone", "size"), [("tiny", 32), ("tiny-vit", 32)])
def test_other_sizes_are_refused(backbone: str, size: int):
    with pytest.raises(UserError, match=f"DATA.IMG_SIZE.*{backbone} and {size}"):
        models.build("zeroshot", BACKBONE=backbone, CLIP_WEIGHTS="demo", image_size=size)


def test_a_backbone_without_demo_weights_is_refused():
    with pytest.raises(UserError, match=r"CLIP_WEIGHTS demo.*tiny-vit.*found ViT-B/16"):
        models.build("zeroshot", BACKBONE="ViT-B/16", CLIP_WEIGHTS="demo", image_size=224)
