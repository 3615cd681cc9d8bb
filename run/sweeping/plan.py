"""Plans the runs of a sweep file: every config is resolved and checked before the first run starts."""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from run.data import effective_config
from run.sweeping.sweep_file import Column, Part, Row, SweepFile
from utils.config import REPOSITORY, config_to_dict, leaves, load_config
from utils.errors import UserError
from utils.schema import HEAD_ONLY, Config, known_keys

SEED, DIRECTORY, CACHE = "MODEL.SEED", "CHECKPOINT.CHECKPOINT_DIR", "TEST.FEATURE_CACHE"
SET_BY_THE_SWEEP = {SEED: "SEEDS", DIRECTORY: "--out", "CHECKPOINT.RESUME_FROM_CHECKPOINT": "the sweep"}
# Keys, or their beginnings, that do not change a number: a run with other values for them is the same run.
WITHOUT_EFFECT = (
    "INFO", "CHECKPOINT.", "LOG.", "DEVICE.DEVICE", "DATA.NUM_WORKERS", "DATA.CHECK_VIDEOS", "TRAIN.PRINT_FREQ",
    "TEST.BATCH_EPISODES", CACHE,
)  # fmt: skip


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its place in the table, its command, and its resolved config."""

    row: str
    column: str
    seed: int
    config_file: Path
    overrides: tuple[str, ...]
    config: Config
    folder: Path

    @cached_property
    def name(self) -> str:
        """The name of the run's files: row, column, seed, and a hash of the settings that change a number.

        If the sweep file changes a run's settings, the run gets another name, so that no old result is shown for it.
        """
        values = json.dumps(settings_of(self.config), sort_keys=True)
        words = "-".join(_slug(text) for text in (self.row, self.column, f"seed{self.seed}"))
        return f"{words}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """The file with the output of the run; the run directory also contains log.txt."""
        return self.folder / "logs" / f"{self.name}.txt"

    @property
    def title(self) -> str:
        """Row, column and seed as text."""
        return f"{self.row} | {self.column} | seed {self.seed}"

    def result(self) -> Path | None:
        """Returns the newest results file that is not empty (a kill may leave an empty one), or None."""
        files = [path for path in self.directory.glob("results*.json") if path.stat().st_size]
        return max(files, key=lambda path: path.stat().st_mtime, default=None)

    def with_seed(self, seed: int) -> "SweepRun":
        """Returns the same run with another seed."""
        model = self.config.MODEL.model_copy(update={"SEED": seed})
        return replace(self, seed=seed, config=self.config.model_copy(update={"MODEL": model}))

    def with_overrides(self, words: Sequence[str], config: Config) -> "SweepRun":
        """Returns the same run with other overrides and their config."""
        return replace(self, overrides=tuple(words), config=config)

    def command(self) -> list[str]:
        """Returns the command that starts the run, or resumes it."""
        words = [sys.executable, str(REPOSITORY / "run" / "run.py"), "--cfg", str(self.config_file), *self.overrides]
        words += [f"{SEED}={self.seed}", f"{DIRECTORY}={self.directory}"]
        return [*words, "DATA.CHECK_VIDEOS=false", "--resume"]  # the sweep has checked the videos


def plan(file: SweepFile, folder: Path, overrides: Sequence[str] = (), rows: Sequence[str] = ()) -> list[SweepRun]:
    """Returns all runs of a sweep by seed, then row, then column, so that a first table is complete early.

    Args:
        file: the sweep file.
        folder: folder of the sweep.
        overrides: `KEY=VALUE` for every run; these take precedence over the file.
        rows: parts of row names that select rows; empty for all rows.

    Raises:
        UserError: a config is not valid; the message has one line per problem, with the first run concerned.
    """
    problems: dict[str, str] = {}
    first: list[SweepRun] = []
    for row, column in itertools.product(chosen_rows(file, rows), file.COLUMNS):
        try:
            first.append(resolve(file, row, column, overrides, folder))
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, f"{row.NAME} | {column.NAME}")
    if untested := [run for run in first if not run.config.tests]:
        problems["TEST.TEST_EPISODES is 0, but a table shows the results of test runs."] = untested[0].title
    if problems:
        raise UserError("\n".join(f"{where}: {line}" for line, where in problems.items()))
    return [run.with_seed(seed) for seed in file.SEEDS for run in first]


def chosen_rows(file: SweepFile, parts: Sequence[str]) -> list[Row]:
    """Returns the rows with one of `parts` in the name, or all rows if there are no parts.

    Raises:
        UserError: a part is in no name; it may be a misspelt row, or an override after `--rows`.
    """
    if unknown := [part for part in parts if not any(part in row.NAME for row in file.rows)]:
        names = "; ".join(row.NAME for row in file.rows)
        hint = "; write KEY=VALUE before --rows" if any("=" in part for part in unknown) else ""
        raise UserError(f"--rows: no row name contains {' or '.join(unknown)}; the rows are: {names}{hint}")
    return [row for row in file.rows if not parts or any(part in row.NAME for part in parts)]


def resolve(file: SweepFile, row: Row, column: Column, overrides: Sequence[str], folder: Path) -> SweepRun:
    """Returns the run with the first seed; raises UserError if its config is not valid."""
    parts: list[Part] = [file, row, column]
    words = [word for part in parts for word in part.overrides] + list(overrides)
    for key, source in SET_BY_THE_SWEEP.items():
        if any(word.partition("=")[0].strip() == key for word in words):
            raise UserError(f"{key} cannot be set in a sweep: it comes from {source}.")
    words = list({word.partition("=")[0]: word for word in words}.values())  # the last value of each key
    config_file = _config_file(parts)
    config = load_config(config_file, words).config
    if not config.TEST.FEATURE_CACHE and (config.MODEL.TRAINABLE == HEAD_ONLY or not effective_config(config).trains):
        words.append(f"{CACHE}={folder / 'features'}")  # a frozen backbone's features are shared by all runs
    return SweepRun(row.NAME, column.NAME, file.SEEDS[0], config_file, tuple(words), config, folder)


def _config_file(parts: Sequence[Part]) -> Path:
    """Returns the experiment file of a sweep, a row and a column."""
    values = {
        key: next((v for part in reversed(parts) if (v := getattr(part, key))), "") for key in ("METHOD", "DATASET")
    }
    path = next(part.CONFIG for part in reversed(parts) if part.CONFIG)
    for key, value in values.items():
        if f"{{{key}}}" in path and not value:
            raise UserError(f"CONFIG is {path}, but {key} is set in neither the sweep, the row nor the column.")
        path = path.replace(f"{{{key}}}", value)
    return Path(path)


def settings_of(config: Config) -> Mapping[str, Any]:
    """Returns the values that change a number and differ from the default, so that a new key renames no run."""
    known = known_keys(Config, type(config.MODEL))
    return {
        key: value
        for key, value in leaves(config_to_dict(config))
        if value != known[key].default and not key.startswith(WITHOUT_EFFECT)
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.")[:40]
