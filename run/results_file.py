"""Reads the files of a test run, results.json and answers.npz, and checks that they fit together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run.answers import Answers
from utils.errors import UserError

# Entry -> its type; a list contains text. Older results have fewer optional entries.
COMPARED: dict[str, Any] = {
    "dataset": str, "split": str, "way": int, "shot": int, "query_per_class": int, "episodes": int, "seed": int,
    "protocol": str, "split_sha256": str, "episode_list_sha256": str, "label": str,
}  # fmt: skip
REPORTED: dict[str, Any] = COMPARED | {
    "accuracy": int | float, "interval_95": int | float | None, "accuracy_by_protocol": dict, "checkpoint": str,
    "checkpoint_episodes": int, "checkpoint_sha256": str, "trained_parameters": int, "config": dict,
    "checkpoint_selected_on": str, "trained_with_seed": int | None, "split_notes": list, "differs_from_default": list,
    "differs_from_training": list,
}  # fmt: skip
OPTIONAL: dict[str, Any] = {
    "answers": str, "trained_with_seed": int | None, "checkpoint_selected_on": str, "data_report_sha256": str | None,
    "differs_from_default": list, "trained_parameters": int, "features_stored_in": str | None, "bad_clips": list,
    "best_validation_accuracy": int | float | None, "test_seconds": int | float, "git": dict | None, "versions": dict,
    "device": str | None, "info": str | None,
}  # fmt: skip
OF_A_PROTOCOL: dict[str, Any] = {
    "accuracy": int | float, "interval_95": int | float | None, "interval_95_videos": int | float | None
}  # fmt: skip


def read_results(path: Path, needed: Mapping[str, Any]) -> tuple[dict[str, Any], Answers]:
    """Reads a results.json and its answers.npz.

    Args:
        path: of results.json.
        needed: entries that must be in it, with their types: COMPARED or REPORTED.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong to each other.
    """
    try:
        results = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a run directory with test results, or a results.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not the results.json of a test run; give its results.json or its directory"
        ) from error
    if wrong := _wrong_entry(results, needed):
        raise UserError(
            f"{path} is not the results.json of a test run: {wrong} is missing or has another type; run the test again"
        )
    answers_path = path.parent / results.get("answers", "answers.npz")
    answers = Answers.load(answers_path)
    scores = answers.scores.get(results["protocol"])
    if scores is None or (len(scores), scores.shape[2]) != (results["episodes"], results["way"]):
        task = ", ".join(f"{name} {results[name]}" for name in ("protocol", "episodes", "way"))
        raise UserError(f"{answers_path} does not contain the answers of {path} ({task}); run the test again")
    return results, answers


def _wrong_entry(results: Any, needed: Mapping[str, Any]) -> str | None:
    """Returns the name of the first entry that is missing or has another type, None if there is none."""
    if not isinstance(results, dict):
        return next(iter(needed))
    for name, kind in needed.items():
        if name not in results or not _is_a(results[name], kind):
            return name
    for name, kind in OPTIONAL.items():
        if name in results and not _is_a(results[name], kind):
            return name
    if "accuracy_by_protocol" not in needed:
        return None
    protocols = results["accuracy_by_protocol"]
    if results["protocol"] not in protocols or not all(_is_accuracy(entry) for entry in protocols.values()):
        return "accuracy_by_protocol"
    return None


def _is_accuracy(entry: Any) -> bool:
    """Returns whether an entry has the accuracy under one protocol."""
    return isinstance(entry, dict) and all(_is_a(entry.get(name), kind) for name, kind in OF_A_PROTOCOL.items())


def _is_a(value: Any, kind: Any) -> bool:
    """Returns whether a value has a type; true and false are not numbers, and a list contains text."""
    if isinstance(value, list):
        return kind is list and all(isinstance(entry, str) for entry in value)
    return isinstance(value, kind) and not isinstance(value, bool)
