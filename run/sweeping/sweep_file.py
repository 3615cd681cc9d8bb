"""The sweep file: the configs, rows, columns and seeds of a table. docs/experiments.md describes each key."""

import itertools
import shlex
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, field_validator, model_validator

from utils.errors import UserError
from utils.schema import LARGEST_SEED, Section
from utils.yaml_text import one_line, read_yaml_file

SEED = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class Part(Section):
    """Settings of a sweep, a row or a column: SET contains `KEY=VALUE` words, as on the command line.

    CONFIG is the experiment file; {METHOD} and {DATASET} in it become the values of these keys.
    """

    CONFIG: str = ""
    METHOD: str = ""
    DATASET: str = ""
    SET: str = ""

    @field_validator("SET")
    @classmethod
    def _refuse_open_quotes(cls, value: str) -> str:
        shlex.split(value)
        return value

    @property
    def overrides(self) -> list[str]:
        """The words of SET."""
        return shlex.split(self.SET)


class Axis(Section):
    """One key of a grid and its values; row names contain NAME, by default the end of KEY."""

    KEY: str = Field(min_length=1)
    VALUES: list[Any] = Field(min_length=1)
    NAME: str = ""

    def label(self, value: Any) -> str:
        """Returns the text of a value in a row name; for a switch, its name if it is on and "" if it is off."""
        name = self.NAME or self.KEY.rpartition(".")[2]
        if isinstance(value, bool):
            return name if value else ""
        return f"{name} {value if isinstance(value, str) else one_line(value)}"


class Tuned(Section):
    """One key of a search: a range from LOW to HIGH, on a logarithmic scale with LOG, or a list of VALUES."""

    KEY: str = Field(min_length=1)
    LOW: int | float = 0
    HIGH: int | float = 0
    LOG: bool = False
    VALUES: list[Any] = Field([])

    @model_validator(mode="after")
    def _refuse_unclear_range(self) -> "Tuned":
        if self.VALUES:
            if self.model_fields_set & {"LOW", "HIGH", "LOG"}:
                raise ValueError(f"{self.KEY} has both a range and VALUES: expected one of them.")
        elif not {"LOW", "HIGH"} <= self.model_fields_set:
            raise ValueError(f"{self.KEY}: expected LOW and HIGH, or VALUES.")
        elif self.LOW >= self.HIGH or (self.LOG and self.LOW <= 0):
            least = "more than 0 and " if self.LOG else ""
            raise ValueError(f"{self.KEY}: expected LOW {least}less than HIGH, found {self.LOW} and {self.HIGH}.")
        return self

    @property
    def text(self) -> str:
        """The values as readable text."""
        if self.VALUES:
            return ", ".join(one_line(value) for value in self.VALUES)
        return f"{self.LOW} to {self.HIGH}{', logarithmic' if self.LOG else ''}"

    def contains(self, value: Any) -> bool:
        """Returns whether a trial may have this value."""
        if self.VALUES:
            return one_line(value) in map(one_line, self.VALUES)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.LOW <= value <= self.HIGH


class Column(Part):
    """A column: a data set, a number of shots, a backbone."""

    NAME: str = Field(min_length=1)


class Row(Part):
    """A row: a method, an ablation. With GRID, a row for each combination of its values."""

    NAME: str = ""
    GRID: list[Axis] = Field([])

    def expanded(self) -> list["Row"]:
        """Returns the rows of the grid, or the row itself if it has no grid."""
        if not self.GRID:
            return [self]
        rows = []
        for values in itertools.product(*(axis.VALUES for axis in self.GRID)):
            labels = [axis.label(value) for axis, value in zip(self.GRID, values, strict=True)]
            words = [f"{axis.KEY}={one_line(value)}" for axis, value in zip(self.GRID, values, strict=True)]
            name = " + ".join(label for label in labels if label) or "none"
            name = f"{self.NAME}, {name}" if self.NAME else name
            rows.append(self.model_copy(update={"NAME": name, "SET": f"{self.SET} {shlex.join(words)}", "GRID": []}))
        return rows


class SweepFile(Part):
    """A whole sweep; a row takes precedence over the sweep, a column over both."""

    TITLE: str = Field(min_length=1)
    CONFIG: str = "configs/{METHOD}/{DATASET}.yaml"
    ROWS: list[Row] = Field(min_length=1)
    COLUMNS: list[Column] = Field([Column(NAME="accuracy")], min_length=1)
    SEEDS: list[SEED] = Field([1, 2, 3], min_length=1)
    BASELINE: str = ""
    SEARCH: list[Tuned] = Field([])

    @model_validator(mode="after")
    def _refuse_unclear_names(self) -> "SweepFile":
        rows = [row.NAME for row in self.rows]
        if "" in rows:
            raise ValueError("ROWS: a row has neither a NAME nor a GRID.")
        named: dict[str, list[Any]] = {"ROWS": rows, "COLUMNS": [c.NAME for c in self.COLUMNS], "SEEDS": self.SEEDS}
        named["SEARCH"] = [tuned.KEY for tuned in self.SEARCH]
        for key, names in named.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]!r} occurs twice.")
        if self.BASELINE and self.BASELINE not in rows:
            raise ValueError(f"BASELINE: expected the name of a row ({', '.join(rows)}), found {self.BASELINE!r}.")
        return self

    @property
    def rows(self) -> list[Row]:
        """All rows, including those of the grids."""
        return [row for entry in self.ROWS for row in entry.expanded()]


def load_sweep_file(path: Path) -> SweepFile:
    """Returns the content of a sweep file.

    Raises:
        UserError: the file is not valid; the message has one line per problem.
    """
    content = read_yaml_file(path, str(path), "sweep")
    if "MODEL" in content:
        raise UserError(
            f"{path} is the config of one run, not a sweep file: start it with run/run.py --cfg, or name it after "
            "CONFIG in a sweep file (docs/experiments.md)"
        )
    try:
        return SweepFile.model_validate(content)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(_problems(error, path))) from error


def _problems(error: pydantic.ValidationError, path: Path) -> list[str]:
    """Returns a sentence for each problem of a sweep file."""
    sentences = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            text = f"unknown key {place}; docs/experiments.md has the keys of a sweep file."
        elif problem["type"] == "missing":
            text = f"{place} is missing."
        elif problem["type"] == "value_error":  # the message of a validator above
            text = f"{place}: {problem['ctx']['error']}" if place else str(problem["ctx"]["error"])
        else:
            text = f"{place}: {problem['msg'].replace('Input should be', 'expected')}, found {problem['input']!r}."
        sentences.append(f"{path}: {text}")
    return sentences
