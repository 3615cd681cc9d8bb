"""Converts native weights to those that the published code would have saved."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.released import ReleasedNames

MOST_BLOCKS = 3  # of the tiny towers, with `*` in place of numbers


def released_state(state: Mapping[str, Tensor], names: ReleasedNames) -> dict[str, Tensor]:
    """Returns the entries of a method's model under their released names; divided ones are joined."""
    back = {}
    for released, ours in {**names.used, **names.backbone}.items():
        for prefix in [ours] if isinstance(ours, str) else ours:
            for number in map(str, range(MOST_BLOCKS)) if "*" in prefix else [""]:
                back[prefix.rstrip(".").replace("*", number)] = released.rstrip(".").replace("*", number)
    parts: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        prefix = next(prefix for prefix in back if name == prefix or name.startswith(prefix + "."))
        parts.setdefault(back[prefix] + name.removeprefix(prefix), []).append(value)
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}
