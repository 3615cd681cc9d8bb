"""Compares the config of a resumed run with that of its checkpoint, and that of a test run with the training run's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import config_from_dict, config_to_dict, leaves
from utils.errors import UserError

# A resumed run may differ in these (beginnings of) keys without becoming another experiment.
MAY_CHANGE_ON_RESUME = (
    "INFO", "LOG.", "TEST.", "CHECKPOINT.", "DEVICE.", "DATA.DATA_DIR", "DATA.SPLIT_DIR", "DATA.NUM_WORKERS",
    "DATA.CHECK_VIDEOS", "DATA.MAX_BAD_CLIPS", "TRAIN.PRINT_FREQ", "TRAIN.CHUNK", "MODEL.ACTIVATION_CHECKPOINTING",
    "MODEL.COMPILE", "MODEL.TEXT_FILE",
)  # fmt: skip
# Of these, the keys that affect a validation: its accuracy is compared with those of earlier validations.
VALIDATION_TASK = ("TEST.WAY", "TEST.SHOT", "TEST.QUERY_PER_CLASS", "TEST.SEED", "TEST.PROTOCOL")
LENGTH = "TRAIN.TRAIN_EPISODES"
METHOD = "MODEL.NAME"

# The keys that a checkpoint's weights were trained with, and those of them that a test run may choose.
MODEL_KEYS = ("MODEL.", "DATA.DATASET", "DATA.SEQ_LEN", "DATA.IMG_SIZE", "DATA.SHORT_SIDE", "DATA.IMG_NORM")
FREE_IN_TESTS = ("MODEL.SEED", "MODEL.TRAINABLE", "MODEL.ACTIVATION_CHECKPOINTING", "MODEL.COMPILE")


def check_resumed_config(
    stored: Mapping[str, Any], now: Mapping[str, Any], path: Path, episode: int, validates: bool
) -> None:
    """Checks that a resumed run continues the same experiment.

    The note, the hardware, paths and, once all validations are done, the test settings may change. So may
    TRAIN.TRAIN_EPISODES, unless the learning rate of the completed steps depended on it.

    Args:
        stored: the config of the checkpoint.
        now: the config of the run.
        path: path of the checkpoint, for messages.
        episode: number of episodes that the checkpoint was trained on.
        validates: whether a validation is still to come.

    Raises:
        UserError: keys that may not change differ; the message names them.
    """
    before, after = _values_of(stored), dict(leaves(now))
    for values in (before, after):
        if values.get("TEST.PROTOCOL") == "both":  # validations are then inductive
            values["TEST.PROTOCOL"] = "inductive"
    differ = _different_keys(before, after)
    fixed = VALIDATION_TASK if validates else ()
    differ = [key for key in differ if key in fixed or not key.startswith(MAY_CHANGE_ON_RESUME)]
    if LENGTH in differ and after["SOLVER.LR_SCH"] != "cosine" and after[LENGTH] >= episode:
        differ.remove(LENGTH)
    if differ:
        shown = ", ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in differ[:5])
        reason = f"; {LENGTH} {_why_not_length(after, episode)}" if LENGTH in differ else ""
        raise UserError(
            f"cannot resume {path} with another config ({shown}{reason}): "
            "set the keys back, or start a new run with another CHECKPOINT.CHECKPOINT_DIR."
        )


def _why_not_length(now: Mapping[str, Any], episode: int) -> str:
    """Returns why the length of a run cannot change to this value: the end of a sentence that begins with the key."""
    if now[LENGTH] < episode:
        return f"cannot be less than the {episode} that are already trained"
    return "cannot change while SOLVER.LR_SCH is cosine, whose rate depends on it"


def differences_from_training(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each option of the method or of the clips that differs between training and test run.

    Some differences are intended (another inference mode or matcher), others are mistakes, so they are only reported.
    """
    before, after = _values_of(stored), dict(leaves(now))
    return [
        f"{key}: trained with {before.get(key)}, tested with {after.get(key)}"
        for key in _different_keys(before, after)
        if key.startswith(MODEL_KEYS) and key not in FREE_IN_TESTS
    ]


def _different_keys(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the keys with different values; for another method its name comes first, without the options of one."""
    differ = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    if METHOD in differ:
        one_sided = {key for key in before.keys() ^ after.keys() if key.startswith("MODEL.")}
        differ = [METHOD, *(key for key in differ if key != METHOD and key not in one_sided)]
    return differ


def _values_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a stored config by their dotted keys; newer keys have their defaults."""
    try:
        return dict(leaves(config_to_dict(config_from_dict(stored))))
    except UserError:  # its method or one of its options no longer exists
        return dict(leaves(stored))
