"""TS-FSAR: the features of the released code, and its equations written out video by video.

Shapes: N ways, K shots, Q queries, V videos, T frames, d width of the side network, D width of CLIP's features.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from benchmarks.released_fixtures import Fixtures, SmallClip, encoded
from benchmarks.released_heads import HEADS
from models.base import Episode, EpisodeLabels
from models.model_tsfsar import TsFsar, TsFsarOptions, resized
from models.released import our_names
from models.side_network import SideNetwork, SideNetworkOptions, reduced, temporal_blocks
from run import convert
from run.solver import trained_groups
from tests.helpers.methods import build
from tests.helpers.released import released_state
from utils.errors import UserError
from utils.schema import Config

FOLDER = Path(__file__).parent / "fixtures" / "zoo"
SIZES = {"WIDTH": 16, "HEAD_DIM": 8}


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    return Fixtures(FOLDER, HEADS["tsfsar"])


@pytest.fixture(scope="module")
def model() -> TsFsar:
    model = build("tsfsar")
    model.set_training_classes(7)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


# --- against the release ------------------------------------------------------------------------------------


@torch.no_grad()
def test_frame_features_equal_the_released_code(fixtures):
    model = fixtures.build()
    frames = torch.cat([fixtures.tensor("s1q1.support"), fixtures.tensor("s1q1.query")])
    parts = model.side.parts(model.encode(frames))
    for found, key in (
        (parts.token[:, 0], "lsn_cls"),  # of the first frame of each video
        (parts.distances[0, 0], "alpha_d_first"),
        (parts.distances[-1, -1], "alpha_d_last"),
    ):
        released = fixtures.tensor(f"s1q1.eval.{key}")
        assert (found - released).abs().max() < 1e-5 * released.abs().max(), key
    tower = SmallClip(fixtures.rule)
    torch.testing.assert_close(tower(frames[:, :1])[:, 0], fixtures.tensor("s1q1.eval.clip_cls"), rtol=1e-4, atol=1e-4)


def test_initial_weights_equal_the_released_code(fixtures):
    options = TsFsarOptions(NAME="tsfsar", SIDE={"WIDTH": 128, "TEMPORAL_BLOCKS": [1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.clip_fsar.ClipTowers", lambda *_: SmallClip(fixtures.rule))
        state = TsFsar(options, 32).state_dict()
    keys = [key for key in fixtures.arrays if key.startswith("init.")]
    assert len(keys) == 8
    for key in keys:
        released = fixtures.tensor(key)
        (ours,) = our_names(f"model.{key.removeprefix('init.')}", TsFsar.released)
        found = state[ours][: len(released)]
        scale, tolerance = released.abs().max(), 2e-4
        if ".mlp." in key:  # the release's solver for this size is randomised: its last components are approximate
            first = slice(16) if "fc1" in key else slice(None)
            found, released, tolerance = found[..., first], released[..., first], 1e-2
        assert (found - released).abs().max() < tolerance * scale, key


def test_features_in_bf16_change_scores_by_less_than_a_hundredth(fixtures):
    model = fixtures.build()
    episode, _ = fixtures.episode("s1q1", "eval")
    support, query, text = encoded(model, episode)
    exact = model.score(support, query, text)
    rounded = model.score(support.bfloat16(), query.bfloat16(), text)
    assert torch.equal(exact.argmax(-1), rounded.argmax(-1))
    assert 0 < (exact - rounded).abs().max() < 1e-2


# --- equations ----------------------------------------------------------------------------------------------


def literal_distances(class_token: Tensor, patches: Tensor, power: float) -> list[float]:
    """Returns v of one frame: [d] and [L, d] -> d (d + 1) / 2 numbers."""
    weighted = [[float(F.cosine_similarity(class_token, p, dim=0) * x) for x in p] for p in patches]
    length, width = patches.shape
    a = [[0.0] * width for _ in range(width)]
    for k in range(width):
        for m in range(width):
            square = sum((weighted[p][k] - weighted[p][m]) ** 2 for p in range(length))
            a[k][m] = (square / (2 * length) + 1e-5) ** power
    rows = [sum(row) / width for row in a]
    grand = sum(rows) / width
    return [a[k][m] - rows[k] - rows[m] + grand for k in range(width) for m in range(k, width)]


def literal_cosine(a: Tensor, b: Tensor, epsilon: float = 0.0) -> Tensor:
    return (a @ b) / (a.norm() * b.norm() + epsilon)


@torch.no_grad()
@pytest.mark.parametrize("frames", [8, 5])
def test_scores_equal_the_method_written_out_query_by_query(model, frames):
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(3 * 2 + 2, frames, 3, 32, 32, generator=generator)
    text = torch.randn(1, 3, 128, generator=generator)
    encoded = model.encode(videos)
    support, query = encoded[:6].unflatten(0, (1, 3, 2)), encoded[None, 6:]
    found = model.score(support, query, text)[0]
    options, parts = model.options, model.side.parts
    side = SideNetwork.climb
    tokens, clip = {}, {}

    def spy(network, levels):
        out = side(network, levels)
        tokens["x"], clip["x"] = out
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideNetwork, "climb", spy)
        model.encode(videos)
    first = tokens["x"][0, 0]
    expected = literal_distances(first[0], first[1:], options.DC_ALPHA)
    torch.testing.assert_close(parts(encoded).distances[0, 0], torch.tensor(expected), rtol=1e-3, atol=1e-5)
    visual = model.clip.visual
    s, q = parts(support[0]), parts(query[0])
    clip_features = visual.ln_post(clip["x"][:, :, 0]) @ visual.proj
    context = torch.stack([video.mean(dim=0) for video in s.token.flatten(0, 1)]).mean(dim=0)
    for j in range(2):
        matrix = model.generate(q.token[j].mean(dim=0) + context).reshape(1, 1, 8, 8)
        weights = resized(matrix, (frames, frames))[0, 0]
        m = torch.zeros(3)
        for c in range(3):
            prototype = (s.distances[c, 0] + s.distances[c, 1]) / 2
            for t in range(frames):
                for r in range(frames):
                    m[c] += weights[t, r] * literal_cosine(q.distances[j, t], prototype[r], 0.01)
        e = clip_features[6 + j]
        adapted = 0.4 * e + 1.6 * model.side.adapter.attention(model.side.adapter.norm(e))
        u = model.side.to_text(model.side.text_norm(q.token[j])).mean(dim=0)
        by_clip = torch.stack([100 * literal_cosine(adapted.mean(dim=0), w) for w in text[0]])
        by_side = torch.stack([100 * literal_cosine(u, w) for w in text[0]])
        fused = m.softmax(0) ** 0.5 * by_clip.softmax(0) ** 0.1 * by_side.softmax(0) ** 0.4
        torch.testing.assert_close(found[j], fused.log(), rtol=1e-3, atol=1e-3)


def test_frame_pair_weights_keep_their_sum_for_other_lengths():
    weights = torch.ones(1, 1, 8, 8)
    for size in ((16, 4), (4, 4), (16, 24)):
        assert resized(weights, size).sum().item() == pytest.approx(64)
    assert resized(weights, (8, 8)) is weights


def test_losses_equal_their_definitions(model):
    generator = torch.Generator().manual_seed(1)
    width = sum(model.side.sizes)
    episode = Episode(
        torch.randn(1, 2, 1, 8, width, generator=generator),
        torch.randn(1, 1, 8, width, generator=generator),
        torch.randn(1, 2, 128, generator=generator),
    )
    all_text = torch.randn(7, 128, generator=generator)
    labels = EpisodeLabels(torch.tensor([[1]]), torch.tensor([[4, 2]]), all_text)
    with torch.no_grad():
        losses = model.training_losses(episode, labels, "inductive").losses
        videos = model.side.parts(torch.cat([episode.support[0, :, 0], episode.query[0]]))
        text = F.normalize(all_text, dim=-1)
        sums = dict.fromkeys(("side_text", "adapted_text", "class", "divergence"), 0.0)
        for v, label in enumerate((4, 2, 2)):
            p = (100 * text @ F.normalize(videos.adapted[v].mean(dim=0), dim=0)).double()
            side = (100 * text @ F.normalize(videos.side[v].mean(dim=0), dim=0)).double()
            z = (model.classify.weight @ videos.distances[v].mean(dim=0)).double()
            sums["side_text"] -= 4.0 * math.log(side.softmax(0)[label])
            sums["adapted_text"] -= 0.01 * math.log(p.softmax(0)[label])
            sums["class"] -= 2.0 * math.log(z.softmax(0)[label])
            first, second = (p / 4).softmax(0), (z / 4).softmax(0)
            sums["divergence"] += 0.01 * 16 * float((first * (first / second).log()).sum())
    for name, value in sums.items():
        assert losses[name].item() == pytest.approx(value / 3, rel=1e-3), name


def test_the_divergence_trains_adapted_clip_unless_detached():
    moved = []
    for detach in (False, True):
        model = build("tsfsar", DETACH_ADAPTED=detach, LOSSES={"FRAMES": 0.0, "CLASS": 0.0, "SIDE": 0.0})
        model.set_training_classes(7)
        width = sum(model.side.sizes)
        features = torch.randn(1, 3, 8, width, generator=torch.Generator().manual_seed(2)).requires_grad_()
        episode = Episode(features[:, :2, None], features[:, 2:], torch.randn(1, 2, 128))
        labels = EpisodeLabels(torch.tensor([[0]]), torch.tensor([[1, 3]]), torch.randn(7, 128))
        losses = model.training_losses(episode, labels, "inductive").losses
        (gradient,) = torch.autograd.grad(losses["divergence"], features)
        moved.append(bool(model.side.parts(gradient).adapted.any()))
    assert moved == [True, False]


# --- the side network ---------------------------------------------------------------------------------------


def test_without_gate_each_level_is_replaced_by_clips():
    """For a_i = 0 the network returns r(LayerNorm f) of the last level, for a_i = 1 that of no level but the first."""
    model = build("tsfsar").eval()
    frames = torch.rand(1, 2, 3, 32, 32)
    with torch.no_grad():
        levels = list(torch.randn(4, 1, 2, 65, 64, generator=torch.Generator().manual_seed(3)))
        for gate in model.side.gates:
            gate.fill_(-100.0)
        tokens, last = model.side.climb(iter(levels))
        expected = model.side.reduce[3](model.side.norms[3](levels[3]))
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(last, levels[3])
        for gate in model.side.gates:
            gate.fill_(100.0)
        before = model.side.climb(iter(levels))[0]
        torch.testing.assert_close(model.side.climb(iter([levels[0], *torch.randn(3, 1, 2, 65, 64)]))[0], before)
    assert model.encode(frames).shape == (1, 2, sum(model.side.sizes))


def test_temporal_blocks_equal_the_release_for_twelve_blocks():
    assert temporal_blocks(SideNetworkOptions(), 12) == [6, 8, 10]
    assert temporal_blocks(SideNetworkOptions(), 3) == [1]
    assert temporal_blocks(SideNetworkOptions(TEMPORAL_BLOCKS=[]), 12) == []


def test_the_frozen_tower_has_no_gradient_and_does_not_change(model):
    loss = model.train().encode(torch.rand(1, 2, 3, 32, 32)).square().mean()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.clip.visual.parameters())
    assert all(not parameter.requires_grad for parameter in model.clip.visual.parameters())
    model.eval().zero_grad()


def test_the_four_groups_use_the_configured_rates():
    model = build("tsfsar", RATES={"HEAD": 1.0, "GENERATOR": 0.5, "ADAPTER": 0.25})
    model.set_training_classes(7)
    groups = trained_groups(model)
    assert {group.name: group.lr_factor for group in groups} == {
        "side network": 1.0, "head": 1.0, "generator": 0.5, "adapter": 0.25,
    }  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    heads = {names[id(parameter)] for parameter in groups[1].parameters}
    assert heads == {"side.text_norm.weight", "side.text_norm.bias", "side.to_text.weight", "classify.weight"}
    assert all(names[id(parameter)].startswith("side.") for parameter in groups[0].parameters)


def test_a_reduced_weight_contains_the_principal_components():
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(4))
    whole = reduced(weight, torch.Size((12, 6)))
    centred = weight - weight.mean(dim=0)
    torch.testing.assert_close(whole @ whole.T, centred @ centred.T)  # all components: a rotation
    assert (whole.T @ whole - torch.diag(whole.square().sum(dim=0))).abs().max() < 1e-4
    assert (whole.square().sum(dim=0).diff() <= 0).all()
    torch.testing.assert_close(reduced(weight, torch.Size((5, 3))), whole[:5, :3])
    torch.testing.assert_close(reduced(weight.T, torch.Size((3, 5))), whole[:5, :3].T)
    with pytest.raises(ValueError, match="too few principal components"):
        reduced(weight, torch.Size((12, 7)))


@pytest.mark.parametrize(
    ("side", "part"),
    [
        ({"WIDTH": 65, "HEAD_DIM": 13}, "MODEL.SIDE.WIDTH is 65"),
        ({"WIDTH": 64, "MLP_RATIO": 5.0}, "MODEL.SIDE.INITIALISE"),
        ({"WIDTH": 16, "HEAD_DIM": 5}, "multiple of HEAD_DIM"),
        ({**SIZES, "TEMPORAL_BLOCKS": [3]}, "blocks 0 to 2"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_tower_are_refused(side, part):
    tiny = {"BACKBONE": "tiny-vit", "CLIP_WEIGHTS": "random"}
    with pytest.raises(UserError, match=part):
        models.build("tsfsar", 32, SIDE=side, **tiny)
    if "INITIALISE" in part:
        models.build("tsfsar", 32, SIDE={**side, "INITIALISE": "random"}, **tiny)


def test_a_feed_forward_layer_is_at_least_one_feature_wide():
    model = build("tsfsar", SIDE={**SIZES, "MLP_RATIO": 0.01})
    assert {block.expand.out_features for block in model.side.blocks} == {1}


def test_damaged_backbone_weights_are_refused_at_initialisation(monkeypatch):
    monkeypatch.setattr("models.side_network.reduced", lambda values, shape: torch.full(shape, math.nan))
    with pytest.raises(UserError, match=r"MODEL\.SIDE\.INITIALISE.*not finite"):
        build("tsfsar")


# --- released files -----------------------------------------------------------------------------------------


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the file that the released code saves: its tower has the names of Hugging Face's transformers."""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1": "embeddings.patch_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layernorm",
        "ln_post": "post_layernorm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "transformer.resblocks": "layers",
    }
    found = {"model.embeddings.position_ids": torch.arange(65)[None], "model.Linear.weight": torch.zeros(7, 136)}
    for name, value in reversed(state.items()):  # key, value, query: in transformers they have another order too
        if name == "proj":
            found["model.projection.weight"] = value.T
        elif "in_proj" in name:
            block, kind = name.split(".")[2], name.rpartition("_")[2]
            parts = dict(zip("qkv", value.chunk(3), strict=True))
            found |= {f"model.layers.{block}.self_attn.{p}_proj.{kind}": parts[p] for p in "kvq"}
        else:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            found[f"model.{name}"] = value
    return found


def test_a_released_file_with_a_transformers_tower_keeps_its_scores(tmp_path, monkeypatch):
    model = build("tsfsar", SIDE={"WIDTH": 64, "HEAD_DIM": 64}).eval()  # no shape shows the width of a head
    tower = dict(model.clip.visual.state_dict())
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("clip.")}
    state = published(tower) | released_state(rest, TsFsar.released)
    path, ours = tmp_path / "model_best.pth", tmp_path / "ours.pt"
    torch.save(state, path)
    monkeypatch.setattr("sys.argv", ["convert.py", str(path), str(ours)])
    convert.main()
    for file in (path, ours):
        again = models.build(model.options.model_copy(update={"CLIP_WEIGHTS": "random"}), 32)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.fill_(0.5)
        models.load_weights_from(file, again, Config())
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    torch.save({name: value for name, value in state.items() if "layers.1.self_attn.k_proj.bias" not in name}, path)
    ours.unlink()
    with pytest.raises(UserError, match=r"in_proj_bias"):
        convert.main()
