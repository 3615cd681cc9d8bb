"""Uses optuna to choose the values of trials and to prune trials.

The study is rebuilt from the trials at every call, so an interrupted search continues as if it never stopped.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from run.sweeping.folder import FAILED, FINISHED
from run.sweeping.space import DIGITS, is_whole
from run.sweeping.sweep_file import Tuned
from utils.config import REPOSITORY
from utils.errors import UserError
from utils.schema import Config

if TYPE_CHECKING:
    import optuna

PRUNED = "pruned"
LARGEST_SEED = 2**32


@dataclass
class Trial:
    """One trial.

    values: key -> value of the search space.
    state: finished, pruned or failed; "" if it is running or interrupted.
    validations: accuracies in percent, in order; for a pruned trial up to the one that pruned it.
    seconds: duration, None if unknown. reason: reason for a failure.
    """

    values: dict[str, Any]
    state: str = ""
    validations: list[float] = field(default_factory=list)
    seconds: float | None = None
    reason: str = ""

    @property
    def accuracy(self) -> float | None:
        """The best validation accuracy."""
        return max(self.validations, default=None)


class Study:
    """The search space and the seed of the sampler."""

    def __init__(self, search: Sequence[Tuned], config: Config, seed: int) -> None:
        """Raises UserError if optuna is missing."""
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                f"--search needs optuna ({error}): pip install -r {REPOSITORY / 'requirements-sweep.txt'}"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self.seed = search, seed
        self.ranges = {tuned.KEY: _distribution(tuned, is_whole(tuned, config)) for tuned in search}

    def suggest(self, number: int, trials: Mapping[int, Trial]) -> dict[str, Any]:
        """Returns key -> value of a trial. The values depend only on the seed, its number and the other trials."""
        study = self._study(number, trials)
        suggested = study.ask(self.ranges).params
        return {tuned.KEY: _value(tuned, suggested[tuned.KEY]) for tuned in self.search}

    def is_pruned(self, validations: Sequence[float], number: int, trials: Mapping[int, Trial]) -> bool:
        """Returns whether a trial is below the median of the finished trials at its last validation."""
        import optuna

        others = {other: trial for other, trial in trials.items() if other != number}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(enumerate(validations))
        )
        return optuna.pruners.MedianPruner().prune(self._study(number, others), trial)

    def _study(self, number: int, trials: Mapping[int, Trial]) -> "optuna.Study":
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions warn that constant_liar is experimental
            sampler = optuna.samplers.TPESampler(seed=(self.seed + number) % LARGEST_SEED, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([self._as_stored(trial) for trial in trials.values()])
        return study

    def _as_stored(self, trial: Trial) -> "optuna.trial.FrozenTrial":
        import optuna

        states = optuna.trial.TrialState
        state = {FINISHED: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}.get(trial.state, states.RUNNING)
        return optuna.trial.create_trial(
            state=state,
            value=trial.accuracy if state == states.COMPLETE else None,
            params={tuned.KEY: _parameter(tuned, trial.values[tuned.KEY]) for tuned in self.search},
            distributions=self.ranges,
            intermediate_values=dict(enumerate(trial.validations)),
        )


def _distribution(tuned: Tuned, whole: bool) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if tuned.VALUES:
        return CategoricalDistribution(range(len(tuned.VALUES)))  # by index, since a value may be a list
    kind = IntDistribution if whole else FloatDistribution
    return kind(tuned.LOW, tuned.HIGH, log=tuned.LOG)


def _value(tuned: Tuned, parameter: Any) -> Any:
    """Returns the value of a key for a parameter of optuna, rounded to a readable length."""
    if tuned.VALUES:
        return tuned.VALUES[parameter]
    if isinstance(parameter, int):
        return parameter
    return min(max(float(f"{parameter:.{DIGITS}g}"), tuned.LOW), tuned.HIGH)


def _parameter(tuned: Tuned, value: Any) -> Any:
    """Returns the parameter of optuna for the value of a key."""
    return [json.dumps(other) for other in tuned.VALUES].index(json.dumps(value)) if tuned.VALUES else value
