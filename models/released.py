"""Converts checkpoints of the methods' released code; each method lists the names of its released weights.

Such a file is a dictionary with `model_state_dict`, the accuracy `acc` as a NumPy scalar, and optimizer state.
The entries are renamed to the names in this project; each entry is either used or listed in the report.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import FORMAT, STATE
from utils.errors import UserError, counted

BACKBONE = "backbone."  # CLIP's image tower; its entries have the same names in open_clip
OUR_BACKBONE = "clip.visual."
OUR_RESNET = "encoder.visual"
# Names of CLIP's image tower in Hugging Face's transformers; ours has query, key and value in one entry.
HUB_TOWER = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layernorm": "ln_pre",
    "layers.*.layer_norm1": "transformer.resblocks.*.ln_1",
    "layers.*.layer_norm2": "transformer.resblocks.*.ln_2",
    "layers.*.self_attn.out_proj": "transformer.resblocks.*.attn.out_proj",
    **{
        f"layers.*.self_attn.{part}_proj.{kind}": f"transformer.resblocks.*.attn.in_proj_{kind}"
        for kind in ("weight", "bias")
        for part in ("q", "k", "v")
    },
    "layers.*.mlp.fc1": "transformer.resblocks.*.mlp.c_fc",
    "layers.*.mlp.fc2": "transformer.resblocks.*.mlp.c_proj",
    "post_layernorm": "ln_post",
    "projection.weight": "proj",
}
# torchvision's ResNet as an `nn.Sequential` of numbered layers; the missing numbers have no weights.
SEQUENTIAL_RESNET = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # not trained


@dataclass(frozen=True)
class ReleasedNames:
    """The names of a method's released weights, and the options that their shapes imply.

    used: released prefix -> our prefix, or several prefixes that share the rows of the released entry equally. A `*` in
        both stands for any number, such as that of a block. Released entries that map to the same name are the rows of
        one entry, in this order.
    unused: released prefixes that no score or loss uses, also below those in `used`.
    backbone: released prefix -> our prefix.
    transposed: released prefixes of entries with rows and columns exchanged.
    fixed: options that give the model the entries and shapes of the released code.
    rows: option -> our name of the entry with this number of rows.
    ratios: option -> our name of the entry with this number of rows per column.
    """

    used: Mapping[str, str | Sequence[str]]
    unused: Sequence[str] = ()
    backbone: Mapping[str, str] = field(default_factory=lambda: {BACKBONE: OUR_BACKBONE})
    transposed: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    ratios: Mapping[str, str] = field(default_factory=dict)


def sequential_resnet(released: str) -> dict[str, str]:
    """Returns released prefix -> our prefix for a ResNet that the released code stored as an `nn.Sequential`."""
    return {f"{released}.{number}": f"{OUR_RESNET}.{name}" for number, name in SEQUENTIAL_RESNET.items()}


def hub_tower(released: str) -> dict[str, str]:
    """Returns released prefix -> our prefix for CLIP's image tower below `released`, under Hugging Face's names."""
    return {f"{released}.{name}": f"{OUR_BACKBONE}{ours}" for name, ours in HUB_TOWER.items()}


def is_released(content: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint's content was saved by the released code."""
    return "format" not in content


