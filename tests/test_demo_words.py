"""Every method fits the demo set in which class names matter worse with the texts of other classes.

This detects a broken text path, which would give the same accuracy with any text. Heads are trained for a few
steps on features of the committed weights.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from episodes.demo.actions import PROMPTS, SPLITS
from episodes.demo.render import render_clip
from models.base import Episode, EpisodeLabels, FewShotModel
from models.tiny_clip import DEMO_IMAGE_SIZE

WAY, QUERIES, CLIPS = 5, 2, {"train": 4, "val": 10}
TRANSFORMER = {"HEADS": 4, "HEAD_DIM": 32, "HIDDEN": 128, "DROPOUT": 0.0, "HIDDEN_DROPOUT": 0.0}
OPTIONS = {
    "zeroshot": {},
    "clipfsar": {"TRANSFORMER": TRANSFORMER, "OTAM_LAMBDA": 0.1},
    "cpm2c": {"TRANSFORMER": TRANSFORMER, "TOKEN_DEVIATION": 0.02, "DISTANCES": {"OTAM_LAMBDA": 0.1}},
    "clipspm": {
        "TRANSFORMER": TRANSFORMER,
        "SPM": {"GENERATOR_HIDDEN": 128},
        "HSMR": {"ENABLED": False},  # it adds a loss only
        "DISTANCES": {"OTAM_LAMBDA": 0.1},
    },
}


def built(method: str) -> FewShotModel:
    torch.manual_seed(0)
    tower = {"BACKBONE": "tiny", "CLIP_WEIGHTS": "demo", "TRAINABLE": "head", "TEXT_TEMPLATES": "photo"}
    return models.build(method, image_size=DEMO_IMAGE_SIZE, **tower, **OPTIONS[method])


@cache
@torch.no_grad()
def features(split: str) -> Tensor:
    """Returns the features of some clips of each class: float32 [C, V, T, D]."""
    model = built("zeroshot")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixel_mean, model.pixel_std))
    classes = []
    for name in SPLITS[split]:
        clips = [render_clip(name, 0, number, frames=8, demo_set="actions") for number in range(CLIPS[split])]
        frames = torch.from_numpy(np.stack(clips)[:, :, 4:68, 4:68]).permute(0, 1, 4, 2, 3).float() / 255
        classes.append(model.encode((frames - mean) / std))
    return torch.stack(classes)


def episode(rng: np.random.Generator, split: str, text: Tensor, queries: int) -> tuple[Episode, Tensor, Tensor]:
    """Returns one 1-shot episode, its query labels int64 [1, Q] and its class ids int64 [1, N]."""
    bank = features(split)
    classes = torch.from_numpy(rng.choice(len(bank), WAY, replace=False))
    videos = [bank[i, torch.from_numpy(rng.choice(bank.shape[1], 1 + queries, replace=False))] for i in classes]
    support = torch.stack([video[:1] for video in videos])
    query = torch.cat([video[1:] for video in videos])
    labels = torch.arange(WAY).repeat_interleave(queries)
    return Episode(support[None], query[None], text[classes][None]), labels[None], classes[None]


def train(model: FewShotModel, steps: int) -> None:
    """Trains the head."""
    if not steps:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    rng = np.random.default_rng(0)
    text = model.class_text([PROMPTS[name] for name in SPLITS["train"]])
    for _ in range(steps):
        parts, labels, classes = episode(rng, "train", text, QUERIES)
        loss = model.training_losses(parts, EpisodeLabels(labels, classes, text), "inductive").total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def log_probabilities(model: FewShotModel, episodes: int = 100) -> tuple[float, float]:
    """Returns the mean log-probability of the true class with the correct texts and with those of other classes."""
    rng = np.random.default_rng(1)
    text = model.class_text([PROMPTS[name] for name in SPLITS["val"]])
    parts, labels, _ = zip(*(episode(rng, "val", text, 1) for _ in range(episodes)), strict=True)
    support, query, own = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    scores = (model.score(support, query, texts) for texts in (own, own.roll(1, dims=1)))
    found = (model.probabilities(kept).log().gather(-1, torch.cat(labels)[..., None]).mean() for kept in scores)
    return next(found).item(), next(found).item()


@pytest.mark.parametrize(("method", "steps"), [("zeroshot", 0), ("clipfsar", 40), ("cpm2c", 40), ("clipspm", 40)])
def test_wrong_texts_lower_the_probability_of_the_true_class(method: str, steps: int):
    model = built(method)
    train(model.train(), steps)
    own, others = log_probabilities(model.eval())
    assert own > others + 0.01  # nats
