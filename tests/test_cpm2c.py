"""CPM2C equals its equations written out one number at a time, and no label of a query reaches a score."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import models.clip_fsar
from benchmarks.released_fixtures import FakeTowers
from models.base import Episode, EpisodeLabels, texts_of_queries
from models.model_cpm2c import Cpm2c, Cpm2cOptions
from tests.helpers.literal_distances import literal_otam
from tests.helpers.literal_layers import Video, literal_gate, literal_transformer

SMALL_TRANSFORMER = {"HEADS": 2, "HEAD_DIM": 5, "HIDDEN": 9}
VARIANTS = list(itertools.product(["gated", "additive"], ["multi-scale", "two-convolutions"]))
EVERY_LOSS = {"LOCAL": 0.9, "VIDEO_TEXT": 0.7, "GLOBAL": 0.6, "CONSISTENCY": 0.3, "APPEARANCE": 1.3, "MOTION": 0.8}


@pytest.fixture
def head(monkeypatch):
    """Builds CPM2C without CLIP, for features of a given width, in evaluation mode: no dropout."""

    def build(width: int, **options) -> Cpm2c:
        monkeypatch.setattr(models.clip_fsar, "ClipTowers", lambda *_: FakeTowers(width))
        torch.manual_seed(0)
        return Cpm2c(Cpm2cOptions(**options), 224).eval()

    return build


def random_episode(episodes=1, ways=3, shots=1, queries=6, frames=4, width=6, seed=0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    return Episode(
        torch.randn(episodes, ways, shots, frames, width, generator=generator),
        torch.randn(episodes, queries, frames, width, generator=generator),
        torch.randn(episodes, ways, width, generator=generator),
    )


def labels_of(episode: Episode, query_labels: Tensor) -> EpisodeLabels:
    """Returns labels in which the classes of the episodes are the last of the training classes, in reverse order."""
    others = torch.randn(4, episode.class_text.shape[-1], generator=torch.Generator().manual_seed(1))
    texts = episode.class_text.flatten(0, 1).flip(0)
    class_ids = (4 + torch.arange(len(texts))).flip(0).view(episode.class_text.shape[:2])
    return EpisodeLabels(query_labels, class_ids, torch.cat([others, texts]))


# CPM2C from its equations: one video, frame and class at a time, in float64.
# A vector is a Tensor [D], a video a list of vectors; only the weights of the module are used.


def literal_convolution(video: Video, layer: nn.Conv1d, reach: int) -> Video:
    """Computes a convolution over time with taps `reach` frames apart, frames beyond the ends being zero."""
    taps = layer.weight.shape[-1]
    result = []
    for t in range(len(video)):
        value = layer.bias.clone()
        for tap in range(taps):
            source = t + (tap - taps // 2) * reach
            if 0 <= source < len(video):
                value = value + layer.weight[:, :, tap] @ video[source]
        result.append(value)
    return result


def literal_squares(first: list[Video], second: list[Video]) -> float:
    """d(x, y): squares added over tokens and channels, averaged over videos."""
    pairs = [pair for xs, ys in zip(first, second, strict=True) for pair in zip(xs, ys, strict=True)]
    return sum(((x - y) ** 2).sum().item() for x, y in pairs) / len(first)


def literal_cosine_distance(x: Tensor, y: Tensor) -> float:
    return (1 - (x @ y) / (x.norm() * y.norm() + 0.01)).item()


def literal_cross_entropy(rows: list[list[float]], labels: list[int]) -> float:
    losses = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(rows, labels, strict=True)]
    return sum(losses) / len(losses)


class LiteralCpm2c:
    """The equations, on the weights of a model and a single episode."""

    def __init__(self, model: Cpm2c) -> None:
        self.model = copy.deepcopy(model).double()
        self.options = model.options
        self.tokens = [self.model.appearance_token[0, 0], self.model.motion_token[0, 0]]

    def gate(self, vector: Tensor, layers: nn.Sequential) -> Tensor:
        return literal_gate(vector, layers, self.options.GATES.NEGATIVE_SLOPE)

    def fuse(self, prompt: Tensor, video: Video) -> Video:
        """Tr([p ; x']): the prompt first."""
        fusion = self.model.fusion
        if self.options.FUSION == "additive":
            fused = [x + self.options.ADDED * prompt for x in video]
        else:
            gated = self.options.GATES.ALPHA * (prompt * self.gate(prompt, fusion.prompt_gate))
            fused = [gated + x * self.gate(x, fusion.frame_gate) for x in video]
        return literal_transformer([prompt, *fused], fusion.temporal)

    def smooth(self, video: Video) -> Video:
        """Phi."""
        smooth = self.model.motion.smooth
        if self.options.MOTION == "two-convolutions":
            return literal_convolution(literal_convolution(video, smooth[0], 1), smooth[1], 1)
        scales = [
            literal_convolution(video, layer, reach)
            for layer, reach in zip(smooth.convolutions, (1, 1, 2), strict=True)
        ]
        combined = literal_convolution([torch.cat(vectors) for vectors in zip(*scales, strict=True)], smooth.combine, 1)
        return [x + self.options.MOTION_RESIDUAL * y for x, y in zip(video, combined, strict=True)]

    def streams(self, video: Video) -> list[Video]:
        smoothed = self.smooth(video)
        motion = []
        for t in range(len(video) - 1):
            forward = smoothed[t + 1] - video[t]
            backward = smoothed[t] - video[t + 1]
            motion.append(0.5 * (forward + backward))
        return [video, motion]

    def distance(self, query: Video, prototype: Video) -> float:
        matrix = torch.tensor([[literal_cosine_distance(x, y) for y in prototype] for x in query], dtype=torch.float64)
        return literal_otam(matrix, 0.5) + literal_otam(matrix.T, 0.5)

    def episode(self, episode: Episode, labels: list[int], class_ids: list[int], all_text: Tensor) -> tuple:
        """Scores [Q][N] and losses of one episode without the axis B."""
        texts = list(episode.class_text.double())
        ways, shots = episode.support.shape[:2]
        support = [list(video.double()) for video in episode.support.flatten(0, 1)]
        of_support = [c for c in range(ways) for _ in range(shots)]
        queries = [list(video.double()) for video in episode.query]

        scores = [[0.0] * ways for _ in queries]
        global_scores = [[0.0] * ways for _ in queries]
        consistency = 0.0
        weights = self.options.LOSSES
        distances = self.options.DISTANCES
        factors = [distances.APPEARANCE, distances.MOTION]
        for stream, coefficient in enumerate((weights.APPEARANCE, weights.MOTION)):
            support_x, query_x = ([self.streams(video)[stream] for video in videos] for videos in (support, queries))
            token = self.tokens[stream]
            support_real = [self.fuse(texts[c], x) for c, x in zip(of_support, support_x, strict=True)]
            support_fake = [self.fuse(token, x) for x in support_x]
            query_real = [self.fuse(texts[label], x) for label, x in zip(labels, query_x, strict=True)]
            query_fake = [self.fuse(token, x) for x in query_x]
            consistency += coefficient * literal_squares(query_real, query_fake)
            consistency += coefficient * literal_squares(support_real, support_fake)
            for (j, query), c in itertools.product(enumerate(query_fake), range(ways)):
                own = support_real[c * shots : (c + 1) * shots]
                prototype = [sum(tokens[t] for tokens in own) / shots for t in range(1, len(query))]
                scores[j][c] -= factors[stream] * self.distance(query[1:], prototype)
                for tokens in own:
                    total = sum(literal_cosine_distance(x, tokens[0]) for x in query)
                    global_scores[j][c] -= factors[stream] * total

        means = [sum(video) / len(video) for video in support + queries]
        scale = self.model.scale.item()
        video_text = [
            [scale * (1 - literal_cosine_distance(mean, text)) for text in all_text.double()] for mean in means
        ]
        ids = [class_ids[c] for c in of_support + labels]
        losses = {
            "cross_entropy": weights.LOCAL * literal_cross_entropy(scores, labels),
            "video_text": weights.VIDEO_TEXT * literal_cross_entropy(video_text, ids),
            "global": weights.GLOBAL * literal_cross_entropy(global_scores, labels),
            "consistency": weights.CONSISTENCY * consistency,
        }
        return scores, losses


@torch.no_grad()
@pytest.mark.parametrize(("fusion", "motion"), VARIANTS)
@pytest.mark.parametrize("shots", [1, 3])
def test_scores_and_losses_equal_the_equations_written_out(head, fusion, motion, shots):
    model = head(
        6,
        FUSION=fusion,
        ADDED=0.4,
        GATES={"ALPHA": 0.7, "NEGATIVE_SLOPE": 0.05},
        MOTION=motion,
        MOTION_RESIDUAL=0.6,
        TRANSFORMER=SMALL_TRANSFORMER,
        DISTANCES={"APPEARANCE": 0.9, "MOTION": 1.4},
        LOSSES=EVERY_LOSS,
    )
    model.scale.fill_(2.5)
    for token in (model.appearance_token, model.motion_token):
        token.normal_()
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])
    episode = random_episode(episodes=2, shots=shots, seed=shots)
    known = labels_of(episode, labels)

    output = model.training_losses(episode, known, "inductive")
    literal = LiteralCpm2c(model)
    expected = [
        literal.episode(
            Episode(episode.support[b], episode.query[b], episode.class_text[b]),
            labels[b].tolist(),
            known.class_ids[b].tolist(),
            known.all_text,
        )
        for b in range(2)
    ]
    scores = torch.tensor([scores for scores, _ in expected])
    for found in (output.scores, model.score(*episode, "inductive")):
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
    assert output.losses.keys() == {"cross_entropy", "video_text", "global", "consistency"}
    for key, loss in output.losses.items():
        assert loss.item() == pytest.approx(sum(losses[key] for _, losses in expected) / 2, rel=1e-4), key


