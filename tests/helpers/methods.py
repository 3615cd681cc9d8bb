"""Every method at a tiny size, and random episodes for it."""

import inspect
from typing import Any, get_args

import torch

import models
from models.base import Episode, FewShotModel, ProtocolName
from tests.helpers.shipped import tiny_backbone
from utils.schema import ModelOptions, Section

IMAGE_SIZE = 32
PROTOCOLS = get_args(ProtocolName)
# Sizes of a method's layers, at any level of its options; no dropout, so that runs can be compared.
SMALL_SIZES = {"HEADS": 2, "HEAD_DIM": 8, "HIDDEN": 16, "GENERATOR_HIDDEN": 16, "WIDTH": 16}
# Methods that train nothing -> the reason.
WITHOUT_TRAINING: dict[str, str] = {"zeroshot": "CLIP as loaded, the baseline"}


def small_options(options_class: type[Section], **changes: Any) -> dict[str, Any]:
    """Returns overrides that make every part of a method small and disable dropout, in all nested sections."""
    for name, field in options_class.model_fields.items():
        if issubclass(options_class, ModelOptions) and not options_class.reads(name):
            continue
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            changes.setdefault(name, small_options(field.annotation))
        elif name in SMALL_SIZES:
            changes.setdefault(name, SMALL_SIZES[name])
        elif "DROPOUT" in name:
            changes.setdefault(name, 0.0)
    return changes


def build(name: str, **changes: Any) -> FewShotModel:
    """Returns a small method on a tiny backbone, the same weights at every call."""
    torch.manual_seed(0)
    options_class: type[ModelOptions] = models.options_of(name)
    changes = {
        "BACKBONE": tiny_backbone(name),
        "CLIP_WEIGHTS": "random",
        "FREEZE_BN": False,
        **changes,
    }
    return models.build(options_class(**small_options(options_class, NAME=name, **changes)), IMAGE_SIZE)


def random_episode(model: FewShotModel, episodes=1, ways=3, shots=2, queries=3, frames=4, seed=0) -> Episode:
    """Returns random features and texts in the shapes that the method computes from videos."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shape = model.encode(torch.rand(1, frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)).shape[1:]
        width = model.class_text(["a"]).shape[-1]
    return Episode(
        torch.randn(episodes, ways, shots, *shape, generator=generator),
        torch.randn(episodes, queries, *shape, generator=generator),
        torch.randn(episodes, ways, width, generator=generator),
    )
