"""CLIP-SPM equals its equations written out one number at a time; each of its modules can be off."""

import itertools

import pytest
import torch
from torch import Tensor

import models.clip_fsar
from benchmarks.released_fixtures import FakeTowers
from models.base import Episode
from models.clip_prompts import MotionOptions
from models.model_clipspm import ClipSpm, ClipSpmOptions
from tests.helpers.literal_clipspm import PROTOCOLS, SMALL_TRANSFORMER, LiteralClipSpm, labels_of


@pytest.fixture
def head(monkeypatch):
    """Builds CLIP-SPM without CLIP, for features of a given width, in evaluation mode: no dropout."""

    def build(width: int, **options) -> ClipSpm:
        monkeypatch.setattr(models.clip_fsar, "ClipTowers", lambda *_: FakeTowers(width))
        torch.manual_seed(0)
        return ClipSpm(ClipSpmOptions(**options), 224).eval()

    return build


# CLIP-SPM from its equations: one video, frame and class at a time, in float64.
# A vector is a Tensor [D], a video a list of T vectors; only the weights of the module are used.


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("shots", [1, 3])
def test_scores_and_losses_equal_the_equations_written_out(head, protocol, shots):
    options = {
        "TRANSFORMER": SMALL_TRANSFORMER,
        "SPM": {"GENERATOR_HIDDEN": 8, "NEGATIVE_SLOPE": 0.05, "ALPHA": 0.7},
        "HSMR": {"WEIGHT": 1.7},
        "AUXILIARY_WEIGHT": 0.3,
    }
    model = head(6, **options)
    generator = torch.Generator().manual_seed(shots)
    episodes, ways, per_class, frames = 2, 3, 2, 4
    support = torch.randn(episodes, ways, shots, frames, 6, generator=generator)
    query = torch.randn(episodes, ways * per_class, frames, 6, generator=generator)
    text = torch.randn(episodes, ways, 6, generator=generator)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])

    output = model.training_losses(Episode(support, query, text), labels_of(labels), protocol)
    literal = LiteralClipSpm(model)
    expected = [literal.episode(support[b], query[b], text[b], labels[b].tolist(), protocol) for b in range(episodes)]
    torch.testing.assert_close(output.scores, torch.tensor([scores for scores, _ in expected]), rtol=1e-4, atol=1e-4)
    assert output.losses.keys() == {"cross_entropy", "motion", "text", "consistency"}
    for key, loss in output.losses.items():
        assert loss.item() == pytest.approx(sum(losses[key] for _, losses in expected) / episodes, rel=1e-4), key


# HSMR's options


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_sum_pooling_is_two_times_the_steps_times_the_mean(head, frames):
    videos = torch.randn(3, frames, 6, generator=torch.Generator().manual_seed(0))
    mean, total = (
        head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"POOL": pool}).HSMR.motion(videos) for pool in ("mean", "sum")
    )
    torch.testing.assert_close(total, 2 * (frames - 1) * mean)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_one_frame_has_no_motion(head, pool):
    motion = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"POOL": pool}).HSMR.motion(torch.randn(3, 1, 6))
    assert torch.equal(motion, torch.zeros(3, 6))


def test_a_learnable_weight_starts_at_the_configured_value(head):
    learnable = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"LEARNABLE_WEIGHT": True, "WEIGHT": 0.25})
    fixed = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"WEIGHT": 0.25})
    assert dict(learnable.named_parameters())["HSMR.weight"].item() == 0.25
    assert fixed.HSMR.weight == 0.25
    assert "HSMR.weight" not in fixed.state_dict()
    assert not MotionOptions().LEARNABLE_WEIGHT

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 1, 4, 6), (1, 2, 4, 6), (1, 2, 6))
    episode = Episode(*(torch.randn(shape, generator=generator) for shape in shapes))
    labels = labels_of(torch.tensor([[0, 1]]))
    loss, same = (model.training_losses(episode, labels, "inductive").losses["motion"] for model in (learnable, fixed))
    torch.testing.assert_close(loss, same)
    loss.backward()
    assert learnable.HSMR.weight.grad > 0


@torch.no_grad()
def test_motion_changes_no_score_of_a_fixed_model(head):
    """HSMR affects scores only by training shared weights."""
    model = head(6, TRANSFORMER=SMALL_TRANSFORMER)
    episode = Episode(torch.randn(1, 3, 2, 4, 6), torch.randn(1, 3, 4, 6), torch.randn(1, 3, 6))
    before = [model.score(*episode, protocol) for protocol in PROTOCOLS]
    without = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"ENABLED": False})
    without.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("HSMR.")})
    for parameter in model.HSMR.parameters():
        parameter.normal_()
    for protocol, expected in zip(PROTOCOLS, before, strict=True):
        assert torch.equal(model.score(*episode, protocol), expected)
        assert torch.equal(without.score(*episode, protocol), expected)


