"""The numbers of a table, from the finished runs of each row and column."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from run.comparison import Pool, Run, have_same_scores, interval_of
from run.sweeping.folder import SweepFolder
from run.sweeping.plan import SweepRun
from run.sweeping.published import Published, published
from utils.statistics import sign_flip_p

# INFO of the best config as run/sweep.py --search writes it.
TUNED = re.compile(r"tuned: [\d,]+ trials? on validation classes")


@dataclass(frozen=True)
class Difference:
    """The difference of a cell to the baseline row of its column, in percent, over pairs of runs with the same seed.

    by_seed: seed -> difference. interval_videos: half the 95 % interval over videos and episodes.
    p_videos: its p-value. p_seeds: p-value of sign flips over the seeds, at least 2 / 2^seeds.
    Each is None if it cannot be estimated.
    has_effect: whether any score differs; false for settings that change nothing.
    """

    by_seed: Mapping[int, float]
    interval_videos: float | None
    p_videos: float | None
    has_effect: bool

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def p_seeds(self) -> float | None:
        """The p-value over seeds, or None for one seed."""
        return sign_flip_p(list(self.by_seed.values())) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Cell:
    """One row and column: the planned runs, and the results of the finished ones by seed."""

    row: str
    column: str
    planned: Sequence[SweepRun]
    runs: Mapping[int, Run] = field(default_factory=dict)
    seconds: Sequence[float] = ()
    difference: Difference | None = None

    @property
    def by_seed(self) -> dict[int, float]:
        """The accuracy in percent by seed."""
        return {seed: 100 * float(run.is_right.mean()) for seed, run in self.runs.items()}

    @property
    def mean(self) -> float | None:
        """The mean accuracy over seeds in percent, or None without a finished run."""
        return float(np.mean(list(self.by_seed.values()))) if self.runs else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds, or None for fewer than two seeds."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.runs) > 1 else None

    @cached_property
    def intervals(self) -> tuple[float | None, float | None]:
        """Half the 95 % intervals over episodes and over videos of the pooled runs."""
        if not self.runs:
            return None, None
        runs = list(self.runs.values())
        pool = Pool.of(runs, [100.0 * run.is_right for run in runs])
        return interval_of(pool.over_episodes()), interval_of(pool.over_videos())

    @property
    def parameters(self) -> int | None:
        """The number of trained parameters."""
        return next((run.results.get("trained_parameters") for run in self.runs.values()), None)

    @property
    def mean_seconds(self) -> float | None:
        """The mean duration of a run, or None if the sweep did not start any."""
        return float(np.mean(self.seconds)) if self.seconds else None

    @cached_property
    def published(self) -> Published | None:
        """The published number of the config, or None if it has none or the run changes the method."""
        return published(self.planned[0].config_file, self.planned[0].config)

    def notes(self) -> list[str]:
        """Returns notes on the numbers."""
        notes = []
        if len(self.runs) < len(self.planned):
            notes.append(f"{len(self.runs)} of {len(self.planned)} seeds")
        if self.difference and not self.difference.has_effect:
            notes.append("the same scores as the baseline in all seeds, so its settings have no effect")
        results = [run.results for run in self.runs.values()]
        if any(result.get("checkpoint_selected_on") == "test" for result in results):
            notes.append("checkpoint selected on the test classes")
        types = ("features_stored_in", "trained_on_features_stored_in")
        if any(result.get(name) == "bfloat16" for result in results for name in types):
            notes.append("features kept in bf16")
        if any(result["protocol"] == "transductive" for result in results):
            notes.append("transductive: the queries of an episode are matched together")
        notes += sorted({note for result in results for note in TUNED.findall(result.get("info", ""))})
        if any("DEBUG" in result.get("differs_from_default", []) for result in results):
            notes.append("a DEBUG run, not a result")
        return notes


class Results:
    """The results of a sweep; each results file is read once."""

    def __init__(self, runs: Sequence[SweepRun], folder: SweepFolder, baseline: str) -> None:
        self.planned, self.folder, self.baseline = runs, folder, baseline
        self.loaded: dict[str, Run] = {}
        self.differences: dict[tuple[str, ...], Difference] = {}

    def cells(self) -> list[Cell]:
        """Returns all cells in the order of rows and columns.

        Raises:
            UserError: a result is unreadable.
        """
        groups: dict[tuple[str, str], list[SweepRun]] = {}
        for run in self.planned:
            groups.setdefault((run.row, run.column), []).append(run)
        cells = {place: self._cell(*place, runs) for place, runs in groups.items()}
        rows = {cell.row: None for cell in cells.values()}
        columns = {cell.column: None for cell in cells.values()}
        for (row, column), cell in cells.items():
            first = cells.get((self.baseline, column))
            if first and row != self.baseline and (difference := self._difference(first, cell)):
                cells[row, column] = Cell(row, column, cell.planned, cell.runs, cell.seconds, difference)
        return [cells[row, column] for row in rows for column in columns]

    def _cell(self, row: str, column: str, planned: Sequence[SweepRun]) -> Cell:
        runs = {}
        for run in planned:
            if path := run.result():
                if str(path) not in self.loaded:
                    self.loaded[str(path)] = Run.load(path)
                runs[run.seed] = self.loaded[str(path)]
        seconds = [seconds for run in planned if (seconds := self.folder.seconds(run)) is not None]
        return Cell(row, column, planned, runs, seconds)

    def _difference(self, first: Cell, second: Cell) -> Difference | None:
        """Returns the difference over common seeds; None without such seeds, or if the queries differ."""
        seeds = [seed for seed in second.runs if seed in first.runs]
        pairs = [(first.runs[seed], second.runs[seed]) for seed in seeds]
        if not pairs or any(a.results["episode_list_sha256"] != b.results["episode_list_sha256"] for a, b in pairs):
            return None
        key = tuple(str(run.path) for pair in pairs for run in pair)
        if key not in self.differences:
            values = [100.0 * b.is_right - 100.0 * a.is_right for a, b in pairs]
            videos = Pool.of([a for a, _ in pairs], values).over_videos()
            by_seed = {seed: float(value.mean()) for seed, value in zip(seeds, values, strict=True)}
            p_value = videos.p_value if videos else None
            # A row whose config equals the baseline's shares its runs, which needs no note.
            has_effect = all(a is b for a, b in pairs) or not have_same_scores(pairs)
            self.differences[key] = Difference(by_seed, interval_of(videos), p_value, has_effect)
        return self.differences[key]
