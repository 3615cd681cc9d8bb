"""Plug-ins of the image tower: they see whole videos, change only what they override, and keep CLIP's names."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import models
from models.base import Episode, EpisodeLabels, FewShotModel
from models.clip_fsar import ClipTowers
from models.frame_tower import FrameTower
from models.tower_plugin import TemporalEmbedding, TowerPlugin, each_frame
from run.encoder import Encoder
from tests.helpers.methods import build
from tests.helpers.shipped import ON_VIT, ROOT
from tests.helpers.small_towers import frames, tower
from utils.errors import UserError
from utils.schema import ModelOptions

BLOCKS = 4  # of the small ViT


class Mixing(TowerPlugin):
    """A temporal layer before the blocks and one after each, so that frames interact."""

    def __init__(self, visual) -> None:
        super().__init__(visual)
        torch.manual_seed(1)
        width = visual.transformer.width
        self.seen: list[tuple[int, ...]] = []
        self.positions = nn.Parameter(0.1 * torch.randn(2, 1, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in visual.transformer.resblocks)

    def before_blocks(self, tokens: Tensor) -> Tensor:
        return tokens + self.positions

    def block(self, number: int, block, tokens: Tensor) -> Tensor:
        self.seen.append((number, *tokens.shape))
        tokens = each_frame(block, tokens)
        return tokens + self.layers[number - 1](tokens.flip(1))


class Levels(TowerPlugin):
    """Keeps the class token of each level: [V, T, 1+BLOCKS, C]."""

    def read(self, visual, levels) -> Tensor:
        return torch.stack([tokens[:, :, 0] for tokens in levels], dim=2)


def plugged(plugin: type[TowerPlugin] = Mixing, **options: object) -> FrameTower:
    """Returns a small ViT with a plug-in, which is stored as in a method."""
    encoder = tower("ViT", **options)
    encoder.kept = encoder.attach(plugin)
    return encoder


def gradients(encoder: FrameTower) -> dict[str, Tensor]:
    encoder.zero_grad()
    encoder(frames()).square().sum().backward()
    return {name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None}


def test_an_empty_plugin_changes_neither_features_nor_names():
    plain, encoder = tower("ViT"), plugged(TowerPlugin)
    assert torch.equal(encoder(frames()), plain(frames()))
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert encoder.width == 8


def test_a_plugin_receives_whole_videos_at_each_block():
    encoder = plugged()
    videos = frames(3)
    features = encoder(videos)
    assert encoder.kept.seen == [(number, 3, 2, 5, 32) for number in range(1, BLOCKS + 1)]
    assert {name.partition(".")[0] for name in encoder.state_dict()} == {"visual", "kept"}
    other = videos.clone()
    other[0, 1] += 1
    moved = (encoder(other) - features).abs().amax(dim=-1) > 1e-4
    assert moved.tolist() == [[True, True], [False, False], [False, False]]


@torch.no_grad()
def test_levels_are_the_tokens_after_ln_pre_and_after_each_block():
    encoder, plain = plugged(Levels), tower("ViT")
    found = encoder(frames())
    kept: list[Tensor] = []
    for module in (plain.visual.ln_pre, *plain.visual.transformer.resblocks):
        module.register_forward_hook(lambda _, __, output: kept.append(output[:, 0]))
    plain(frames())
    assert torch.equal(found, torch.stack(kept, dim=1).unflatten(0, (2, 2)))


@torch.no_grad()
def test_a_temporal_embedding_is_interpolated_between_the_middles_of_its_frames():
    time = TemporalEmbedding(4, 1)
    time.embedding.copy_(torch.arange(4.0).view(1, 4, 1))
    eight = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    for expected in ([1.5], [0.5, 2.5], [0, 1, 2, 3], eight):
        found = time(torch.ones(2, len(expected), 3, 1))
        assert found[1, :, 2, 0].tolist() == pytest.approx([1 + value for value in expected])


def test_freezing_the_tower_keeps_plugin_gradients():
    frozen, trained = (plugged(TRAINABLE=value) for value in ("head", "all"))
    found, expected = gradients(frozen), gradients(trained)
    assert {name.partition(".")[0] for name in found} == {"kept"}
    assert len(found) == 1 + 2 * BLOCKS
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_recomputing_blocks_keeps_gradients(trainable):
    saved = []
    for recompute in (False, True):
        encoder = plugged(TRAINABLE=trainable, ACTIVATION_CHECKPOINTING=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = encoder(frames()).square().sum()
        loss.backward()
        passes = len(encoder.kept.seen) / BLOCKS
        saved.append((sum(sizes), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
        assert passes == 1 + recompute
    (most, expected), (least, found) = saved
    assert least < most / 2
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


class Plugged(FewShotModel):
    """A method around a tower with a plug-in."""

    pixel_mean, pixel_std = (0.5,) * 3, (0.2,) * 3

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tower("ViT", TRAINABLE="head")
        self.adapter = self.encoder.attach(Mixing)

    def encode(self, frames: Tensor) -> Tensor:
        return self.encoder(frames)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("amp", [False, True])
def test_chunks_hold_whole_videos_and_keep_gradients(amp):
    clips = torch.randint(256, (4, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (0, 3):
        model = Plugged().train()
        features = Encoder(model, torch.device("cpu"), True, amp).backbone(clips, chunk)
        features.float().square().sum().backward()
        found.append((features, *(p.grad for p in model.adapter.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if amp else 1e-4, atol=1e-2 if amp else 1e-4)


@pytest.mark.parametrize("method", ON_VIT)
@pytest.mark.parametrize("amp", [False, True])
def test_memory_settings_keep_gradients_of_a_method_with_a_plugin(method, amp):
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(256, (5, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    found = []
    for chunk, recompute in ((0, False), (2, True)):
        model = build(method, ACTIVATION_CHECKPOINTING=recompute).train()
        text = model.class_text(["clap", "jump"])
        encoder = Encoder(model, torch.device("cpu"), True, amp)
        features = encoder.finish(encoder.backbone(clips, chunk))
        episode = Episode(features[:4].unflatten(0, (1, 2, 2)), features[None, 4:], text[None])
        labels = EpisodeLabels(torch.tensor([[1]]), torch.tensor([[0, 1]]), text)
        torch.manual_seed(0)
        model.training_losses(episode, labels, "inductive").total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, gradients_found = found
    assert gradients_found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = (0.05 if amp else 1e-4) * gradient.abs().max() + 1e-7
        assert (gradients_found[name] - gradient).abs().max() <= tolerance, name


def test_a_copied_method_uses_its_copy_of_the_plugin():
    model = Plugged()
    features = model.encode(frames())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.adapter.positions.add_(1)
    assert torch.equal(model.encode(frames()), features)
    assert not torch.equal(other.encode(frames()), features)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [("RN", {}, "MODEL.BACKBONE is RN"), ("tiny", {}, "tiny-vit"), ("ViT", {"COMPILE": True}, "MODEL.COMPILE is true")],
)
def test_an_unsupported_tower_refuses_plugins(kind, options, named):
    with pytest.raises(UserError, match=named):
        tower(kind, **options).attach(TowerPlugin)


def test_the_documented_plugin_trains_in_a_frozen_tower():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    namespace: dict[str, type[TowerPlugin]] = {}
    exec(code, namespace)
    found = gradients(plugged(namespace["TemporalShift"], TRAINABLE="head"))
    assert len(found) == 2 * BLOCKS


# The small ViT of the demo


def test_tiny_vit_is_clips_vision_transformer_with_the_texts_of_tiny():
    texts = []
    for backbone in ("tiny", "tiny-vit"):
        model = models.build("clipfsar", 64, BACKBONE=backbone, CLIP_WEIGHTS="random", FREEZE_BN=False)
        texts.append(model.class_text(["clap"]))
        assert model.encode(torch.rand(1, 2, 3, 64, 64)).shape == (1, 2, 128)
    assert torch.equal(*texts)
    visual = ClipTowers(ModelOptions(BACKBONE="tiny-vit", CLIP_WEIGHTS="random"), 32).visual
    assert visual.grid_size == (8, 8)
    with pytest.raises(UserError, match=r"DATA\.IMG_SIZE: the backbone tiny-vit needs a multiple of 8, found 33"):
        ClipTowers(ModelOptions(BACKBONE="tiny-vit", CLIP_WEIGHTS="random"), 33)
    with pytest.raises(UserError, match="tiny-vit has no such weights"):
        ClipTowers(ModelOptions(BACKBONE="tiny-vit"), 32)
