"""TEAM equals its equations written out by token, class and pair of classes.

Shapes: B episodes, N ways, K shots, Q queries, T frames, M tokens, D features.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.released_fixtures import FakeTowers, build_head
from models.base import Episode, EpisodeLabels
from models.model_team import PatternTokens, Team, TeamOptions
from models.released import our_weights
from tests.helpers.methods import build
from tests.helpers.released import released_state

WIDTH, TOKENS = 6, 4
Vectors = list[Tensor]  # of a video's frames, or of the tokens


def head(**options) -> Team:
    """Returns TEAM for features of WIDTH, in evaluation mode."""
    torch.manual_seed(0)
    model = build_head("team", FakeTowers(WIDTH), TOKENS=TOKENS, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def random_episode(ways: int = 3, shots: int = 2, queries: int = 4, frames: int = 5) -> Episode:
    generator = torch.Generator().manual_seed(ways + shots)
    return Episode(
        torch.randn(2, ways, shots, frames, WIDTH, generator=generator),
        torch.randn(2, queries, frames, WIDTH, generator=generator),
        torch.zeros(2, ways, 1),
    )


class Literal:
    """TEAM in float64, one vector [D] at a time; of the module only its weights and sizes are used."""

    def __init__(self, model: Team) -> None:
        self.patterns: PatternTokens = model.patterns.double()
        self.options = model.options

    def norm(self, vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        layer = self.patterns.norm
        return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias

    def found(self, frames: Vectors) -> Vectors:
        """Returns o of each token."""
        placed = []
        for t, frame in enumerate(frames):
            angles = [t / 10000 ** (2 * (i // 2) / WIDTH) for i in range(WIDTH)]
            position = [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]
            placed.append(self.norm(frame + self.options.POSITION_SCALE * torch.tensor(position).double()))
        result = []
        for token in self.patterns.tokens[0]:
            products = [
                self.norm(token) @ frame / math.sqrt(WIDTH / self.options.TEMPERATURE_HEADS) for frame in placed
            ]
            weights = torch.stack(products).softmax(dim=0)
            result.append(sum(weight * frame for weight, frame in zip(weights, placed, strict=True)))
        return result

    def refined(self, token: Tensor) -> Tensor:
        """Returns m(x)."""
        inner, outer = self.patterns.inner, self.patterns.outer
        return (token + outer.weight @ (inner.weight @ token + inner.bias).relu() + outer.bias).relu()

    def refined_with(self, found: Vectors, sign: int) -> Vectors:
        return [self.refined(token + sign * o) for token, o in zip(self.patterns.tokens[0], found, strict=True)]

    def adapted(self, found: list[Vectors], sign: int) -> list[Vectors]:
        """s of each class, from o of each class."""
        plain = [self.refined_with(of_class, sign) for of_class in found]
        if self.options.ADAPTATION == "none":
            return plain
        classes = []
        for c in range(len(found)):
            tokens = []
            for m, token in enumerate(self.patterns.tokens[0]):
                away = []
                for j in [j for j in range(len(found)) if j != c]:
                    shared = cosine(plain[c][m], plain[j][m]) if self.options.ADAPTATION == "similarity" else 1.0
                    # As in the paper, for both signs.
                    away.append(
                        self.refined(
                            token + found[c][m] - shared * (found[j][m] - found[c][m])
                            if sign > 0
                            else token - found[c][m] + shared * (found[j][m] - found[c][m])
                        )
                    )
                tokens.append(sum(away) / len(away))
            classes.append(tokens)
        return classes

    def distances(self, support: Tensor, query: Tensor) -> tuple[list[float], list[float]]:
        """Returns PD and ND of one query [T, D] to each class of [N, K, T, D]."""
        found = [self.found(list(videos.mean(dim=0))) for videos in support]
        positive, negative = self.adapted(found, 1), self.adapted(found, -1)
        of_query = self.found(list(query))
        query_positive, query_negative = self.refined_with(of_query, 1), self.refined_with(of_query, -1)
        nds = []
        for c in range(len(found)):
            others = [j for j in range(len(found)) if j != c]
            first = max(distance(positive[j], query_negative) for j in others)
            second = max(distance(negative[j], query_positive) for j in others)
            nds.append((first + second) / 2 if self.options.NEGATIVE else 0.0)
        return [distance(of_class, query_positive) for of_class in positive], nds


def cosine(first: Tensor, second: Tensor) -> float:
    product = first.norm() * second.norm()
    return (first @ second / product).item() if product else 0.0


def distance(first: Vectors, second: Vectors) -> float:
    return sum(1 - cosine(x, z) for x, z in zip(first, second, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"NEGATIVE": False},
        {"ADAPTATION": "plain", "POSITION_SCALE": 0.7},
        {"ADAPTATION": "none", "TEMPERATURE_HEADS": 3},
    ],
    ids=str,
)
def test_scores_and_losses_equal_the_equations_written_out(options):
    model = head(**options)
    support, query, text = random_episode()
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    output = model.training_losses(
        Episode(support, query, text), EpisodeLabels(labels, torch.empty(0), torch.empty(0)), "inductive"
    )
    assert torch.equal(output.scores, model.score(support, query, text))
    literal, of_positive, of_negative = Literal(model), [], []
    for b in range(2):
        for q in range(4):
            positive, negative = literal.distances(support[b].double(), query[b, q].double())
            expected = [-(p + n) for p, n in zip(positive, negative, strict=True)]
            assert output.scores[b, q].tolist() == pytest.approx(expected, abs=1e-4)
            for terms, distances in ((of_positive, positive), (of_negative, negative)):
                terms.append(-(-torch.tensor(distances)).log_softmax(dim=0)[labels[b, q]].item())
    losses = {"cross_entropy": sum(of_positive) / 8, "negative_cross_entropy": sum(of_negative) / 8}
    expected = {name: losses[name] for name in output.losses}
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(expected, abs=1e-4)
    assert len(output.losses) == (2 if model.options.NEGATIVE else 1)


def test_tokens_learn_from_both_signs_and_other_classes():
    support, query, text = random_episode()
    scores = {}
    for name, options in {"all": {}, "positive": {"NEGATIVE": False}, "fixed": {"ADAPTATION": "none"}}.items():
        scores[name] = head(**options).score(support, query, text)
    assert not torch.allclose(scores["all"], scores["positive"], atol=1e-2)
    assert not torch.allclose(scores["all"], scores["fixed"], atol=1e-2)
    # Without its neighbours class 0 keeps its positive distance only where classes do not move away from each other.
    for adaptation, is_same in (("none", True), ("similarity", False)):
        model = head(NEGATIVE=False, ADAPTATION=adaptation)
        fewer = model.score(support[:, :2], query, text[:, :2])
        assert torch.allclose(fewer, model.score(support, query, text)[..., :2], atol=1e-5) == is_same


def test_a_released_checkpoint_of_an_imagenet_resnet_loads():
    model = build("team", BACKBONE="resnet18", WEIGHTS="random")
    released = released_state(model.state_dict(), Team.released)
    assert {"DPM.AP", "DPM.mlp.out_fc.bias", "backbone.0.weight", "backbone.7.1.bn2.running_var"} <= released.keys()
    positions = {"DPM.pe.pe": torch.zeros(1, 12, 512)}
    found = our_weights({**released, **positions}, Team.released)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


def test_the_released_values_are_the_defaults():
    options = TeamOptions()
    assert (options.BACKBONE, options.TOKENS, options.POSITION_SCALE) == ("resnet50", 60, 0.1)
    assert (options.TEMPERATURE_HEADS, options.DROPOUT, options.ADAPTATION) == (8, 0.1, "similarity")
