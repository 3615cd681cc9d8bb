"""The log of a run: lines to read, and the numbers for `run.metrics_log`."""

import logging
from pathlib import Path
from typing import Any

from models.base import parameter_count
from run.data import RunData
from run.evaluation import Evaluation
from run.meter import rate
from run.metrics_log import FEATURES_IN_BF16, MetricsWriter, raise_if_wandb_missing
from run.results import method_label
from run.run_directory import TrainingState
from utils import distributed
from utils.config import config_to_dict, leaves, save_config
from utils.files import writing
from utils.logs import LOG, set_up_logging
from utils.schema import Config
from utils.statistics import Accuracy
from utils.utils import git_state

logger = logging.getLogger(__name__)


def prepare(config: Config) -> None:
    """Records the commit for the results, since the clone may change during a long run; checks what LOG requires.

    Raises:
        UserError: the run should be tracked, and the package for it is not installed.
    """
    git_state()
    raise_if_wandb_missing(config)


class RunLog:
    """The log of a training run: config.yaml, log.txt and the files of `MetricsWriter`."""

    def __init__(self, config: Config, data: RunData, directory: Path, state: TrainingState) -> None:
        """Opens the files and logs how the run starts.

        Args:
            config, data: config and data of the run.
            directory: the run directory.
            state: the state of the run, whose numbers are logged.
        """
        self.config, self.state = config, state
        _start(config, data, directory, state)
        tracked = dict(leaves(config_to_dict(config))) if config.LOG.WANDB else None
        self.metrics = MetricsWriter(directory, state.episode, state.validation_due, tracked)

    def __enter__(self) -> "RunLog":
        self.metrics.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.metrics.__exit__(*error)

    def training(self) -> None:
        """Logs the means of losses, accuracy and speed since the last line; all processes call this together."""
        state = self.state
        others = {"learning_rate": state.solver.learning_rate, "bad_clips": len(state.bad_clips.reasons)}
        values = state.meter.take() | others
        self.metrics.write(state.episode, "train", values)
        logger.info(
            "train %d/%d: loss %.4f, accuracy %.1f %%, %s, %.0f %% of the time waiting for data",
            state.episode, self.config.TRAIN.TRAIN_EPISODES, values["loss"], values["accuracy"],
            rate(values["episodes_per_second"]), values["data_wait_percent"],
        )  # fmt: skip

    def validation(self, found: Evaluation, accuracy: Accuracy, improved: bool) -> None:
        """Logs the accuracy of a validation."""
        interval = {} if accuracy.interval is None else {"interval": accuracy.interval}
        rounded = {FEATURES_IN_BF16: 1.0} if found.stored_in == "bfloat16" else {}
        self.metrics.write(self.state.episode, "val", {"accuracy": accuracy.mean, **interval, **rounded})
        logger.info(
            "validation after %d episodes, split %s: %s%s",
            self.state.episode, self.config.TRAIN.VAL_SPLIT, accuracy, ", the best so far" if improved else "",
        )  # fmt: skip


def _start(config: Config, data: RunData, directory: Path, state: TrainingState) -> None:
    """Opens log.txt, writes config.yaml, and logs method, device, data and processes of a training run."""
    if distributed.is_main():
        set_up_logging(directory / LOG)
        with writing(path := directory / "config.yaml"):
            save_config(config, path)
    model = state.model
    whole = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s on %s, %s of %s parameters trained, device %s, run directory %s",
        method_label(config), config.MODEL.BACKBONE, f"{parameter_count(model):,}", f"{whole:,}",
        next(model.parameters()).device, directory,
    )  # fmt: skip
    splits(data)
    samplers = data.samplers
    if config.validates and config.tests and samplers["val"].way != samplers["test"].way:
        logger.warning(
            "validation is %d-way (TRAIN.VAL_WAY), the test %d-way", samplers["val"].way, samplers["test"].way
        )
    if config.TEST.TEST_MODEL_PATH:
        logger.warning(
            "TEST.TEST_MODEL_PATH is not used, as TEST.ONLY_TEST is false: the run tests its best checkpoint"
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


def splits(data: RunData) -> None:
    """Logs the size and the notes of each split that the run uses."""
    for name, index in data.splits.items():
        logger.info("%s: %d classes, %d videos", name, len(index.classes), len(index))
        for note in index.notes:
            logger.warning("%s: %s", name, note)
