"""CLIP-FSAR equals its equations written out one number at a time, in every mode of a test."""

import copy
import math
import shlex

import pydantic
import pytest
import torch
from torch import Tensor

import models.clip_fsar
from benchmarks.released_fixtures import FakeTowers
from models.base import Episode, EpisodeLabels
from models.clip_method import video_text_logits
from models.layers import Attention, SharedWidthOptions
from models.model_clipfsar import ClipFsar, ClipFsarOptions
from tests.helpers import shipped
from tests.helpers.literal_distances import literal_otam
from tests.helpers.literal_layers import literal_transformer
from utils.config import load_config
from utils.errors import UserError

CONFIGS = [path for path in shipped.CONFIGS if path.parent.name == "clipfsar"]
SMALL_TRANSFORMER = {"HEADS": 2, "HIDDEN": 9}
PROTOCOLS = ["transductive", "inductive"]


@pytest.fixture
def head(monkeypatch):
    """Builds CLIP-FSAR without CLIP, for features of a given width, in evaluation mode: no dropout."""

    def build(width: int = 6, **options) -> ClipFsar:
        monkeypatch.setattr(models.clip_fsar, "ClipTowers", lambda *_: FakeTowers(width))
        torch.manual_seed(0)
        model = ClipFsar(ClipFsarOptions(**{"TRANSFORMER": SMALL_TRANSFORMER, **options}), 224).eval()
        with torch.no_grad():
            model.scale.fill_(2.5)  # 1 would hide a forgotten factor
        return model

    return build


def random_episode(shots: int, frames: int = 4) -> tuple[Episode, EpisodeLabels]:
    """Returns 2 episodes, 3 ways, 5 queries, width 6, with classes out of 8 training classes."""
    generator = torch.Generator().manual_seed(shots)
    all_text = torch.randn(8, 6, generator=generator)
    class_ids = torch.tensor([[5, 0, 3], [7, 5, 2]])
    support = torch.randn(2, 3, shots, frames, 6, generator=generator)
    query = torch.randn(2, 5, frames, 6, generator=generator)
    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    return Episode(support, query, all_text[class_ids]), EpisodeLabels(labels, class_ids, all_text)


# CLIP-FSAR from its equations: one video, frame and class at a time, in float64.
# A vector is a Tensor [D], a video a list of T vectors; only the weights of the module are used.

Video = list[Tensor]


def cosine(first: Tensor, second: Tensor) -> float:
    """Returns x y / (|x| |y| + 0.01)."""
    return float((first * second).sum() / (math.sqrt((first**2).sum()) * math.sqrt((second**2).sum()) + 0.01))


def mean_video(videos: list[Video]) -> Video:
    return [sum(frames) / len(videos) for frames in zip(*videos, strict=True)]


def softmax(values: list[float]) -> list[float]:
    return [math.exp(value) / sum(math.exp(other) for other in values) for value in values]


