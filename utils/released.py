"""Checkpoints saved by the published CLIP-SPM code, and by the CLIP-FSAR and CPM2C that came with it.

Such a file is a dictionary with `model_state_dict`, the accuracy `acc` as a NumPy scalar, and optimizer state.
The weights are mapped to our names; every entry is either used or named in the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.checkpoint import FORMAT, STATE
from utils.errors import UserError

BACKBONE = "backbone."  # CLIP's image tower, whose entries have the same names in open_clip
OUR_BACKBONE = "clip.visual."


@dataclass(frozen=True)
class ReleasedNames:
    """How a method's released weights are called: prefixes -> our prefixes, and prefixes that nothing uses."""

    used: Mapping[str, str]
    unused: Sequence[str] = ()


def is_released(content: Mapping[str, Any]) -> bool:
    """Whether what `load_checkpoint` returned was saved by the published code."""
    return "format" not in content


def convert_released(content: Mapping[str, Any], names: ReleasedNames, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Our form of a released checkpoint, and a report of all its entries.

    Args:
        content: what the file holds.
        names: of the method that it was trained with.
        path: of the file, for messages.

    Returns:
        content of a checkpoint without optimizer state and config; lines of the report.

    Raises:
        UserError: an entry that is neither used nor known to be unused, so that the file is of another method.
    """
    weights: dict[str, Tensor] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name, value in content[STATE].items():
        ours = our_name(name, names)
        if ours is not None:
            weights[ours] = value
        elif any(_begins(name, prefix) for prefix in names.unused):
            unused.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} entries of this released checkpoint are unknown to the method, for example "
            f"{unknown[0]}; set MODEL.NAME to the method that it was trained with"
        )
    tower = sum(name.startswith(OUR_BACKBONE) for name in weights)
    report = [
        f"{path}: saved by the published code, {len(content[STATE])} entries",
        f"used: {tower} of the image tower, {len(weights) - tower} of the head",
        f"not used by any score or loss: {', '.join(unused) or 'none'}",
        "not stored in such a file, hence taken from the config: all other numbers of the method; and DATA.IMG_NORM, "
        "which the published code trains without (false)",
    ]
    converted = {
        "format": FORMAT,
        "model": weights,
        "episode": content.get("iteration", 0),
        "config": None,
    }
    return converted, report


def our_name(name: str, names: ReleasedNames) -> str | None:
    """Our name of a released entry, None if nothing of ours corresponds to it."""
    if name.startswith(BACKBONE):
        return OUR_BACKBONE + name.removeprefix(BACKBONE)
    for released, ours in names.used.items():
        if _begins(name, released):
            return ours + name.removeprefix(released)
    return None


def _begins(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies below it: context1 is no prefix of context10.weight."""
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def fits(state: Mapping[str, Any], names: ReleasedNames) -> bool:
    """Whether these entries are those of a method: each is known, and everything the method has is there."""
    head = [name for name in state if not name.startswith(BACKBONE)]
    known = all(
        our_name(name, names) is not None or any(_begins(name, prefix) for prefix in names.unused) for name in head
    )
    return known and all(any(_begins(name, prefix) for name in head) for prefix in names.used)