# Scores do not depend on query labels


def noise_episodes(episodes: int, fusion: str = "gated", ways: int = 5) -> tuple[Cpm2c, Episode, Tensor]:
    """Returns an untrained model, one-shot episodes of pure-noise pixels and noise texts, and labels of the queries."""
    torch.manual_seed(0)
    options = Cpm2cOptions(
        BACKBONE="tiny",
        CLIP_WEIGHTS="random",
        FUSION=fusion,
        TRANSFORMER=SMALL_TRANSFORMER,
        TOKEN_DEVIATION=0.02,  # as small as the features of noise, so that it does not dominate them
    )
    model = Cpm2c(options, 32).eval()
    videos = torch.cat([model.encode(torch.rand(2 * ways, 4, 3, 32, 32)) for _ in range(episodes)])
    features = videos.unflatten(0, (episodes, 2, ways))
    # Ten times as large as the features, so that a tenth of a text would be detected.
    text = 10 * features.std() * torch.randn(episodes, ways, features.shape[-1])
    labels = torch.stack([torch.randperm(ways) for _ in range(episodes)])
    return model, Episode(features[:, 0].unsqueeze(2), features[:, 1], text), labels


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gated", "additive"])
def test_an_untrained_model_guesses_the_classes_of_noise(fusion):
    model, episode, labels = noise_episodes(200, fusion)

    def accuracy(query: Tensor) -> float:
        scores = model.score(episode.support, query, episode.class_text, "inductive")
        return (scores.argmax(-1) == labels).float().mean().item()

    assert accuracy(episode.query) == pytest.approx(0.2, abs=0.05)  # 1000 guesses: 4 standard deviations
    # The test detects what the official repository does: it adds 0.1 of the true text to the query's features.
    true_text = texts_of_queries(episode.class_text, labels).unsqueeze(2)
    assert accuracy(episode.query + 0.1 * true_text) > 0.6


