"""What a training run records, and when: log lines, numbers, validations and checkpoints."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from models.base import parameter_count
from run import stopping
from run.cached_episodes import TrainingEpisode, TrainingEpisodes
from run.data import RunData
from run.evaluation import Evaluation
from run.meter import rate
from run.metrics_log import FEATURES_IN_BF16, MetricsWriter, raise_if_wandb_missing
from run.results import method_label
from run.run_directory import RunDirectory, TrainingState
from run.training_step import FiniteWatch
from utils import distributed
from utils.config import config_to_dict, leaves, save_config
from utils.files import raise_if_missing, writing
from utils.jobs import progress
from utils.logs import LOG, set_up_logging
from utils.schema import Config
from utils.statistics import accuracy_over_episodes
from utils.utils import git_state

logger = logging.getLogger(__name__)


def prepare_recording(config: Config) -> None:
    """Records the commit for the results, since the clone may change during a long run; checks LOG and the checkpoint.

    Raises:
        UserError: the package for LOG.WANDB is not installed, or the checkpoint of a run that only tests is missing.
    """
    git_state()
    raise_if_wandb_missing(config)
    if config.TEST.ONLY_TEST:  # before all videos are checked
        distributed.from_main(lambda: raise_if_missing(Path(config.TEST.TEST_MODEL_PATH)))


@contextmanager
def recording(
    directory: RunDirectory, data: RunData, state: TrainingState, validate: Callable[[], Evaluation]
) -> Iterator["Recorder"]:
    """Records a training run within this block: claims the run directory, and restores the state of a resumed run.

    Args:
        directory, data: the run directory and the data of the run.
        state: the state of the run, which the checkpoints contain.
        validate: scores the validation episodes with the current weights.

    Raises:
        UserError: the directory contains another run, a file cannot be written, or a step was not finite.
        StopRequested: a signal was received; `last` contains the current state.
    """
    config = directory.config
    directory.begin(state)
    with directory.saved_on_interruption(state, data.samplers), ExitStack() as stack:
        _start(config, data, directory.path, state)
        tracked = dict(leaves(config_to_dict(config))) if config.LOG.WANDB else None
        metrics = stack.enter_context(MetricsWriter(directory.path, state.episode, state.validation_due, tracked))
        recorder = Recorder(directory, state, validate, metrics, stack)
        if state.validation_due:
            recorder.save(after_validation=config.validates)
        yield recorder


class Recorder:
    """Logs, validates and saves between the steps of a training run; all processes call these methods together."""

    def __init__(
        self,
        directory: RunDirectory,
        state: TrainingState,
        validate: Callable[[], Evaluation],
        metrics: MetricsWriter,
        stack: ExitStack,
    ) -> None:
        """Stores the parts, see `recording`; `stack` closes the progress bar when the run ends."""
        self.config, self.directory, self.state, self.validate = directory.config, directory, state, validate
        self.metrics, self.stack = metrics, stack

    def watched(self, episodes: TrainingEpisodes) -> Iterator[TrainingEpisode]:
        """Yields the episodes; shows their number, measures the time waited for them, and records their bad clips."""
        self.bar = self.stack.enter_context(progress(None, len(episodes), "train"))
        # Closed with the run: an iterator that the garbage collector finds waits five seconds for each worker.
        return self.stack.enter_context(closing(self.state.bad_clips.watch(self.state.meter.timed(episodes))))

    def after_step(self, group: range, watch: FiniteWatch) -> None:
        """Logs, validates, saves and stops if due after the step of a group of episodes.

        Args:
            group: numbers of the episodes.
            watch: records whether the steps so far were finite.

        Raises:
            StopRequested: a signal was received, which waited for this call.
            NotFiniteError: a step was not finite.
        """
        self.state.episode = group.stop
        self.bar.update(len(distributed.share(group)))
        log = self._is_due(self.config.TRAIN.PRINT_FREQ, group)
        validate = self._is_due(self.config.TRAIN.VAL_FREQ, group) and self.config.validates
        save = self._is_due(self.config.CHECKPOINT.SAVE_FREQ, group)
        stop = stopping.is_requested()
        if log or validate or save or stop:
            watch.raise_if_nonfinite()
            self.state.bad_clips.share()
        if log:
            self.log_training()
        if validate or save:
            self.save(after_validation=validate)
        if stop:
            raise stopping.request()

    def _is_due(self, frequency: int, group: range) -> bool:
        """Returns whether a group of episodes reaches a multiple of `frequency` (0: never) or the end of the run."""
        is_multiple = frequency > 0 and group.stop // frequency > group.start // frequency
        return is_multiple or group.stop == self.config.TRAIN.TRAIN_EPISODES

    def save(self, after_validation: bool) -> None:
        """Saves, after a validation if it is due; if a signal interrupts the validation, the resumed run repeats it."""
        state = self.state
        with state.meter.pause():
            distributed.average_buffers(state.model)
            state.validation_due = after_validation
            is_last = state.episode == self.config.TRAIN.TRAIN_EPISODES  # without validation the last one is the best
            is_best = self._improved(self.validate()) if after_validation else is_last
            state.validation_due = False
            self.directory.save_on_schedule(state, is_best)

    def _improved(self, evaluation: Evaluation) -> bool:
        """Logs the accuracy of a validation; returns whether it is the best so far."""
        state, accuracy = self.state, accuracy_over_episodes(evaluation.per_episode)
        improved = accuracy.mean > state.best_accuracy
        state.best_accuracy = max(state.best_accuracy, accuracy.mean)
        interval = {} if accuracy.interval is None else {"interval": accuracy.interval}
        rounded = {FEATURES_IN_BF16: 1.0} if evaluation.stored_in == "bfloat16" else {}
        self.metrics.write(state.episode, "val", {"accuracy": accuracy.mean, **interval, **rounded})
        logger.info(
            "validation after %d episodes, split %s: %s%s",
            state.episode, self.config.TRAIN.VAL_SPLIT, accuracy, ", the best so far" if improved else "",
        )  # fmt: skip
        return improved

    def log_training(self) -> None:
        """Logs the means of losses, accuracy and speed since the last line."""
        state = self.state
        others = {"learning_rate": state.solver.learning_rate, "bad_clips": len(state.bad_clips.reasons)}
        values = state.meter.take() | others
        self.metrics.write(state.episode, "train", values)
        logger.info(
            "train %d/%d: loss %.4f, accuracy %.1f %%, %s, %.0f %% of the time waiting for data",
            state.episode, self.config.TRAIN.TRAIN_EPISODES, values["loss"], values["accuracy"],
            rate(values["episodes_per_second"]), values["data_wait_percent"],
        )  # fmt: skip


def _start(config: Config, data: RunData, directory: Path, state: TrainingState) -> None:
    """Opens log.txt, writes config.yaml, and logs method, device, data and processes of a training run."""
    if distributed.is_main():
        set_up_logging(directory / LOG)
        with writing(path := directory / "config.yaml"):
            save_config(config, path)
    model = state.model
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = parameter_count(model) if config.trains else 0
    logger.info(
        "%s on %s, %s of %s parameters trained, device %s, run directory %s",
        method_label(config), config.MODEL.BACKBONE, f"{trained:,}", f"{whole:,}",
        next(model.parameters()).device, directory,
    )  # fmt: skip
    data.log_splits()
    samplers = data.samplers
    if config.validates and config.tests and samplers["val"].way != samplers["test"].way:
        logger.warning(
            "validation is %d-way (TRAIN.VAL_WAY), the test run %d-way", samplers["val"].way, samplers["test"].way
        )
    if config.TEST.TEST_MODEL_PATH:
        logger.warning(
            "TEST.TEST_MODEL_PATH is not used, since TEST.ONLY_TEST is false: the run tests its best checkpoint"
        )
    if state.episode:
        logger.info("resumed after %d episodes", state.episode)
    processes, group = distributed.world_size(), config.TRAIN.TASKS_PER_BATCH
    if processes > 1:
        logger.info("%d processes share the episodes", processes)
    if processes > group:
        logger.warning(
            "TRAIN.TASKS_PER_BATCH is %d, so only %d of %d processes have an episode at each step",
            group, group, processes,
        )  # fmt: skip