def convert_released(content: Mapping[str, Any], names: ReleasedNames, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Converts a released checkpoint, and reports all its entries.

    Args:
        content: content of the file.
        names: names of the method in the file.
        path: path of the file, used in messages.

    Returns:
        content of a checkpoint without optimizer state and config; lines of the report.

    Raises:
        UserError: an entry is neither used nor known to be unused, so the file belongs to another method; or the
            optimizer has more parameters than the file.
    """
    _raise_if_entries_lost(content, path)
    state = content[STATE]
    weights = our_weights(state, names)
    unused = [name for name in state if _is_unused(name, names)]
    if unknown := [name for name in state if not _is_unused(name, names) and not our_names(name, names)]:
        raise UserError(
            f"{path}: the method does not know {counted(len(unknown), 'entry')} of this released checkpoint, for "
            f"example {unknown[0]}; set MODEL.NAME to its method"
        )
    tower = sum(_of_backbone(name, names) for name in state)
    report = [
        f"{path}: saved by the released code, {counted(len(state), 'entry')}",
        f"used: {tower} of the image tower, {len(state) - len(unused) - tower} of the head",
        f"not used by any score or loss: {', '.join(unused) or 'none'}",
        "not stored in such a file, so read from the config: all other settings of the method, and DATA.IMG_NORM "
        "(false in the released code)",
    ]
    converted = {
        "format": FORMAT,
        "model": weights,
        "episode": content.get("iteration", 0),
        "config": None,
    }
    return converted, report


def _raise_if_entries_lost(content: Mapping[str, Any], path: Path) -> None:
    """Raises UserError if the optimizer has more parameters than the file, which means that entries were lost."""
    parameters = [name for name in content[STATE] if name.rpartition(".")[2] not in BUFFERS]
    for key, value in content.items():
        groups = value.get("param_groups") if isinstance(value, dict) else None
        groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        trained = sum(len(ids) for group in groups if isinstance(ids := group.get("params"), list))
        if trained > len(parameters):
            raise UserError(
                f"{path}: contains {counted(len(parameters), 'parameter')}, but {key} has {trained}: entries "
                "are missing; copy the file again or use another one"
            )


def our_names(name: str, names: ReleasedNames) -> tuple[str, ...]:
    """Returns our names of a released entry: none, one, or several that share its rows."""
    return _place_and_names(name, names)[1]


def _place_and_names(name: str, names: ReleasedNames) -> tuple[int, tuple[str, ...]]:
    """Returns the position of a released entry's prefix among all prefixes, and our names for the entry."""
    if _is_unused(name, names):
        return 0, ()
    for place, (released, renamed) in enumerate({**names.backbone, **names.used}.items()):
        if match := _match(name, released):
            number, rest = match
            prefixes = (renamed,) if isinstance(renamed, str) else renamed
            return place, tuple(prefix.rstrip(".").replace("*", number) + rest for prefix in prefixes)
    return 0, ()


def our_weights(state: Mapping[str, Tensor], names: ReleasedNames) -> dict[str, Tensor]:
    """Returns the released weights under our names, without the unused ones."""
    rows: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        place, targets = _place_and_names(name, names)
        if any(_begins(name, prefix) for prefix in names.transposed):
            value = value.T.contiguous()
        parts = value.chunk(len(targets)) if len(targets) > 1 else [value] * len(targets)
        for target, part in zip(targets, parts, strict=True):
            rows.setdefault(target, {})[place] = part
    return {
        name: torch.cat([parts[place] for place in sorted(parts)]) if len(parts) > 1 else next(iter(parts.values()))
        for name, parts in rows.items()
    }


def _is_unused(name: str, names: ReleasedNames) -> bool:
    return any(_begins(name, prefix) for prefix in names.unused)


def _of_backbone(name: str, names: ReleasedNames) -> bool:
    return any(_begins(name, prefix) for prefix in names.backbone)


def _begins(name: str, prefix: str) -> bool:
    """Returns whether a dotted name is `prefix` or below it: context1 is not a prefix of context10.weight."""
    return _match(name, prefix) is not None


def _match(name: str, prefix: str) -> tuple[str, str] | None:
    """Returns the number that matches `*` in a prefix, and the rest of the name; None if the name does not match."""
    match = _pattern(prefix).match(name)
    return (match[1], name[match.end() :]) if match else None


@cache
def _pattern(prefix: str) -> re.Pattern[str]:
    before, _, after = prefix.rstrip(".").partition("*")
    number = r"(\d+)" if "*" in prefix else "()"
    return re.compile(re.escape(before) + number + re.escape(after) + r"(?=\.|$)")


def misfits(state: Mapping[str, Any], names: ReleasedNames) -> list[str]:
    """Returns a phrase for each missing prefix of a method's head, and for each entry that the method does not know."""
    head = [name for name in state if not _of_backbone(name, names)]
    unknown = [name for name in head if not our_names(name, names) and not _is_unused(name, names)]
    missing = [prefix for prefix in names.used if not any(_begins(name, prefix) for name in head)]
    return [f"{prefix} is missing" for prefix in missing] + [f"{name} is unknown" for name in unknown]


def implied_options(weights: Mapping[str, Tensor], names: ReleasedNames) -> dict[str, Any]:
    """Returns the options of MODEL that the shapes of weights imply.

    Args:
        weights: weights under the names of this project.
        names: names of the method.

    Returns:
        option -> value, nested by section.
    """
    options = dict(names.fixed)
    for measures, of_width in ((names.rows, False), (names.ratios, True)):
        for option, entry in measures.items():
            shape = weights[entry].shape if entry in weights else torch.Size()
            if len(shape) >= 2 and shape.numel() and shape[:-2].numel() == 1:
                rows, columns = shape[-2:]
                options[option] = (rows + 0.5) / columns if of_width else rows  # a layer rounds its number of rows down
    sections: dict[str, Any] = {}
    for option, value in options.items():
        section, _, key = option.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[key] = value
    return sections
