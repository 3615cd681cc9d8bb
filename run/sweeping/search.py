"""`--search N`: N trials of one row, compared on the validation classes; the test classes are never read.

A trial is an ordinary run without a test, in its own directory. It is stopped, as by Ctrl-C, when a validation is
below the median of the finished trials. The folder SWEEP/search contains:

trial_0001/       run directories           logs/          output of each trial
trials.json       values and accuracies     state.json     attempts, durations, failures
search.csv, .md   table of all trials       best.yaml      config of the best one
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from run.data import effective_config
from run.metrics_log import METRICS, read_metrics
from run.run import shortened
from run.sweeping.execution import Execution, Machine
from run.sweeping.folder import FAILED, FINISHED, INTERRUPTED, SweepFolder, duration
from run.sweeping.plan import SEED, SweepRun, chosen_rows, resolve, settings_of
from run.sweeping.space import as_words, own_values, with_values
from run.sweeping.study import PRUNED, Study, Trial
from run.sweeping.sweep_file import SweepFile, Tuned
from utils.errors import UserError, counted
from utils.files import write_atomically, writing

FOLDER, TRIALS = "search", "trials.json"
NO_TEST = "TEST.TEST_EPISODES"


@dataclass(frozen=True)
class TrialRun(SweepRun):
    """The run of a trial; `values` is empty until the trial begins."""

    number: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """The name of the run's files."""
        return f"trial_{self.number:04}"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / self.name

    @property
    def title(self) -> str:
        """Number and values as text."""
        return f"trial {self.number}" + (f": {as_words(self.values)}" if self.values else "")

    def result(self) -> Path | None:
        """Returns the file with the last validation, or None before that validation."""
        return self.directory / METRICS if self.episodes in self.validations() else None

    @property
    def episodes(self) -> int:
        """The number of training episodes; the last validation follows them."""
        config = shortened(self.config) if self.config.DEBUG else self.config
        return config.TRAIN.TRAIN_EPISODES

    def validations(self) -> dict[int, float]:
        """Returns training episode -> accuracy in percent of each validation so far."""
        file = self.directory / METRICS
        lines = read_metrics(file) if file.is_file() else []
        return {int(line["episode"]): line["val/accuracy"] for line in lines if "val/accuracy" in line}

    def with_trial(self, values: Mapping[str, Any]) -> "TrialRun":
        """Returns the run with the values of its trial; raises UserError if they are not valid together."""
        run = with_values(self, values)
        return replace(self, overrides=run.overrides, config=run.config, values=values)


def base_run(file: SweepFile, folder: Path, overrides: Sequence[str], rows: Sequence[str]) -> SweepRun:
    """Returns the run that a search tunes, with its test.

    Raises:
        UserError: the sweep file has no search, more than one row or column, or the run has no validation classes.
    """
    if not file.SEARCH:
        raise UserError("--search needs the key SEARCH in the sweep file, see docs/experiments.md")
    chosen = chosen_rows(file, rows)
    if len(chosen) > 1 or len(file.COLUMNS) > 1:
        size = f"{len(chosen)} rows and {len(file.COLUMNS)} columns"
        raise UserError(f"a search tunes one row with one column, found {size}; --rows NAME chooses a row")
    run = resolve(file, chosen[0], file.COLUMNS[0], overrides, folder)
    run = with_values(run, {SEED: run.seed})
    if not effective_config(run.config).validates:
        raise UserError("a search compares validations: the run needs training episodes, and TRAIN.VAL_FREQ above 0")
    if run.config.TRAIN.VAL_SPLIT != "val":
        raise UserError("TRAIN.VAL_SPLIT is test, but a search never reads the test classes: set it to val")
    return run


