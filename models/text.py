"""Text features of classes: prompt templates, one feature per class, and a check that no two classes share one."""

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import FewShotModel
from utils.errors import UserError, first_of
from utils.jobs import progress

TemplateSet = Literal["actionclip16", "photo"]
Normalisation = Literal["none", "each", "each+mean"]

# CLIP-SPM averages over the 16 templates of ActionCLIP, and so does CPM2C in the variant of the CLIP-SPM authors, the
# default here. CLIP-FSAR, CLIP-MEI and the CPM2C paper use the single template.
TEMPLATES: dict[TemplateSet, tuple[str, ...]] = {
    "actionclip16": (
        "a photo of action {}",
        "a picture of action {}",
        "Human action of {}",
        "{}, an action",
        "{} this is an action",
        "{}, a video of action",
        "Playing action of {}",
        "{}",
        "Playing a kind of action, {}",
        "Doing a kind of action, {}",
        "Look, the human is {}",
        "Can you recognize the action of {}?",
        "Video classification of {}",
        "A video of {}",
        "The man is {}",
        "The woman is {}",
    ),
    "photo": ("a photo of {}",),
}

# Two features count as equal if their distance, relative to their length, is smaller. Rounding changes the feature of a
# sentence by 5e-7 between batch sizes; the most similar prompts of the benchmarks differ by 0.1 (tiny backbone).
SAME_FEATURE = 1e-5
MAX_SHOWN = 10  # classes or problems listed in a message
LONGEST_SHOWN = 80  # characters of a prompt in a message

logger = logging.getLogger(__name__)


@torch.no_grad()
def sentence_features(
    encode_text: Callable[[list[str]], Tensor],
    sentences: Sequence[Sequence[str]],
    normalise: Normalisation = "none",
    batch_size: int = 256,
) -> list[Tensor]:
    """Returns the feature of each sentence.

    Args:
        encode_text: M sentences -> float [M, D].
        sentences: the sentences of each of C classes.
        normalise: "none" keeps the length of the features, the others scale each to unit length.
        batch_size: sentences per call of the text tower.

    Returns:
        float32 [M, D] for each class.
    """
    texts = [sentence for class_sentences in sentences for sentence in class_sentences]
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    shown = progress(batches, len(batches), "class texts", unit="batch")
    features = torch.cat([encode_text(batch).float() for batch in shown])
    if normalise != "none":
        features = F.normalize(features, dim=-1)
    return list(features.split([len(class_sentences) for class_sentences in sentences]))


def mean_features(classes: Sequence[Tensor], normalise: Normalisation = "none") -> Tensor:
    """Returns the mean over the sentences of each of C classes: float [M, D] each -> float [C, D]."""
    means = torch.stack([features.mean(dim=0) for features in classes])
    return F.normalize(means, dim=-1) if normalise == "each+mean" else means


# --- checks of class texts -----------------------------------------------------------------------------------
# If two classes have the same text, the accuracy between them is chance.


def check_class_texts(model: FewShotModel, prompts: Mapping[str, str], source: str, features: Tensor) -> None:
    """Checks that text features separate C classes; warns about prompts that are too long for the text tower.

    Args:
        model: its `class_text` computed the features. For a method without text, nothing is checked.
        prompts: class name -> text in a prompt.
        source: the classes and the source of their prompts, used in messages.
        features: float32 [C, D], the result of `class_text` for these prompts.

    Raises:
        UserError: a prompt has no word, a feature is not finite, or two classes have the same feature.
    """
    if features.shape[1] == 1:  # the zeros of a method without text
        return
    cut = {name for name, is_cut in zip(prompts, model.cut_prompts(list(prompts.values())), strict=True) if is_cut}
    problems = _problems(features, prompts, cut)
    if problems:
        raise UserError("\n".join(f"{source}: {problem}" for problem in first_of(problems, MAX_SHOWN, " problems")))
    if cut:
        logger.warning(
            "%s: these prompts are too long, so the text tower reads only their beginning: %s",
            source, ", ".join(first_of(sorted(cut), MAX_SHOWN)),
        )  # fmt: skip


def _problems(features: Tensor, prompts: Mapping[str, str], cut: set[str]) -> list[str]:
    """Returns a line for each class with an invalid prompt, and for each pair of classes with the same feature."""
    names = list(prompts)
    empty = [name for name in names if not has_a_word(prompts[name])]
    problems = [f"the prompt of class {name!r} ({_shown(prompts[name])}) contains no word; add one" for name in empty]
    is_finite = features.isfinite().all(dim=1).tolist()
    if invalid := [name for name, finite in zip(names, is_finite, strict=True) if not finite]:
        shown = ", ".join(first_of(invalid, MAX_SHOWN))
        return [*problems, f"the text features of {shown} are not finite; use other weights of the text tower"]
    for first, second in _same(features):
        one, other = names[first], names[second]
        if one in empty or other in empty:
            continue
        problems.append(
            f"classes {one!r} and {other!r} have the same text feature, so that text cannot separate them "
            f"({_cause(prompts[one], prompts[other], {one, other} <= cut)}); change a prompt"
        )
    return problems


def has_a_word(text: str) -> bool:
    """Returns whether a text contains a letter, a digit or a pictograph."""
    return any(map(_is_word_character, text))


def _is_word_character(character: str) -> bool:
    """Returns whether a character is a letter, a digit or a pictograph, not punctuation, a space or invisible."""
    return character.isalnum() or unicodedata.category(character) == "So"


def _same(features: Tensor) -> list[tuple[int, int]]:
    """Returns (first equal row, row) for each row that equals an earlier one."""
    lengths = features.norm(dim=1)
    distances = torch.cdist(features[None], features[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    same = (distances <= SAME_FEATURE * torch.maximum(lengths[:, None], lengths)).tril(diagonal=-1).cpu()
    return [(int(row.nonzero()[0]), later) for later, row in enumerate(same) if row.any()]


def _cause(one: str, other: str, both_cut: bool) -> str:
    """Returns a phrase that explains why two prompts give the same feature."""
    if one == other:
        return f"both prompts are {_shown(one)}"
    shown = f"the prompts {_shown(one)} and {_shown(other)}"
    if both_cut:
        return f"{shown} differ only after the point where they are cut off"
    if " ".join(one.lower().split()) == " ".join(other.lower().split()):
        return f"{shown} differ only in case and spaces, which the text tower does not see"
    return f"{shown} are the same to the text tower"


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= LONGEST_SHOWN else f"{prompt[:LONGEST_SHOWN]}...")
