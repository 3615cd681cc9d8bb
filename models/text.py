"""Class names to text: the prompt templates, one text feature per class, and the check that no two are the same."""

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import FewShotModel
from utils.errors import UserError, first_of

TemplateSet = Literal["actionclip16", "photo"]

# CLIP-SPM averages over the 16 templates of ActionCLIP, as does the variant of CPM2C that the CLIP-SPM authors ran, our
# default. CLIP-FSAR, and CPM2C as its authors describe it, use the single one.
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

# Two features are the same if their distance is below this part of their length. The same sentence in batches of two
# sizes differs by 5e-7 of it through rounding, the most similar prompts of the benchmarks by 0.1 (tiny backbone).
SAME_FEATURE = 1e-5
MOST_SHOWN = 10  # classes or problems in a message
LONGEST_SHOWN = 80  # characters of a prompt in a message

logger = logging.getLogger(__name__)


@torch.no_grad()
def class_text_features(
    encode_text: Callable[[list[str]], Tensor],
    sentences: Sequence[Sequence[str]],
    normalise: Literal["none", "each", "each+mean"] = "none",
    batch_size: int = 256,
) -> Tensor:
    """One text feature per class: the mean over its sentences.

    Args:
        encode_text: list of M sentences -> float [M, D].
        sentences: those of each of C classes.
        normalise: what is scaled to unit length: nothing, the feature of each sentence, or the mean too.
        batch_size: sentences per call of the text tower.

    Returns:
        float32 [C, D].
    """
    everything = [sentence for of_class in sentences for sentence in of_class]
    batches = [everything[i : i + batch_size] for i in range(0, len(everything), batch_size)]
    features = torch.cat([encode_text(batch).float() for batch in batches])
    if normalise != "none":
        features = F.normalize(features, dim=-1)
    means = torch.stack([part.mean(dim=0) for part in features.split([len(of_class) for of_class in sentences])])
    return F.normalize(means, dim=-1) if normalise == "each+mean" else means


# --- class texts, checked -----------------------------------------------------------------------------------
# Where two classes have the same text, accuracy between them is chance.


def class_texts(model: FewShotModel, prompts: Mapping[str, str], source: str) -> Tensor:
    """Returns the text features of C classes; warns of prompts that the text tower does not read to their end.

    Args:
        model: its `class_text` computes the features. A method without text is not asked further.
        prompts: name of each class -> its text in a prompt.
        source: which classes these are and where the prompts can be changed, for messages.

    Returns:
        float32 [C, D].

    Raises:
        UserError: prompts without a word, features that are not finite, or two classes with the same feature; with the
            names of the classes.
    """
    features = model.class_text(list(prompts.values()))
    if features.shape[1] == 1:  # the zeros of a method without text
        return features
    cut = {name for name, is_cut in zip(prompts, model.cut_prompts(list(prompts.values())), strict=True) if is_cut}
    problems = _problems(features, prompts, cut)
    if problems:
        raise UserError("\n".join(f"{source}: {problem}" for problem in first_of(problems, MOST_SHOWN, " problems")))
    if cut:
        logger.warning(
            "%s: the text tower reads the beginning of these prompts only, as they are too long: %s",
            source, ", ".join(first_of(sorted(cut), MOST_SHOWN)),
        )  # fmt: skip
    return features


def _problems(features: Tensor, prompts: Mapping[str, str], cut: set[str]) -> list[str]:
    """What is wrong with the prompts of single classes and of pairs of classes, a line each."""
    names = list(prompts)
    empty = [name for name in names if not has_a_word(prompts[name])]
    problems = [
        f"the prompt of class {name!r} ({_shown(prompts[name])}) is empty of words; write one" for name in empty
    ]
    if ruined := [name for name, is_finite in zip(names, features.isfinite().all(dim=1), strict=True) if not is_finite]:
        shown = ", ".join(first_of(ruined, MOST_SHOWN))
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
    """Returns whether a text holds a letter, a digit or a picture."""
    return any(map(_is_of_a_word, text))


def _is_of_a_word(character: str) -> bool:
    """Whether a character is a letter, a digit or a picture, and not punctuation, a space or invisible."""
    return character.isalnum() or unicodedata.category(character) == "So"


def _same(features: Tensor) -> list[tuple[int, int]]:
    """Each row that equals an earlier one, with the first of these: (earlier, later)."""
    lengths = features.norm(dim=1)
    distances = torch.cdist(features[None], features[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    same = (distances <= SAME_FEATURE * torch.maximum(lengths[:, None], lengths)).tril(diagonal=-1).cpu()
    return [(int(row.nonzero()[0]), later) for later, row in enumerate(same) if row.any()]


def _cause(one: str, other: str, both_cut: bool) -> str:
    """Why two prompts give the same feature, in words that name them."""
    if one == other:
        return f"both prompts are {_shown(one)}"
    shown = f"the prompts {_shown(one)} and {_shown(other)}"
    if both_cut:
        return f"{shown} differ only where they are cut off for their length"
    if " ".join(one.lower().split()) == " ".join(other.lower().split()):
        return f"{shown} differ only in case and spaces, which the text tower does not see"
    return f"{shown} are the same to the text tower"


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= LONGEST_SHOWN else f"{prompt[:LONGEST_SHOWN]}...")
