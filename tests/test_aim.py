"""AIM's adapters: their equations, the released ones of Task-Adapter++, and other methods around them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import models
from benchmarks.parity import relative_difference
from benchmarks.released_fixtures import SmallClip, find_meta, normalised_frames, released_weight
from models.adapter_aim import AimAdapters, AimOptions, BlockAdapters, Bottleneck, attend
from tests.helpers.shipped import ROOT
from tests.helpers.small_towers import frames, tower

ZOO = ROOT / "tests" / "fixtures" / "zoo"
TINY = {"BACKBONE": "tiny-vit", "CLIP_WEIGHTS": "random"}
NAMES = {"t_adapter": "time", "s_adapter": "space", "MLP_adapter": "joint", "task_adapter": "task"}


class WithTask(BlockAdapters):
    """Adds the attention across the videos of a batch, which Task-Adapter has and this framework omits."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, ratio)
        self.task = Bottleneck(width, ratio)

    def over_space(self, block, tokens: Tensor) -> Tensor:
        tokens = super().over_space(block, tokens)
        attended = self.task(attend(block, rearrange(tokens, "v t l c -> (t l) v c")))
        return tokens + rearrange(attended, "(t l) v c -> v t l c", t=tokens.shape[1])


def released_tower(folder: Path, with_task: bool) -> tuple[SmallClip, dict[str, Tensor]]:
    """Returns the tower of the fixtures with adapters in its last two blocks, and the fixtures' numbers."""
    _, rule, _ = find_meta(folder, "taskadapterpp")
    clip = SmallClip(rule)
    adapters = clip.attach(partial(AimAdapters, options=AimOptions(BLOCKS=2)))
    if with_task:
        adapters.adapters = nn.ModuleList(WithTask(192, 0.25) for _ in range(2))
    state = {"time.embedding": "feature.temporal_embedding"}
    for number in range(2):
        for theirs, ours in NAMES.items():
            for layer, name in (("down", "D_fc1"), ("up", "D_fc2")):
                for part in ("weight", "bias"):
                    released = f"feature.transformer.resblocks.{number + 1}.{theirs}.{name}.{part}"
                    state[f"adapters.{number}.{ours}.{layer}.{part}"] = released
    weights = {ours: released_weight(name, rule["shapes"][name], rule) for ours, name in state.items()}
    adapters.load_state_dict({name: weights[name] for name in adapters.state_dict()})
    with np.load(folder / "taskadapterpp.npz") as archive:
        numbers = {key: torch.as_tensor(archive[key]) for key in archive.files}
    clip.kept = adapters
    return clip.eval(), numbers


@torch.no_grad()
def test_with_attention_across_videos_features_equal_task_adapter():
    clip, numbers = released_tower(ZOO, with_task=True)
    found = {part: clip(normalised_frames(numbers[f"s1q1.{part}"])) for part in ("support", "query")}
    for part, features in found.items():
        assert relative_difference(features, numbers[f"s1q1.eval.{part}_features"]) < 1e-5
    prototypes = torch.stack([found["support"][numbers["s1q1.sl"] == way].mean(dim=0) for way in range(5)])
    cosines = F.cosine_similarity(found["query"].mean(dim=1)[:, None], prototypes.mean(dim=1)[None], dim=-1)
    assert relative_difference(cosines, numbers["s1q1.eval.vis"]) < 1e-4


@torch.no_grad()
def test_without_attention_across_videos_each_video_is_independent():
    alone, numbers = released_tower(ZOO, with_task=False)
    videos = normalised_frames(numbers["s1q1.query"])
    torch.testing.assert_close(alone(videos)[:1], alone(videos[:1]))
    together, _ = released_tower(ZOO, with_task=True)
    assert (together(videos)[:1] - together(videos[:1])).abs().max() > 0.1


@torch.no_grad()
def test_adapters_start_as_the_identity():
    encoder = tower("ViT", TRAINABLE="head")
    encoder.kept = encoder.attach(partial(AimAdapters, options=AimOptions()))
    torch.testing.assert_close(encoder(frames()), tower("ViT")(frames()))


@torch.no_grad()
def test_the_adapter_beside_the_mlp_has_its_factor():
    found = {}
    for scale in (0.0, 0.5):
        encoder = tower("ViT", TRAINABLE="head")
        encoder.kept = encoder.attach(partial(AimAdapters, options=AimOptions(JOINT_SCALE=scale)))
        for adapter in encoder.kept.adapters:
            nn.init.normal_(adapter.joint.up.weight)
        found[scale] = encoder(frames())
    plain = tower("ViT")(frames())
    torch.testing.assert_close(found[0.0], plain)
    assert not torch.allclose(found[0.5], plain, atol=1e-3)


def test_gradients_stop_at_the_first_block_with_adapters():
    encoder = tower("ViT", TRAINABLE="head")
    encoder.kept = encoder.attach(partial(AimAdapters, options=AimOptions(BLOCKS=1, TRAIN_TOKENS=False)))
    reached: list[bool] = []
    for block in encoder.visual.transformer.resblocks:
        block.ln_2.register_forward_hook(lambda _, __, output: reached.append(output.requires_grad))
    encoder(frames()).sum().backward()
    assert reached == [False, False, False, True]
    assert set(encoder.kept.state_dict()) == {
        f"adapters.0.{part}.{layer}.{kind}"
        for part in ("time", "space", "joint")
        for layer in ("down", "up")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("method", ["otam", "trx", "hyrsm", "team", "d2st", "clipfsar", "clipmei", "clipspm", "cpm2c"])
def test_other_methods_train_adapters_in_a_frozen_tower(method):
    torch.manual_seed(0)
    model = models.build(method, 32, **TINY, ADAPTER="aim")
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert "adapter" in trained
    assert not trained & {"encoder", "clip"}
    assert model.encode(torch.rand(1, 3, 3, 32, 32)).requires_grad
    both = models.build(method, 32, **TINY, ADAPTER="aim", TRAINABLE="all")
    assert any(value.requires_grad for name, value in both.named_parameters() if ".visual." in name)
