"""HyRSM's equations against loops over frames and videos, and its classifier over training classes."""

import math

import pytest
import torch
import torch.nn.functional as F

import models
from models.base import Episode, EpisodeLabels
from models.layers import PositionOptions, Positions
from models.model_hyrsm import CoherenceOptions, Hyrsm, incoherence

WAYS, SHOTS, QUERIES, FRAMES, WIDTH = 3, 2, 2, 3, 128


def small(**options) -> Hyrsm:
    torch.manual_seed(0)
    model = models.build("hyrsm", 32, BACKBONE="tiny", CLIP_WEIGHTS="random", RELATION={"HEADS": 2}, **options).eval()
    for parameter in model.parameters():  # norms and biases count as well
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, FRAMES, WIDTH, generator=torch.Generator().manual_seed(1))


def literal_score(model: Hyrsm, entries: torch.Tensor, video: torch.Tensor) -> list[float]:
    """Returns the distances of one query u [T, D] to each entry [E, T, D], from the equations of the file's head."""
    tokens = torch.stack([*(entry.mean(dim=0) for entry in entries), video.mean(dim=0)])
    heads, half = [], WIDTH // 2
    for head in (slice(0, half), slice(half, WIDTH)):
        layers = (model.across.to_query, model.across.to_key, model.across.to_value)
        query, key, value = (tokens @ layer.weight[head].T for layer in layers)
        heads.append(torch.softmax(query @ key.T / math.sqrt(half), dim=-1) @ value)
    related = F.relu(model.across.norm(tokens + model.across.project(torch.cat(heads, dim=-1))))

    def combined(frames: torch.Tensor, relation: torch.Tensor) -> list[torch.Tensor]:
        weight = model.combine.weight[:, :, 0]
        return [weight @ torch.cat([frame, relation]) + model.combine.bias for frame in frames]

    of_query, costs = combined(video, related[-1]), []
    for entry, relation in zip(entries, related[:-1], strict=True):
        of_class = combined(entry, relation)
        table = torch.stack([torch.stack([1 - F.cosine_similarity(a, b, dim=0) for b in of_class]) for a in of_query])
        costs.append((table.min(dim=0).values.sum() + table.min(dim=1).values.sum()).item())
    return costs


@torch.no_grad()
@pytest.mark.parametrize("pool", ["features", "distances"])
def test_scores_follow_the_equations(pool):
    model = small(SHOT_POOL=pool)
    support, query = features(1, WAYS, SHOTS), features(1, QUERIES)
    scores = model.score(support, query, torch.zeros(1, WAYS, 1))
    for number in range(QUERIES):
        if pool == "features":
            costs = literal_score(model, support[0].mean(dim=1), query[0, number])
        else:
            each = literal_score(model, support[0].flatten(0, 1), query[0, number])
            costs = [sum(each[way * SHOTS : (way + 1) * SHOTS]) / SHOTS for way in range(WAYS)]
        assert scores[0, number].tolist() == pytest.approx([-cost for cost in costs], rel=1e-4)


def test_positions_equal_the_released_ones():
    """The odd channels have a different frequency from the even ones next to them."""
    placed = Positions(PositionOptions(DIVISOR=4.0, SCALE=0.5, DROPOUT=0.0))(torch.ones(1, 3, 8))
    for time in range(3):
        for channel in range(8):
            angle = time / 10000 ** (2 * channel / 8)
            expected = math.sqrt(8 / 4) + 0.5 * (math.cos(angle) if channel % 2 else math.sin(angle))
            assert placed[0, time, channel].item() == pytest.approx(expected, abs=1e-6)


def test_coherence_follows_the_equations():
    frames, options = torch.randn(2, 5, 4), CoherenceOptions(WINDOW=2, SIGMA=3.0, BETA=2.0)
    total = 0.0
    for video in frames:
        for i in range(5):
            for j in range(5):
                distance, gap = 1 - F.cosine_similarity(video[i], video[j], dim=0).item(), abs(i - j)
                far = max(0.0, 1 - math.exp(-((gap - 2) ** 2) / 3.0) - distance)
                total += distance / (gap**2 + 1) if gap <= 2 else 2.0 * far
    assert incoherence(frames, options).item() == pytest.approx(total / 50, rel=1e-4)


def test_the_class_loss_is_the_mean_over_all_frames():
    model = small(CLASS_WEIGHT=0.5)
    model.set_training_classes(7)
    episode = Episode(features(1, WAYS, SHOTS), features(1, QUERIES), torch.zeros(1, WAYS, 1))
    labels = EpisodeLabels(torch.tensor([[2, 0]]), torch.tensor([[6, 1, 4]]), torch.zeros(7, 1))
    videos = [(video, [6, 1, 4][way]) for way in range(WAYS) for video in episode.support[0, way]]
    videos += [(episode.query[0, 0], 4), (episode.query[0, 1], 6)]
    each = [-torch.log_softmax(model.classify(frame), dim=0)[label] for video, label in videos for frame in video]
    loss = model.training_losses(episode, labels, "inductive").losses["class"]
    torch.testing.assert_close(loss, 0.5 * torch.stack(each).mean())
    loss.backward()
    assert model.classify.weight.grad.any()


def test_the_classifier_exists_only_if_it_is_trained():
    assert small().classify is None
    model = small(CLASS_WEIGHT=0.0)
    model.set_training_classes(7)
    assert model.classify is None