class LiteralClipFsar:
    """The equations, on the weights of a model and a single episode."""

    def __init__(self, model: ClipFsar) -> None:
        self.model = copy.deepcopy(model).double()
        self.options = model.options

    def modulate(self, frames: Video, text: Tensor) -> Video:
        return literal_transformer([*frames, text], self.model.modulation)[: len(frames)]

    def prototype(self, shots: list[Video], text: Tensor) -> Video:
        if self.options.MERGE_BEFORE:
            return self.modulate(mean_video(shots), text)
        return mean_video([self.modulate(frames, text) for frames in shots])

    def distance(self, query: Video, prototype: Video) -> float:
        if self.options.MATCHER == "mean":
            return 1 - cosine(sum(query) / len(query), sum(prototype) / len(prototype))
        table = [[1 - cosine(frame, other) for other in prototype] for frame in query]
        if self.options.MATCHER == "bi-mhm":
            return sum(min(row) for row in table) + sum(min(column) for column in zip(*table, strict=True))
        matrix = torch.tensor(table)
        forward, backward = (literal_otam(part, self.options.OTAM_LAMBDA) for part in (matrix, matrix.T))
        return forward + backward if self.options.OTAM_BOTH_DIRECTIONS else forward

    def distances(self, support: Tensor, query: Tensor, texts: Tensor) -> list[list[float]]:
        """Returns OTAM distances of every query to every class: [N, K, T, D], [Q, T, D], [N, D] -> Q x N."""
        shots = [[list(video.double()) for video in of_class] for of_class in support]
        prototypes = [self.prototype(videos, text.double()) for videos, text in zip(shots, texts, strict=True)]
        queries = [literal_transformer(list(video.double()), self.model.modulation) for video in query]
        return [[self.distance(video, prototype) for prototype in prototypes] for video in queries]

    def text_probabilities(self, video: Tensor, texts: Tensor) -> list[float]:
        """Returns softmax_i(scale cos(GAP(f), w_i)) of one video [T, D] over texts [C, D]."""
        average = sum(video.double()) / len(video)
        return softmax([self.model.scale.item() * cosine(average, text) for text in texts.double()])

    def losses(self, episode: Episode, labels: EpisodeLabels, b: int) -> dict[str, float]:
        rows = self.distances(episode.support[b], episode.query[b], episode.class_text[b])
        answers, class_ids = labels.query[b].tolist(), labels.class_ids[b].tolist()
        scored = [-math.log(softmax([-d for d in row])[y]) for row, y in zip(rows, answers, strict=True)]
        videos = [(video, class_ids[n]) for n, shots in enumerate(episode.support[b]) for video in shots]
        videos += [(video, class_ids[y]) for video, y in zip(episode.query[b], answers, strict=True)]
        named = [-math.log(self.text_probabilities(video, labels.all_text)[c]) for video, c in videos]
        return {
            "cross_entropy": sum(scored) / len(scored),
            "video_text": self.options.VIDEO_TEXT_WEIGHT * sum(named) / len(named),
        }


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("merge_before", [False, True], ids=["merged after", "merged before"])
@pytest.mark.parametrize("shots", [1, 3])
def test_scores_and_both_losses_equal_the_equations_written_out(head, protocol, merge_before, shots):
    model = head(MERGE_BEFORE=merge_before, VIDEO_TEXT_WEIGHT=1.7)
    episode, labels = random_episode(shots)
    literal = LiteralClipFsar(model)
    rows = [literal.distances(episode.support[b], episode.query[b], episode.class_text[b]) for b in range(2)]
    output = model.training_losses(episode, labels, protocol)
    torch.testing.assert_close(output.scores, -torch.tensor(rows), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.score(*episode, protocol), output.scores)
    expected = [literal.losses(episode, labels, b) for b in range(2)]
    assert {key: loss.item() for key, loss in output.losses.items()} == pytest.approx(
        {key: (expected[0][key] + expected[1][key]) / 2 for key in expected[0]}, rel=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"MATCHER": "bi-mhm"}, {"MATCHER": "mean"}, {"OTAM_LAMBDA": 0.1}, {"OTAM_BOTH_DIRECTIONS": False}],
    ids=str,
)
def test_the_distance_follows_the_options(head, options):
    model = head(**options)
    episode, _ = random_episode(shots=2)
    rows = LiteralClipFsar(model).distances(episode.support[0], episode.query[0], episode.class_text[0])
    torch.testing.assert_close(model.score(*episode, "inductive")[0], -torch.tensor(rows), rtol=1e-4, atol=1e-4)
    assert (model.score(*episode, "inductive") - head().score(*episode, "inductive")).abs().max() > 1e-2


# Prototype modulation


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 3])
def test_the_merging_order_matters_only_for_several_shots(head, shots):
    episode, _ = random_episode(shots)
    after, before = (head(MERGE_BEFORE=merge).score(*episode, "inductive") for merge in (False, True))
    assert torch.allclose(after, before) == (shots == 1)


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("merge_before", [False, True], ids=["merged after", "merged before"])
def test_shots_may_be_prepared_together_or_one_by_one(head, merge_before, together):
    model = head(MERGE_BEFORE=merge_before)
    episode, _ = random_episode(shots=3)
    parts = [episode.support] if together else episode.support.split(1, dim=2)
    prepared = torch.cat([model.precompute_support(part, episode.class_text) for part in parts], dim=2)
    assert prepared.shape[2] == (1 if merge_before and together else 3)
    query = model.precompute_query(episode.query)
    found = model.score_precomputed(prepared, query, episode.class_text, "inductive")
    torch.testing.assert_close(found, model.score(*episode, "inductive"))


@torch.no_grad()
@pytest.mark.parametrize("merge_before", [False, True], ids=["merged after", "merged before"])
def test_a_text_changes_only_the_scores_of_its_class(head, merge_before):
    model = head(MERGE_BEFORE=merge_before)
    episode, _ = random_episode(shots=2)
    text = episode.class_text.clone()
    text[:, 1] *= -1
    changed = model.score(episode.support, episode.query, text, "inductive")
    difference = (changed - model.score(*episode, "inductive")).abs().amax(dim=(0, 1))
    assert (difference > 1e-4).tolist() == [False, True, False]


@pytest.mark.parametrize(("width", "head_width", "expected"), [(512, None, 64), (4, None, 1), (512, 5, 5)])
def test_head_width_defaults_to_the_divided_feature_width(width, head_width, expected):
    attention = Attention(width, SharedWidthOptions(HEADS=8, HEAD_DIM=head_width))
    assert attention.to_query.weight.shape == (8 * expected, width)


# Video-text contrast


