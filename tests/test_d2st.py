"""D2ST-Adapter: its attention against a literal loop, its start, and where it fits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from benchmarks.parity import relative_difference
from benchmarks.released_fixtures import Fixtures
from benchmarks.released_heads import HEADS
from models.adapter_d2st import (
    STAGE_PATHWAYS,
    VIT_PATHWAYS,
    D2stAdapter,
    D2stAdapterOptions,
    DeformableAttention,
    samples,
)
from tests.helpers.shipped import ROOT
from utils.errors import UserError

TINY = {"BACKBONE": "tiny-vit", "CLIP_WEIGHTS": "random"}
GRID = (8, 8)


def frames(count: int = 8) -> Tensor:
    return torch.rand(2, count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(method: str = "d2st", **options: object) -> models.FewShotModel:
    torch.manual_seed(0)
    return models.build(method, 32, **TINY, **options)


def test_samples_and_gradients_equal_grid_sample():
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(3, 5, 6, 7, 4, generator=generator, requires_grad=True)
    positions = (2.6 * torch.rand(3, 9, 3, generator=generator) - 1.3).requires_grad_()  # some of them outside
    grid = positions.flip(-1)[:, :, None, None]
    expected = F.grid_sample(volume.movedim(-1, 1), grid, align_corners=True).flatten(2).mT
    found = samples(volume, positions)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), [volume, positions]),
        torch.autograd.grad((expected * weights).sum(), [volume, positions]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_deformable_attention_equals_a_literal_loop():
    torch.manual_seed(0)
    groups, width, time = 4, 16, 8
    c = width // groups
    attention = DeformableAttention(width, groups, VIT_PATHWAYS.spatial)
    tokens = torch.randn(1, time, 1 + 64, width)
    query = attention.to_query(tokens)[0]
    found = attention(tokens, GRID)[0]

    sampled = []
    for group in range(groups):
        part = slice(group * c, (group + 1) * c)
        maps = query[:, 1:, part].reshape(time, 8, 8, c).permute(3, 0, 1, 2)[None]
        cells = attention.look(maps)[0]
        sizes = cells.shape[1:]
        assert tuple(sizes) == (2, 2, 2)
        values = tokens[0, :, 1:, part].reshape(time, 8, 8, c).permute(3, 0, 1, 2)[None]
        of_group = []
        for cell in torch.cartesian_prod(*(torch.arange(size) for size in sizes)):
            hidden = F.gelu(attention.norm(cells[:, cell[0], cell[1], cell[2]]))
            offset = attention.move.weight[:, :, 0, 0, 0] @ hidden
            place = [
                (int(cell[axis]) + 0.5) / size * 2 - 1 + math.tanh(offset[axis]) * min(1, 2 / size)
                for axis, size in enumerate(sizes)
            ]
            grid = torch.tensor([place[2], place[1], place[0]]).view(1, 1, 1, 1, 3)
            of_group.append(F.grid_sample(values, grid, align_corners=True).flatten())
        sampled.append(torch.stack(of_group))
    patches = torch.cat(sampled, dim=1)
    key, value = attention.to_key(patches), attention.to_value(patches)
    for frame, token in ((0, 0), (3, 7), (7, 64)):
        mixed = []
        for group in range(groups):
            part = slice(group * c, (group + 1) * c)
            weights = (key[:, part] @ query[frame, token, part] / math.sqrt(c)).softmax(dim=0)
            mixed.append(weights @ value[:, part])
        torch.testing.assert_close(found[frame, token], attention.project(torch.cat(mixed)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_clip_shorter_than_the_kernel_repeats_its_last_frame():
    torch.manual_seed(0)
    attention = DeformableAttention(16, 4, VIT_PATHWAYS.spatial)
    queries = torch.randn(2, 4, 8, 8, 4)
    for count in (1, 3):
        repeated = queries[:, torch.arange(4).clamp(max=count - 1)]
        torch.testing.assert_close(attention.positions(queries[:, :count]), attention.positions(repeated))


@torch.no_grad()
def test_adapters_start_as_the_identity():
    model = build()
    plain = build("otam", TRAINABLE="head").encoder.visual
    expected = plain._pool(plain.transformer(plain._embeds(frames().flatten(0, 1))))[0]
    torch.testing.assert_close(model.encode(frames()).flatten(0, 1), expected)


@torch.no_grad()
def test_features_equal_the_released_ones():
    fixtures = Fixtures(ROOT / "tests" / "fixtures" / "zoo", HEADS["d2st"])
    model = fixtures.build()
    for part in ("support", "query"):
        found = model.encode(fixtures.tensor(f"s1q1.{part}"))
        assert relative_difference(found, fixtures.tensor(f"s1q1.eval.{part}_features")) < 1e-5


def test_only_the_adapters_and_the_layers_around_the_blocks_are_trained():
    model = build()
    trained = {name.split(".")[1] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"class_token", "time", "norm", "adapters"}
    late = build(D2ST={"BLOCKS": 1, "TRAIN_TOKENS": False})
    assert len(late.adapter.adapters) == 1
    reached: list[bool] = []
    for block in late.encoder.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, __, output: reached.append(output.requires_grad))
    late.train().encode(frames())
    assert reached == [False] * 3  # gradients start after the last block


def test_weight_decay_excludes_offset_norms():
    model = build()
    model.set_training_classes(7)
    others, norms = model.parameter_groups()
    assert norms.weight_decay == 0
    assert others.weight_decay is None
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(value)] for value in norms.parameters}
    assert found == {name for name in names.values() if ".spatial.norm." in name or ".temporal.norm." in name}
    assert len(norms.parameters) + len(others.parameters) == len(names)


@torch.no_grad()
def test_an_explanation_pairs_the_frames_that_the_score_compares():
    """Features may be short: no constant is added to the product of two lengths."""
    query, support = torch.tensor([[0.01, 0.0], [0.0, 0.01]]), torch.tensor([[0.01, 0.0], [10.0, 9.0]])
    model, arguments = build(), (support[None, None, None], query[None, None], torch.zeros(1, 1, 1))
    pairing = model.explain(*arguments).pairings["bi-mhm"]
    assert pairing.tolist() == [[[[[2.0, 1.0], [0.0, 1.0]]]]]
    distances = 1 - F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT
    torch.testing.assert_close((pairing * distances).sum(), -model.score(*arguments).sum())


@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_clips_of_any_length_are_encoded(count):
    model = build()
    nn.init.normal_(model.adapter.time.embedding)
    assert model.encode(frames(count)).shape == (2, count, 64)


def test_adapters_train_in_a_frozen_tower_with_another_matcher():
    model = build("otam", ADAPTER="d2st")
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"adapter"}
    assert model.encode(frames()).requires_grad
    with pytest.raises(UserError, match=r"MODEL\.ADAPTER is d2st, but otam pools the feature maps of the backbone"):
        model.encoder.drop_pooling()


def test_a_grid_smaller_than_the_kernels_and_another_backbone_are_refused():
    with pytest.raises(UserError, match=r"7 x 7 patches or more, found 2 x 2"):
        models.build("d2st", 64, BACKBONE="ViT-B/32", CLIP_WEIGHTS="random")
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE is tiny, but d2st adds layers"):
        models.build("d2st", 32, BACKBONE="tiny", CLIP_WEIGHTS="random")


@torch.no_grad()
def test_an_adapter_works_in_bf16():
    torch.manual_seed(0)
    adapter = D2stAdapter(32, D2stAdapterOptions(), VIT_PATHWAYS, outer_gelu=True)
    nn.init.normal_(adapter.up.weight, std=0.1)
    tokens = torch.randn(1, 8, 65, 32)
    expected = adapter(tokens, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter(tokens, GRID)
    assert (found - expected).abs().max() < 0.05


def test_on_a_resnet_the_adapters_follow_its_stages_and_start_as_the_identity():
    torch.manual_seed(0)
    on_resnet = {"BACKBONE": "resnet18", "WEIGHTS": "random"}
    model = models.build("d2st", 224, **on_resnet).eval()
    plain = models.build("otam", 224, **on_resnet).eval().encoder
    plain.load_state_dict(model.encoder.state_dict())
    video = torch.rand(1, 4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(video), plain(video), rtol=1e-4, atol=1e-4)
    assert [adapter.spatial.groups for adapter in model.adapter.adapters] == [1, 2, 4, 8]
    recomputed = models.build("d2st", 224, **on_resnet, ACTIVATION_CHECKPOINTING=True, D2ST={"BLOCKS": 1})
    nn.init.normal_(recomputed.adapter.adapters[0].up.weight)
    recomputed.encode(video).sum().backward()
    trained = {name: value for name, value in recomputed.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"adapter"}
    assert all(value.grad is not None for value in trained.values())
    with pytest.raises(UserError, match=r"DATA\.IMG_SIZE is 112, .*193 pixels"):
        models.build("d2st", 112, **on_resnet)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pathways", "side", "of_space", "of_time"),
    [(VIT_PATHWAYS, 14, (2, 4, 4), (8, 2, 2)),
     *zip(STAGE_PATHWAYS, (56, 28, 14, 7), ((2, 8, 8), (2, 4, 4), (2, 4, 4), (2, 2, 2)),
          ((8, 4, 4), (8, 2, 2), (8, 2, 2), (8, 1, 1)), strict=True)],
    ids=["ViT-B/16", "stage 1", "stage 2", "stage 3", "stage 4"],
)  # fmt: skip
def test_both_pathways_sample_equally_often_at_224_pixels(pathways, side, of_space, of_time):
    assert math.prod(of_space) == math.prod(of_time)
    for sampling, cells in ((pathways.spatial, of_space), (pathways.temporal, of_time)):
        found = DeformableAttention(2 * pathways.groups, pathways.groups, sampling)
        nn.init.zeros_(found.move.weight)  # samples stay in the centres of their cells
        positions = found.positions(torch.randn(1, 8, side, side, 2))[0]
        assert tuple(len(axis.unique()) for axis in positions.unbind(dim=-1)) == cells


@torch.no_grad()
def test_the_adapter_of_a_resnet_equals_its_equation():
    torch.manual_seed(0)
    adapter = D2stAdapter(32, D2stAdapterOptions(), STAGE_PATHWAYS[2], outer_gelu=False)
    nn.init.normal_(adapter.up.weight)
    patches = torch.randn(1, 8, 64, 32)
    inner = adapter.down(patches)
    volume = inner.reshape(1, 8, 8, 8, 8).movedim(-1, 1)
    inner = inner + adapter.place(volume).movedim(1, -1).flatten(2, 3)
    of_space = inner + adapter.spatial(adapter.spatial_norm(inner), GRID)
    of_time = inner + adapter.temporal(adapter.temporal_norm(inner), GRID)
    torch.testing.assert_close(adapter(patches, GRID), patches + adapter.up(F.gelu((of_space + of_time) / 2)))
