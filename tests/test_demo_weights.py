"""The committed weights of the tiny CLIP: how they were trained, and where they can be used."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import models
from episodes.demo.actions import OBJECTS
from episodes.demo.captions import captioned_frame
from models.demo_weights import DEMO_IMAGE_SIZE, DEMO_WEIGHTS, demo_clip, untrained_clip
from run.pretrain_demo import Recipe, batches_of, encode_text, main, pretrain
from utils.errors import UserError


def test_the_file_is_small_and_in_half_precision():
    assert DEMO_WEIGHTS.stat().st_size < 2_000_000
    with safe_open(DEMO_WEIGHTS, "pt") as file:
        types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert types == {torch.float16, torch.int32, torch.int64}


def test_the_first_steps_to_the_committed_weights_are_reproducible():
    with safe_open(DEMO_WEIGHTS, "pt") as file:
        note = file.metadata()
    recipe = Recipe()
    assert note["recipe"] == str(recipe)
    expected = [float(loss) for loss in note["first_losses"].split()[:2]]
    losses = islice(pretrain(untrained_clip(), batches_of(recipe), recipe), len(expected))
    assert list(losses) == pytest.approx(expected, rel=1e-3)


def test_text_features_do_not_depend_on_padding():
    clip = untrained_clip()
    tokens = next(batches_of(Recipe(steps=1, batch=8, frames=8))).tokens
    torch.testing.assert_close(encode_text(clip, tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_the_command_writes_weights_that_load(tmp_path: Path):
    main(["--steps", "1", "--out", str(tmp_path / "w.safetensors")])
    clip = demo_clip("tiny", DEMO_IMAGE_SIZE, tmp_path / "w.safetensors")
    before = untrained_clip().token_embedding.weight
    changed = (clip.token_embedding.weight != before).any(dim=1)
    assert 20 < changed.sum() < 200  # the words of captions, of 49,408


@torch.no_grad()
def test_class_texts_match_the_objects_in_frames():
    towers = models.build("zeroshot", BACKBONE="tiny", CLIP_WEIGHTS="demo", image_size=DEMO_IMAGE_SIZE).eval()
    captioned = [captioned_frame(seed=1, number=number) for number in range(300)]
    single = [(frame, words) for frame, words in captioned if " and " not in words]
    frames = torch.from_numpy(np.stack([frame[4:68, 4:68] for frame, _ in single])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (towers.pixel_mean, towers.pixel_std))
    videos = towers.encode(((frames - mean) / std).unsqueeze(1))
    scores = towers.score(torch.zeros(1), videos[None], towers.class_text([f"a {name}" for name in OBJECTS])[None])
    right = [OBJECTS[answer] in words.split() for answer, (_, words) in zip(scores[0].argmax(-1), single, strict=True)]
    assert np.mean(right) > 0.3  # by chance 0.125


@pytest.mark.parametrize(("backbone", "size"), [("tiny", 32), ("tiny-vit", 64)])
def test_other_backbones_and_sizes_are_refused(backbone: str, size: int):
    with pytest.raises(UserError, match=f"DATA.IMG_SIZE.*{backbone} and {size}"):
        models.build("zeroshot", BACKBONE=backbone, CLIP_WEIGHTS="demo", image_size=size)