@torch.no_grad()
def test_the_contrastive_loss_uses_all_training_classes(head):
    model = head()
    episode, labels = random_episode(shots=2)
    before = model.training_losses(episode, labels, "inductive")
    text = labels.all_text.clone()
    text[1] *= -3  # a class of neither episode
    after = model.training_losses(episode, EpisodeLabels(labels.query, labels.class_ids, text), "inductive")
    assert torch.equal(after.scores, before.scores)
    assert after.losses["cross_entropy"] == before.losses["cross_entropy"]
    assert (after.losses["video_text"] - before.losses["video_text"]).abs() > 1e-3


def test_the_contrastive_loss_is_in_float32_for_any_dtype():
    generator = torch.Generator().manual_seed(0)
    videos, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 5, 4, 6), (7, 6)))
    scale = torch.ones(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = video_text_logits(videos, text, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, video_text_logits(videos.float(), text.float(), scale))


def test_the_scale_starts_at_one_and_learns_from_the_contrastive_loss(monkeypatch):
    monkeypatch.setattr(models.clip_fsar, "ClipTowers", lambda *_: FakeTowers(6))
    model = ClipFsar(ClipFsarOptions(TRANSFORMER=SMALL_TRANSFORMER), 224)
    assert model.scale.tolist() == [1.0]
    losses = model.training_losses(*random_episode(shots=1), "inductive").losses
    assert not torch.autograd.grad(losses["cross_entropy"], model.scale, retain_graph=True, allow_unused=True)[0]
    assert torch.autograd.grad(losses["video_text"], model.scale)[0]


# The modes of a test


@torch.no_grad()
@pytest.mark.parametrize("frames", [4, 9])
def test_text_mode_ignores_the_support(head, frames):
    model = head(EVAL_TEXT=True)
    episode, _ = random_episode(shots=2, frames=frames)
    scores = model.score(*episode, "inductive")
    literal = LiteralClipFsar(model)
    expected = [
        [literal.text_probabilities(video, episode.class_text[b]) for video in episode.query[b]] for b in range(2)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected))
    for support in (torch.randn_like(episode.support), torch.zeros_like(episode.support[:, :, :1])):
        assert torch.equal(model.score(support, episode.query, episode.class_text, "inductive"), scores)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("frames", [4, 9])
def test_combined_mode_is_the_weighted_product_of_both_probabilities(head, frames, share):
    model = head(COMBINE=True, TEXT_COFF=share)
    episode, _ = random_episode(shots=2, frames=frames)
    literal = LiteralClipFsar(model)
    expected = []
    for b in range(2):
        rows = literal.distances(episode.support[b], episode.query[b], episode.class_text[b])
        for video, row in zip(episode.query[b], rows, strict=True):
            by_text = literal.text_probabilities(video, episode.class_text[b])
            by_video = softmax([(frames - distance) / frames for distance in row])
            expected.append([p**share * q ** (1 - share) for p, q in zip(by_text, by_video, strict=True)])
    found = model.score(*episode, "inductive").flatten(0, 1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_default_text_weight_of_a_combined_score_is_0_9():
    assert ClipFsarOptions().TEXT_COFF == 0.9


@torch.no_grad()
@pytest.mark.parametrize("mode", ["EVAL_TEXT", "COMBINE"])
def test_a_mode_applies_only_in_evaluation(head, mode):
    plain, model = head(), head(**{mode: True})
    episode, labels = random_episode(shots=2)
    visual = plain.score(*episode, "inductive")
    assert (model.score(*episode, "inductive") - visual).abs().max() > 1e-2
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    output = model.training_losses(episode, labels, "inductive")
    torch.testing.assert_close(output.scores, visual)
    torch.testing.assert_close(output.losses, plain.training_losses(episode, labels, "inductive").losses)


def test_both_modes_at_once_are_refused_in_one_sentence():
    sentence = "MODEL.EVAL_TEXT and MODEL.COMBINE are both true: set MODEL.COMBINE to false"
    with pytest.raises(pydantic.ValidationError, match=sentence):
        ClipFsarOptions(EVAL_TEXT=True, COMBINE=True)
    with pytest.raises(UserError, match=sentence):
        load_config(CONFIGS[0], ["MODEL.EVAL_TEXT=true", "MODEL.COMBINE=true"])


# The shipped configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_and_every_command_in_its_header_load(path):
    config = load_config(path).config
    assert config.MODEL.NAME == "clipfsar"
    assert path.stem == config.DATA.DATASET
    assert f"checkpoints/clipfsar_{path.stem}" == config.CHECKPOINT.CHECKPOINT_DIR
    assert config.DATA.IMG_NORM
    commands = [line for line in path.read_text().splitlines() if line.startswith("# sh train_test.sh")]
    assert len(commands) == (0 if path.stem.startswith("demo") else 2)
    for command in commands:
        _, _, _, named, *overrides = shlex.split(command)
        assert named == f"configs/clipfsar/{path.name}"
        changed = load_config(path, overrides).config
        assert changed.TRAIN.SHOT == 1, "the released configs train with one shot for both"
        assert (changed.TEST.SHOT == 5) == changed.MODEL.MERGE_BEFORE
