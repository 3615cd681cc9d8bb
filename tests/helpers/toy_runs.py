"""Run directories with made-up answers, as a finished run leaves them."""

from pathlib import Path
from typing import Any

import numpy as np

from run.answers import Answers
from run.results import write_results

TASK = {
    "dataset": "toy", "split": "test", "way": 2, "shot": 1, "query_per_class": 1, "episodes": 4, "seed": 6,
    "protocol": "inductive", "split_sha256": "0" * 64, "episode_list_sha256": "1" * 64, "label": "otam",
    "differs_from_default": [], "checkpoint_selected_on": "val", "data_report_sha256": None,
}  # fmt: skip
VIDEOS = [f"{name}/{number}" for name in ("jump", "run") for number in range(4)]
SUPPORT = [[[0], [4]], [[1], [5]], [[2], [6]], [[3], [7]]]
QUERY = [[1, 5], [2, 6], [3, 7], [0, 4]]


def toy_run(
    folder: Path, right: list[list[int]], trained_with: int = 1, query: list[list[int]] = QUERY, **changes: Any
) -> str:
    """Writes a run directory with 4 episodes of one query per class, 2 classes; `right` marks correct answers."""
    labels = np.array([[0, 1]] * 4, dtype=np.int32)
    chosen = np.where(np.array(right) == 1, labels, 1 - labels)
    answers = Answers(
        classes=np.array(["jump", "run"]),
        prompts=np.array(["jumping", "running"]),
        videos=np.array(VIDEOS),
        class_ids=labels,
        support=np.array(SUPPORT, dtype=np.int32),
        query=np.array(query, dtype=np.int32),
        labels=labels,
        scores={"inductive": np.eye(2, dtype=np.float32)[chosen]},
    )
    write_results(folder, {**TASK, "trained_with_seed": trained_with, **changes}, answers)
    return str(folder)
