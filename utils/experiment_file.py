"""Reads an experiment file and the files that it extends; maps keys of the released configs that differ here."""

import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.yaml_text import read_yaml_file

EXTENDS = "EXTENDS"


def read_experiment(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[str, dict[Any, Any]]]:
    """Returns the name and content of each file of an experiment, in rising precedence.

    The key EXTENDS of a file names one or more other files, relative to its folder; later ones take precedence over
    earlier ones, and the file itself over all of them.

    Args:
        path: the experiment file.
        extended_by: the chain of files that extend this one.

    Raises:
        UserError: a file is unreadable or not a mapping, or EXTENDS is circular or neither a file nor a list of files.
    """
    content = read_yaml_file(path, str(path))
    names = content.pop(EXTENDS, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{EXTENDS} in {path}: expected a file or a list of files, found {names!r}.")
    chain = (*extended_by, path)
    files = []
    for name in names:
        other = Path(os.path.normpath(path.parent / name))
        if not other.is_file():
            raise UserError(
                f"{EXTENDS} in {path}: no such file: {other}; name it relative to the folder of {path.name}."
            )
        if any(other.samefile(earlier) for earlier in chain):
            raise UserError(f"{EXTENDS} in {path}: {other} extends this file in turn; remove one of the two EXTENDS.")
        files += read_experiment(other, chain)
    return [*files, (str(path), content)]


# --- the released CLIP-SPM configs, which load unchanged ----------------------------------------------------

# Key -> its replacement. Each is accepted with a warning.
LEGACY_KEYS: dict[str, str] = {
    "TRAIN.CLASS_NAME": "class names come from the split",
    "TEST.CLASS_NAME": "class names come from the split",
    "DATA.SPLIT": "the split is always read from the list03 files in DATA.SPLIT_DIR",
    "DATA.DEBUG_LOADER": "DEBUG makes a short run",
    "DEVICE.NUM_GPUS": "torchrun decides how many GPUs are used",
    "DEVICE.GPU_ID": "CUDA_VISIBLE_DEVICES decides which GPU is used",
    "MODEL.USE_CLASSIFICATION": "MODEL.LOSSES.VIDEO_TEXT or MODEL.VIDEO_TEXT_WEIGHT weighs that loss",
    "MODEL.USE_CLASSIFICATION_VALUE": "MODEL.LOSSES.VIDEO_TEXT or MODEL.VIDEO_TEXT_WEIGHT weighs that loss",
    "MODEL.MOTION_COFF": "MODEL.LOSSES.MOTION replaced it",
    "MODEL.NORMAL_COFF": "MODEL.LOSSES.APPEARANCE replaced it",
    "MODEL.LMD": "MODEL.LOSSES.VIDEO_TEXT, LOCAL and GLOBAL replaced it",
    "MODEL.METRIC": "the method's own options replaced it",
    "MODEL.DROPOUT": "the method's own options replaced it",
    "MODEL.TRANS_LINEAR_OUT_DIM": "the method's own options replaced it",
}

# Printed once for a file with any of these, which loads but does not repeat the released experiment.
PRESET_HINT = (
    "a config of the released code does not reproduce its results here: the defaults are the clean preset (normalised "
    "pixels, validation on the val classes, queries scored alone); configs/clipspm/released/ has the released settings."
)

# Key -> old value -> new value.
LEGACY_VALUES: dict[str, dict[str, str]] = {
    "DATA.DATASET": {"hmdb": "hmdb51", "ucf": "ucf101", "ssv2": "ssv2_full", "ssv2_cmn": "ssv2_small"},
}
