"""MoLo's equations against loops over frames, and the reconstruction of frames in training steps."""

import pytest
import torch
import torch.nn.functional as F

import models
from models.base import Episode, EpisodeLabels
from models.model_molo import Molo, long_short_scores, streams

WAYS, SHOTS, QUERIES, FRAMES, SIZE = 3, 2, 2, 4, 32


def small(**options) -> Molo:
    torch.manual_seed(0)
    layer = {"HEADS": 2, "HIDDEN": 16, "DROPOUT": 0.0, "HIDDEN_DROPOUT": 0.0}
    options = {"POSITIONS": {"DROPOUT": 0.0}, "TRANSFORMER": layer, **options}
    return models.build("molo", SIZE, BACKBONE="tiny", CLIP_WEIGHTS="random", **options).eval()


def clips(videos: int) -> torch.Tensor:
    return torch.rand(videos, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_motion_is_a_convolved_frame_minus_its_predecessor():
    model = small()
    maps = model.backbone_features(clips(2))
    motion = model.motion(maps)
    for video in range(2):
        reduced = model.motion.reduce(maps[video].permute(3, 0, 1, 2)[None])[0]
        for time in range(FRAMES - 1):
            expected = model.motion.shift(reduced[:, time + 1][None])[0] - reduced[:, time]
            torch.testing.assert_close(motion[video, time], expected, rtol=1e-4, atol=1e-5)
            pooled = F.relu(model.motion.widen(expected[None]))[0].mean(dim=(1, 2))
            torch.testing.assert_close(model.motion.vectors(motion)[video, time], pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_and_contrasts_follow_the_equations():
    model = small(MOTION_WEIGHT=0.7)
    support = model.encode(clips(WAYS * SHOTS)).unflatten(0, (1, WAYS, SHOTS))
    query = model.encode(clips(8)[-QUERIES:])[None]
    scores = model.score(support, query, torch.zeros(1, WAYS, 1))
    taus = torch.tensor([2.0]), torch.tensor([3.0])
    contrasts = long_short_scores(streams(support.mean(dim=2)), streams(query), taus)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - a @ b / (a.norm() * b.norm() + 0.01)

    prototypes = support[0].mean(dim=1)
    for q, video in enumerate(query[0]):
        for n, prototype in enumerate(prototypes):
            expected = 0.0
            parts = ("", slice(1, FRAMES + 1), 0, 1.0, 2.0), ("_motion", slice(FRAMES + 2, None), FRAMES + 1, 0.7, 3.0)
            for suffix, short, long, weight, tau in parts:
                table = torch.stack([torch.stack([distance(a, b) for b in prototype[short]]) for a in video[short]])
                expected -= weight * (table.min(dim=0).values.sum() + table.min(dim=1).values.sum())
                s2q = -tau * sum(distance(video[long], b) for b in prototype[short])
                q2s = -tau * sum(distance(a, prototype[long]) for a in video[short])
                torch.testing.assert_close(contrasts[f"s2q{suffix}"][0, q, n], s2q, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(contrasts[f"q2s{suffix}"][0, q, n], q2s, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores[0, q, n], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_losses_follow_the_equations():
    model = small(CLASS_WEIGHT=0.5, CONTRAST_WEIGHT=0.3)
    model.set_training_classes(7)
    videos, classes = model.encode(clips(WAYS * SHOTS + QUERIES)), torch.tensor([6, 6, 1, 1, 4, 4, 4, 6])
    episode = Episode(videos[:6].unflatten(0, (1, WAYS, SHOTS)), videos[None, 6:], torch.zeros(1, WAYS, 1))
    labels = EpisodeLabels(torch.tensor([[2, 0]]), torch.tensor([[6, 1, 4]]), torch.zeros(7, 1))
    losses = model.training_losses(episode, labels, "inductive").losses
    both = [video[: FRAMES + 1].mean(dim=0) + video[FRAMES + 1 :].mean(dim=0) for video in videos]  # with class tokens
    of_class = F.cross_entropy(model.classify(torch.stack(both)), classes).item()
    one = torch.ones(1)  # both temperatures at first
    contrasts = long_short_scores(streams(episode.support.mean(dim=2)), streams(episode.query), (one, one))
    of_contrast = sum(F.cross_entropy(scores[0], labels.query[0]).item() for scores in contrasts.values())
    assert (losses["class"].item(), losses["contrast"].item()) == pytest.approx((0.5 * of_class, 0.3 * of_contrast))


def test_every_parameter_learns_from_one_of_the_losses():
    model = small(RECONSTRUCTION_WEIGHT=0.2, FREEZE_BN=False).train()
    model.set_training_classes(7)
    frames = clips(WAYS * SHOTS + QUERIES)
    features, losses = model.encode_for_training(model.backbone_features(frames), frames)
    support = features[: WAYS * SHOTS].unflatten(0, (1, WAYS, SHOTS))
    episode = Episode(support, features[WAYS * SHOTS :][None], torch.zeros(1, WAYS, 1))
    labels = EpisodeLabels(torch.tensor([[2, 0]]), torch.tensor([[6, 1, 4]]), torch.zeros(7, 1))
    losses |= model.training_losses(episode, labels, "inductive").losses
    assert losses.keys() == {"cross_entropy", "class", "contrast", "reconstruction"}
    sum(losses.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@torch.no_grad()
def test_the_reconstruction_loss_is_the_error_of_frame_differences():
    model = small(RECONSTRUCTION_WEIGHT=0.2)
    frames = clips(2)
    motion = model.motion(model.backbone_features(frames))
    _, losses = model.encode_for_training(model.backbone_features(frames), frames)
    each = [
        (model.decoder(motion[v : v + 1, t : t + 1], (SIZE, SIZE))[0, 0] - (frames[v, t + 1] - frames[v, t])).square()
        for v in range(2)
        for t in range(FRAMES - 1)
    ]
    assert losses["reconstruction"].item() == pytest.approx(0.2 * torch.stack(each).mean().item(), rel=1e-4)
