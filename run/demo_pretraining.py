"""The contrastive training of the demo's small CLIPs; `run/pretrain_demo.py` is its command."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.demo.captions import captioned_frame
from models.text import TEMPLATES
from models.tiny_clip import DEMO_IMAGE_SIZE, TINY_MAP_FEATURES, VIT, demo_clip

SENTENCES = (*TEMPLATES["actionclip16"], *TEMPLATES["photo"])
LARGEST_SCALE = math.log(100.0)  # of the logits, as in CLIP
RECORDED_LOSSES = 4  # of the first steps, in the note of the file


@dataclass(frozen=True)
class Recipe:
    """Training settings."""

    steps: int = 700
    batch: int = 256
    frames: int = 16_000  # distinct
    rate: float = 2e-3
    warmup: int = 50  # steps
    seed: int = 0


RECIPES = {"tiny": Recipe(), "tiny-vit": Recipe(steps=3000, batch=64)}
TEACHER, CAPTION_WEIGHT = "tiny", 0.3  # of tiny-vit


class Batch(NamedTuple):
    """The batch of one step.

    frames: normalised, float32 [V, 3, H, W].
    tokens: int64 [C, L], a sentence for each of the C different captions of the frames.
    caption_of_frame: int64 [V].
    """

    frames: Tensor
    tokens: Tensor
    caption_of_frame: Tensor


def pretrain(objective: "Contrast | Imitation", batches: Iterator[Batch], recipe: Recipe) -> Iterator[float]:
    """Trains a small CLIP in place and yields the loss of each step."""
    optimizer = torch.optim.Adam(objective.parameters, lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, recipe))
    for batch in batches:
        loss = objective.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def _rate_factor(step: int, recipe: Recipe) -> float:
    """Returns the learning rate factor: linear warm-up, then cosine decay to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


class Contrast:
    """Both towers learn to give a frame and its caption similar features."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip.train().requires_grad_(True)
        self.parameters = list(clip.parameters())

    def loss(self, batch: Batch) -> Tensor:
        return caption_loss(self.clip, self.clip.visual(batch.frames), batch)


class Imitation:
    """The image tower of tiny-vit learns from captions and from a trained tiny CLIP, whose text tower it gets.

    It learns the teacher's features of the whole frame and of its 4 x 4 parts, the output of the teacher's last
    convolution. A layer that is used only in training computes each part from 2 x 2 patches.
    """

    def __init__(self, clip: Any, teacher: Any) -> None:
        texts = {name: value for name, value in teacher.state_dict().items() if not name.startswith("visual.")}
        clip.load_state_dict(texts, strict=False)
        clip.train().requires_grad_(False)
        self.clip, self.teacher = clip, teacher.visual.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.parts = nn.Conv2d(VIT["width"], TINY_MAP_FEATURES, kernel_size=2, stride=2)
        self.parameters = [*clip.visual.requires_grad_(True).parameters(), *self.parts.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            parts = self.teacher.convolutions(batch.frames)
            whole = self.teacher.project(parts.flatten(1))
        levels = self.clip.visual.forward_intermediates(batch.frames, indices=1, normalize_intermediates=True)
        features, (patches,) = levels["image_features"], levels["image_intermediates"]
        errors = _relative_error(features, whole) + _relative_error(self.parts(patches), parts)
        return errors + CAPTION_WEIGHT * caption_loss(self.clip, features, batch)


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Returns the mean squared error in units of the variance of the expected values."""
    return F.mse_loss(actual, expected) / expected.var()


def build_objective(backbone: str, clip: nn.Module) -> Contrast | Imitation:
    """Returns the training objective of a backbone."""
    return Contrast(clip) if backbone == TEACHER else Imitation(clip, demo_clip(TEACHER, DEMO_IMAGE_SIZE))


def caption_loss(clip: Any, features: Tensor, batch: Batch) -> Tensor:
    """Computes CLIP's loss from the features of the frames, float [V, D]."""
    texts = F.normalize(encode_text(clip, batch.tokens), dim=-1)
    scale = clip.logit_scale.clamp(max=LARGEST_SCALE).exp()
    return contrast(scale * F.normalize(features, dim=-1) @ texts.T, batch.caption_of_frame)


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """Computes the same as `clip.encode_text` without the padding: int64 [C, L] -> float [C, D]."""
    ends = tokens.argmax(dim=-1)  # the end of a text is the largest token, and tokens do not attend to later ones
    length = int(ends.max()) + 1
    hidden = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
    return hidden[torch.arange(len(tokens)), ends] @ clip.text_projection


def contrast(logits: Tensor, caption_of_frame: Tensor) -> Tensor:
    """Computes CLIP's loss for frames that may share captions.

    Args:
        logits: float [V, C] of V frames and their C different captions.
        caption_of_frame: int64 [V].

    Returns:
        the mean of the cross-entropies over captions (for each frame) and over frames (for each caption), a scalar.
    """
    frame_loss = F.cross_entropy(logits, caption_of_frame)
    caption_log_likelihood = logits.log_softmax(dim=0).gather(1, caption_of_frame[:, None]).mean()
    return 0.5 * (frame_loss - caption_log_likelihood)


def draw_batches(recipe: Recipe) -> Iterator[Batch]:
    """Yields a batch for each step. Every frame is used before any is repeated, each time with a random crop."""
    import open_clip  # imported late, as it takes seconds
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    tokenize = open_clip.get_tokenizer("ViT-B-16")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    rng = np.random.default_rng(recipe.seed)
    rendered: dict[int, tuple[np.ndarray, str]] = {}
    for numbers in _frame_numbers(rng, recipe):
        for number in numbers:
            if number not in rendered:
                rendered[number] = captioned_frame(recipe.seed, number)
        frames = np.stack([_random_crop(rng, rendered[number][0]) for number in numbers])
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(255)
        captions, caption_of_frame = np.unique([rendered[number][1] for number in numbers], return_inverse=True)
        sentences = [SENTENCES[rng.integers(len(SENTENCES))].format(caption) for caption in captions]
        yield Batch((images - mean) / std, tokenize(sentences), torch.from_numpy(caption_of_frame))


def _random_crop(rng: np.random.Generator, frame: np.ndarray) -> np.ndarray:
    """Cuts DEMO_IMAGE_SIZE pixels out of a square frame: uint8 [H, W, 3]."""
    top, left = rng.integers(0, len(frame) - DEMO_IMAGE_SIZE + 1, 2)
    return frame[top : top + DEMO_IMAGE_SIZE, left : left + DEMO_IMAGE_SIZE]


def _frame_numbers(rng: np.random.Generator, recipe: Recipe) -> Iterator[list[int]]:
    """Yields the numbers of the frames of each step."""
    waiting: list[int] = []
    for _ in range(recipe.steps):
        if len(waiting) < recipe.batch:
            waiting = rng.permutation(recipe.frames).tolist()
        yield waiting[: recipe.batch]
        waiting = waiting[recipe.batch :]
