"""The readable log of a run: start, training, validation."""

import logging
from pathlib import Path

from models.base import FewShotModel, parameter_count
from run.data import RunData
from run.meter import rate
from run.metrics_log import MetricsWriter
from run.results import method_label
from run.run_directory import TrainingState
from utils import distributed
from utils.config import save_config
from utils.files import writing
from utils.logs import LOG, set_up_logging
from utils.schema import Config
from utils.statistics import Accuracy

logger = logging.getLogger(__name__)


def start(config: Config, model: FewShotModel, data: RunData, directory: Path, first_episode: int) -> None:
    """Opens log.txt, writes config.yaml, and logs method, device, data and processes of a training run."""
    if distributed.is_main():
        set_up_logging(directory / LOG)
        with writing(path := directory / "config.yaml"):
            save_config(config, path)
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
    if first_episode:
        logger.info("resumed after %d episodes", first_episode)
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


def training(config: Config, state: TrainingState, writer: MetricsWriter) -> None:
    """Logs the means of losses, accuracy and speed since the last line; all processes call this together."""
    others = {"learning_rate": state.solver.learning_rate, "bad_clips": len(state.bad_clips.reasons)}
    values = state.meter.take() | others
    writer.write(state.episode, "train", values)
    logger.info(
        "train %d/%d: loss %.4f, accuracy %.1f %%, %s, %.0f %% of the time waiting for data",
        state.episode, config.TRAIN.TRAIN_EPISODES, values["loss"], values["accuracy"],
        rate(values["episodes_per_second"]), values["data_wait_percent"],
    )  # fmt: skip


def validation(config: Config, state: TrainingState, accuracy: Accuracy, improved: bool, writer: MetricsWriter) -> None:
    """Logs the accuracy of a validation."""
    interval = {} if accuracy.interval is None else {"interval": accuracy.interval}
    writer.write(state.episode, "val", {"accuracy": accuracy.mean, **interval})
    logger.info(
        "validation after %d episodes, split %s: %s%s",
        state.episode, config.TRAIN.VAL_SPLIT, accuracy, ", the best so far" if improved else "",
    )  # fmt: skip


# --- the metrics files --------------------------------------------------------------------------------------
