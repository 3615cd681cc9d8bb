"""Class names to text: the prompt templates, and one text feature per class."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from einops import reduce
from torch import Tensor

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


def sentences_of(prompt_names: Sequence[str], templates: TemplateSet) -> list[str]:
    """Returns the sentences of all classes, grouped by class: C names -> C * S sentences."""
    return [template.format(name) for name in prompt_names for template in TEMPLATES[templates]]


@torch.no_grad()
def class_text_features(
    encode_text: Callable[[list[str]], Tensor],
    prompt_names: Sequence[str],
    templates: TemplateSet,
    batch_size: int = 256,
) -> Tensor:
    """One text feature per class: the plain mean over the templates, nothing normalised before or after.

    Args:
        encode_text: list of M sentences -> float [M, D].
        prompt_names: C class names as they appear in a sentence.
        templates: which set of sentences.
        batch_size: sentences per call of the text tower.

    Returns:
        float32 [C, D].
    """
    sentences = sentences_of(prompt_names, templates)
    batches = [sentences[i : i + batch_size] for i in range(0, len(sentences), batch_size)]
    features = torch.cat([encode_text(batch).float() for batch in batches])
    return reduce(features, "(c s) d -> c d", "mean", c=len(prompt_names))