# Options


@pytest.mark.parametrize(("fusion", "motion"), VARIANTS)
@pytest.mark.parametrize("losses", [{}, EVERY_LOSS, {"VIDEO_TEXT": 0.0, "CONSISTENCY": 0.0}], ids=["", "all", "local"])
def test_every_variant_trains_all_parameters_without_losses_of_weight_0(head, fusion, motion, losses):
    model = head(6, FUSION=fusion, MOTION=motion, TRANSFORMER=SMALL_TRANSFORMER, LOSSES=losses)
    episode = random_episode()
    output = model.training_losses(episode, labels_of(episode, torch.tensor([[0, 1, 2, 0, 1, 2]])), "inductive")
    keys = {"VIDEO_TEXT": "video_text", "GLOBAL": "global", "CONSISTENCY": "consistency"}
    weights = model.options.LOSSES
    assert output.losses.keys() == {"cross_entropy"} | {key for name, key in keys.items() if getattr(weights, name)}
    output.total.backward()
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()} == set()
    assert ("scale" in names) == bool(weights.VIDEO_TEXT)
    assert any("gate" in name for name in names) == (fusion == "gated")


@torch.no_grad()
@pytest.mark.parametrize("motion", ["multi-scale", "two-convolutions"])
def test_motion_is_the_mean_convolved_change_between_neighbouring_frames(head, motion):
    module = head(6, MOTION=motion, TRANSFORMER=SMALL_TRANSFORMER).motion
    videos = torch.randn(2, 3, 5, 6)
    added = module.smooth(videos.flatten(0, 1).mT).mT.unflatten(0, (2, 3)) - videos
    torch.testing.assert_close(module(videos), 0.5 * (added[..., 1:, :] + added[..., :-1, :]))
    assert module(videos[..., :1, :]).shape == (2, 3, 0, 6)


@torch.no_grad()
def test_motion_can_be_excluded_from_scores(head):
    options = {"TRANSFORMER": SMALL_TRANSFORMER, "DISTANCES": {"MOTION": 0.0}}
    model, episode = head(6, **options), random_episode()
    scores = model.score(*episode, "inductive")
    model.motion_token.add_(1)
    torch.testing.assert_close(model.score(*episode, "inductive"), scores)
    model.appearance_token.add_(1)
    assert not torch.allclose(model.score(*episode, "inductive"), scores)


def test_class_tokens_are_initialised_as_in_the_released_code(head):
    model = head(512, TRANSFORMER=SMALL_TRANSFORMER, FUSION="additive", MOTION="two-convolutions")
    assert model.appearance_token.std().item() == pytest.approx(1, abs=0.15)
    assert model.motion_token.std().item() == pytest.approx(1, abs=0.15)
    small = head(6, TRANSFORMER=SMALL_TRANSFORMER, TOKEN_DEVIATION=0.0)
    assert not small.appearance_token.any()
