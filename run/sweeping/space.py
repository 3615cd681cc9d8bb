"""The search space of a sweep file: its keys, checked, and the values that a trial may have."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from run.sweeping.plan import SET_BY_THE_SWEEP, WITHOUT_EFFECT, SweepRun
from run.sweeping.sweep_file import Tuned
from utils.config import config_to_dict, leaves, load_config
from utils.errors import UserError
from utils.schema import Config, known_keys, mentioned_types
from utils.yaml_text import one_line

# Keys, or their beginnings, that cannot be tuned -> reason.
NOT_TUNABLE = {
    "TEST.": "a search never tests",
    "TRAIN.VAL_": "all trials need the same validation",
    "DATA.DATASET": "trials are compared on the same data",
    "DATA.DATA_DIR": "trials are compared on the same data",
    "DATA.SPLIT_DIR": "trials are compared on the same data",
    "MODEL.NAME": "a search tunes one method; write a sweep file for each",
    "DEBUG": "it shortens all runs",
    **dict.fromkeys(SET_BY_THE_SWEEP, "the sweep sets it"),
    **dict.fromkeys(WITHOUT_EFFECT, "it changes no number"),
}
VALIDATION_KEYS = {"TRAIN.WAY": "TEST.WAY", "TRAIN.SHOT": "TEST.SHOT"}  # unless the second key is set
DIGITS = 4  # number of values between LOW and HIGH


def checked_space(run: SweepRun, search: Sequence[Tuned]) -> list[SweepRun]:
    """Returns a run for each choice and each end of a range, one value changed at a time, after checking all of them.

    Raises:
        UserError: a key cannot be tuned, or a value is not valid; the message has one line per problem.
    """
    problems: dict[str, None] = {}
    variants = []
    for tuned in search:
        if reason := _reason_not_tunable(tuned.KEY, run.config):
            problems[f"SEARCH: {tuned.KEY} cannot be tuned: {reason}."] = None
            continue
        for value in tuned.VALUES or [tuned.LOW, tuned.HIGH]:
            try:
                variants.append(with_values(run, {tuned.KEY: value}))
            except UserError as error:
                problems.update({f"SEARCH: {line}": None for line in str(error).splitlines()})
        if not problems and not tuned.VALUES and not is_number(tuned, run.config):
            problems[f"SEARCH: {tuned.KEY} does not take numbers: list VALUES instead of LOW and HIGH."] = None
    if problems:
        raise UserError("\n".join(problems))
    return variants


def _reason_not_tunable(key: str, config: Config) -> str:
    """Returns why a key cannot be tuned, or "" if it can or is unknown."""
    for beginning, reason in NOT_TUNABLE.items():
        if key.startswith(beginning):
            return reason
    values = dict(leaves(config_to_dict(config)))
    if (fixed := VALIDATION_KEYS.get(key)) and values[fixed] is None:
        return f"it changes the episodes of the validation unless {fixed} is set"
    return "" if key in values or not any(known.startswith(f"{key}.") for known in values) else "it is a section"


def is_number(tuned: Tuned, config: Config) -> bool:
    """Returns whether a key takes numbers."""
    return bool(_types(tuned, config) & {int, float})


def is_whole(tuned: Tuned, config: Config) -> bool:
    """Returns whether a range has whole numbers."""
    return float not in _types(tuned, config)


def _types(tuned: Tuned, config: Config) -> set[Any]:
    return mentioned_types(known_keys(Config, type(config.MODEL))[tuned.KEY].annotation)


def with_values(run: SweepRun, values: Mapping[str, Any]) -> SweepRun:
    """Returns the run with other values of some keys; raises UserError if they are not valid together."""
    words = (*run.overrides, *(f"{key}={one_line(value)}" for key, value in values.items()))
    return run.with_overrides(words, load_config(run.config_file, words, warn=lambda _: None).config)


def own_values(run: SweepRun, search: Sequence[Tuned]) -> dict[str, Any] | None:
    """Returns the values of the config itself, or None if one of them is not in the search space."""
    now = dict(leaves(config_to_dict(run.config)))
    values = {tuned.KEY: now[tuned.KEY] for tuned in search}
    return values if all(tuned.contains(values[tuned.KEY]) for tuned in search) else None


def describe_space(search: Sequence[Tuned]) -> list[str]:
    """Returns a line for each key with its values."""
    return [f"{tuned.KEY}: {tuned.text}" for tuned in search]


def as_words(values: Mapping[str, Any]) -> str:
    """Returns values as `KEY=VALUE` words."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