@torch.no_grad()
def test_a_generated_prompt_depends_on_one_number_of_the_video(head):
    """Permuting the channels of a query leaves its prompt as it is."""
    spm = head(6, TRANSFORMER=SMALL_TRANSFORMER).SPM
    videos, text = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 6)
    torch.testing.assert_close(spm(videos.flip(-1), text), spm(videos, text))
    torch.testing.assert_close(spm(videos.flip(-2), text), spm(videos, text))
    assert not torch.allclose(spm(2 * videos, text), spm(videos, text))


@torch.no_grad()
def test_the_anchor_distance_is_the_same_class_bias_for_every_query_of_an_episode(head):
    """D3 alone does not distinguish queries when they are matched together."""
    only_anchors = {"PROTOTYPE": 0.0, "MODULATED": 0.0}
    model = head(6, TRANSFORMER=SMALL_TRANSFORMER, DISTANCES=only_anchors)
    episode = Episode(torch.randn(1, 3, 2, 4, 6), torch.randn(1, 4, 4, 6), torch.randn(1, 3, 6))
    scores = model.score(*episode, "transductive")
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores))
    assert (model.score(*episode, "inductive") - scores).abs().max() > 1e-3


# Ablations: each of the three modules on or off


def tiny(motion: bool = True, prompts: bool = True, anchors: bool = True, **spm) -> ClipSpm:
    """Returns CLIP-SPM on the tiny backbone with some of HSMR, SPM and PADM."""
    torch.manual_seed(0)
    options = ClipSpmOptions(
        BACKBONE="tiny",
        CLIP_WEIGHTS="random",
        TRANSFORMER=SMALL_TRANSFORMER,
        HSMR={"ENABLED": motion, "LEARNABLE_WEIGHT": True},
        SPM={"ENABLED": prompts, "GENERATOR_HIDDEN": 8, **spm},
        PADM={"ENABLED": anchors},
    )
    return ClipSpm(options, 32)


def tiny_episode(model: ClipSpm) -> tuple[Episode, Tensor]:
    """Returns an encoded 3-way 2-shot episode with 3 queries, and the labels of the queries."""
    generator = torch.Generator().manual_seed(0)
    features = model.encode(torch.rand(9, 4, 3, 32, 32, generator=generator))
    text = model.class_text(["clap", "jump", "ride a bike"])[None]
    return Episode(features[:6].unflatten(0, (1, 3, 2)), features[6:][None], text), torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize(("motion", "prompts", "anchors"), list(itertools.product([True, False], repeat=3)))
def test_every_ablation_trains_and_scores(motion, prompts, anchors):
    model = tiny(motion, prompts, anchors).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    parts = {name.split(".")[0] for name in before}
    switched = {"HSMR": motion, "SPM": prompts, "PADM": anchors}
    assert parts == {"clip", "fusion"} | {part for part, on in switched.items() if on}
    gates = {name for name in before if "_gate" in name}
    assert bool(gates) == (motion or prompts), "gates exist only where a prompt can flow through them"

    episode, labels = tiny_episode(model)
    output = model.training_losses(episode, labels_of(labels), "inductive")
    switched = {"cross_entropy": True, "motion": motion, "text": prompts, "consistency": prompts}
    assert output.losses.keys() == {key for key, on in switched.items() if on}
    output.total.backward()
    assert {name for name, value in model.named_parameters() if value.grad is None} == set()
    with torch.no_grad():
        for value in model.parameters():
            value -= 0.1 * value.grad
    assert {name for name, value in model.named_parameters() if torch.equal(value, before[name])} == set()

    model.eval()
    with torch.no_grad():
        episode, _ = tiny_episode(model)
        together, alone = (model.score(*episode, protocol) for protocol in PROTOCOLS)
    assert together.isfinite().all()
    assert together.shape == alone.shape == (1, 3, 3)
    if not anchors:  # only PADM lets queries interact
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("text", "consistency"), list(itertools.product([True, False], repeat=2)))
def test_disabled_losses_are_not_reported(text, consistency):
    model = tiny(TEXT_LOSS=text, CONSISTENCY_LOSS=consistency)
    episode, labels = tiny_episode(model)
    losses = model.training_losses(episode, labels_of(labels), "inductive").losses
    switched = {"text": text, "consistency": consistency}
    assert losses.keys() == {"cross_entropy", "motion"} | {key for key, on in switched.items() if on}