class Search(Execution):
    """The trials of a search on a machine."""

    activity, unit = "search", "trial"

    def __init__(
        self,
        runs: "Sequence[TrialRun]",
        folder: SweepFolder,
        machine: Machine,
        study: Study,
        trials: "Trials",
        write: Callable[[], None],
    ) -> None:
        """Stores the runs and the state of all trials; `write` is called after every trial."""
        self.study, self.trials, self.write = study, trials, write
        super().__init__(runs, folder, machine, lambda: None)

    def start(self) -> list[SweepRun]:
        """Starts trials, see `Execution`."""
        return self._record_ends(super().start())

    def prepared(self, run: SweepRun) -> SweepRun | None:
        """Returns the run of a trial with its values. They are chosen now, unless the trial was interrupted."""
        assert isinstance(run, TrialRun)
        trial = self.trials.by_number.get(run.number)
        if trial is None or trial.state:  # new, or failed earlier
            trial = self.trials.by_number[run.number] = Trial(trial.values if trial else self._values(run))
            self.trials.write()
        try:
            return run.with_trial(trial.values)
        except UserError as error:
            trial.state, trial.reason = FAILED, str(error)
            return None

    def _values(self, run: "TrialRun") -> dict[str, Any]:
        """Returns the values of a new trial; the first trial is the config itself if that is in the search space."""
        own = own_values(run, self.study.search) if run.number == 1 else None
        return own or self.study.suggest(run.number, self.trials.by_number)

    def ended(self) -> list[SweepRun]:
        """Stops trials that fall behind; returns those that have ended."""
        for run, job, _ in self.running.values():
            if self._is_pruned_by_validations(run):
                job.stop()
        return self._record_ends(super().ended())

    def _is_pruned_by_validations(self, run: SweepRun) -> bool:
        """Checks the new validations of a trial in order; returns whether one of them prunes it."""
        assert isinstance(run, TrialRun)
        trial, validations = self.trials.by_number[run.number], run.validations()
        for count in range(len(trial.validations) + 1, len(validations) + 1):
            if trial.state:
                break
            trial.validations = list(validations.values())[:count]
            if list(validations)[count - 1] < run.episodes and self.study.is_pruned(
                trial.validations, run.number, self.trials.by_number
            ):
                trial.state = PRUNED
                self.trials.write()
                return True
        return False

    def _record_ends(self, runs: Sequence[SweepRun]) -> list[SweepRun]:
        """Records how trials have ended, and writes the tables; returns the trials."""
        for run in runs:
            assert isinstance(run, TrialRun)
            trial, status = self.trials.by_number[run.number], self.folder.status(run)
            if not trial.state:
                self._is_pruned_by_validations(run)
            trial.seconds = self.folder.seconds(run) or self.folder.seconds_so_far(run) or None
            if not trial.state and status in (FINISHED, FAILED):
                trial.state, trial.reason = status, self.folder.failure(run) if status == FAILED else ""
            self.trials.write()
            self.write()
        return list(runs)

    def status(self, run: SweepRun) -> str:
        """Returns the state of a trial, with its accuracy."""
        assert isinstance(run, TrialRun)
        trial = self.trials.by_number[run.number]
        accuracy = f", {trial.accuracy:.2f} % on the validation classes" if trial.accuracy is not None else ""
        return f"{trial.state or self.folder.status(run)}{accuracy}"


def trial_runs(run: SweepRun, folder: Path, trials: "Trials") -> list[TrialRun]:
    """Returns the runs of all trials; those that have not begun have no values yet."""
    about = (run.row, run.column, run.seed, run.config_file, run.overrides, run.config, folder)
    runs = [TrialRun(*about, number=number) for number in range(1, trials.number + 1)]
    for number, trial in trials.by_number.items():
        with suppress(UserError):  # of a failed trial, whose values are not valid together
            runs[number - 1] = runs[number - 1].with_trial(trial.values)
    return runs


class Trials:
    """The trials of a search, in trials.json; all have the same search space and the same other settings.

    number: the planned number of trials. by_number: the trials that have begun.
    """

    def __init__(self, folder: Path, run: SweepRun, search: Sequence[Tuned], number: int) -> None:
        """Reads the trials of an earlier search.

        Raises:
            UserError: the earlier search had other settings or another search space.
        """
        self.path, self.number = folder / TRIALS, number
        space = [tuned.model_dump() for tuned in search]
        self.about = {"settings": settings_of(run.config), "seed": run.seed, "search": space}
        self.by_number: dict[int, Trial] = {}
        if self.path.is_file():
            self._read()
            self.number = max(number, *self.by_number, 0)

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_bytes())
            self.by_number = {int(number): Trial(**trial) for number, trial in content.pop("trials").items()}
            before, now = content["settings"], json.loads(json.dumps(self.about))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} does not contain the trials of a search; remove {self.path.parent}"
            ) from error
        differ = [key for key in sorted(before | now["settings"]) if before.get(key) != now["settings"].get(key)]
        differ += [name for name in ("seed", "search") if content.get(name) != now[name]]
        if differ:
            raise UserError(
                f"the trials in {self.path.parent} have other settings (changed: {', '.join(differ[:5])}): "
                "set them back, or choose another folder with --out"
            )

    def write(self) -> None:
        """Writes all trials."""
        trials = {number: asdict(trial) for number, trial in sorted(self.by_number.items())}
        with writing(self.path):
            write_atomically(self.path, (json.dumps({**self.about, "trials": trials}, indent=1) + "\n").encode())

    def to_do(self, retry: bool) -> list[int]:
        """Returns the numbers of the trials that have not ended; with `retry` also those of failed trials."""
        again = ("", FAILED) if retry else ("",)
        return [n for n in range(1, self.number + 1) if n not in self.by_number or self.by_number[n].state in again]

    def listing(self, jobs: int) -> list[str]:
        """Returns a line for each trial that has begun, and one on how long the others may take."""
        lines = [
            f"{trial.state or INTERRUPTED:<11} {'-' if trial.seconds is None else duration(trial.seconds):>7}  "
            f"trial {number}: {as_words(trial.values)}"
            for number, trial in sorted(self.by_number.items())
        ]
        left, seconds = len(self.to_do(retry=False)), [t.seconds for t in self.by_number.values() if t.seconds]
        time = "their time is known once a trial has ended"
        if seconds:
            time = f"about {duration(sum(seconds) / len(seconds) * left / jobs)} with --jobs {jobs}"
        return [*lines, f"{counted(self.number, 'trial')}, {self.number - left} ended, {left} to do: {time}"]
