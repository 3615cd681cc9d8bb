"""Helpers of the split list tests: change a copy of the tiny data set, and collect the problems of loading it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from episodes.search import SPLITS
from episodes.splits import load_splits
from utils.errors import UserError

FIRST_CLASS = "test_action_0"
FIRST_LINE = "test_action_0/test_action_0_00"


def problems_of(split_dir: Path, data_dir: Path, needed: Sequence[str] = SPLITS) -> list[str]:
    """Returns the sentences of the error that loading must raise, one per problem."""
    with pytest.raises(UserError) as caught:
        load_splits(split_dir, data_dir, needed)
    return str(caught.value).split("\n")


def change_class_file(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "classes.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def append_to_test_list(folder: Path, *lines: str) -> int:
    """Adds lines to the list of test videos and returns the line number of the first."""
    path = folder / "testlist03.txt"
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return before.count("\n") + 1
