"""Writes numbers of a run to metrics.jsonl, TensorBoard and Weights & Biases; test runs also write their options."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils import distributed
from utils.errors import UserError, reason_of
from utils.files import write_atomically, writing
from utils.schema import Config
from utils.yaml_text import NOT_UTF8, printable

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROJECT = "few-shot-action-recognition"  # in Weights & Biases
FEATURES_IN_BF16 = "features_in_bf16"  # 1 if features were rounded to bf16 to save memory; otherwise not written

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes numbers as TensorBoard scalars and lines of metrics.jsonl, in the main process only."""

    def __init__(
        self,
        directory: Path,
        first_episode: int = 0,
        validation_due: bool = False,
        tracked: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the files, and drops lines of an interrupted run that will be written again.

        Args:
            directory: the run directory.
            first_episode: the run continues after this episode; later lines are dropped.
            validation_due: the validation at this episode is repeated, so its line is dropped too.
            tracked: config key -> value of a run that is also sent to Weights & Biases.
        """
        self.writes = distributed.is_main()
        if not self.writes:
            return
        self.file = directory / METRICS
        if self.file.is_file():
            with writing(self.file):
                _keep_until(self.file, first_episode, validation_due)
        self.directory = directory / TENSORBOARD
        with writing(self.directory):
            self.tensorboard = _tensorboard(self.directory, first_episode + 1 if first_episode else None)
        self.tracker = None if tracked is None else Tracker(directory, tracked)

    def write(self, episode: int, group: str, values: dict[str, float]) -> None:
        """Writes one line `{"episode": ..., "<group>/<name>": ...}`, and one scalar per value.

        Raises:
            UserError: a file cannot be written.
        """
        if not self.writes:
            return
        named = {f"{group}/{name}": value for name, value in values.items()}
        with writing(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"episode": episode, **named}) + "\n")
        with writing(self.directory):
            for name, value in named.items():
                if self.tensorboard:
                    self.tensorboard.add_scalar(name, value, episode)
        if self.tracker:
            self.tracker.log(episode, named)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Flushes TensorBoard's queue; an earlier error takes precedence over one of the flush."""
        if not self.writes:
            return
        if self.tracker:
            self.tracker.finish()
        try:
            with writing(self.directory):
                if self.tensorboard:
                    self.tensorboard.close()
        except UserError:
            if kind is None:
                raise


def _tensorboard(directory: Path, purge_step: int | None = None) -> SummaryWriter | None:
    """Returns a writer, or None with a warning for a path that is not UTF-8, which TensorBoard cannot open."""
    if NOT_UTF8.search(str(directory)):
        logger.warning(f"no TensorBoard files, since their path is not UTF-8: {directory}")
        return None
    return SummaryWriter(directory, purge_step=purge_step)


def write_test(directory: Path, episode: int, options: dict[str, Any], values: dict[str, float]) -> None:
    """Writes the numbers of a test run, `test/<name>`, and its options (hparams) for TensorBoard.

    Args:
        directory: the run directory.
        episode: training episodes of the tested checkpoint.
        options: config key -> value; values that are neither numbers nor text are written as JSON.
        values: name -> number.

    Raises:
        UserError: the file cannot be written.
    """
    named = {f"test/{name}": value for name, value in values.items()}
    if options.get("LOG.WANDB"):
        tracker = Tracker(directory, options)
        tracker.log(episode, named)
        tracker.finish()
    shown = {key: value if type(value) in (int, float, str) else json.dumps(value) for key, value in options.items()}
    shown = {key: printable(value) if isinstance(value, str) else value for key, value in shown.items()}
    with writing(directory / TENSORBOARD):
        writer = _tensorboard(directory / TENSORBOARD)
        if writer is None:
            return
        with writer as tensorboard:
            tensorboard.add_hparams(shown, named, run_name=".", global_step=episode)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl, without incomplete ones."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "episode" in values:
            lines.append(values)
    return lines


def _keep_until(file: Path, episode: int, validation_due: bool) -> None:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _episode_of(line) <= episode]
    if validation_due:
        kept = [line for line in kept if _episode_of(line) < episode or "val/accuracy" not in json.loads(line)]
    write_atomically(file, "".join(line + "\n" for line in kept).encode())


def _episode_of(line: str) -> float:
    """Returns the episode of a line, or infinity for an incomplete line."""
    try:
        return float(json.loads(line)["episode"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


# --- Weights & Biases, imported only if LOG.WANDB is set --------------------------------------------------


def raise_if_wandb_missing(config: Config) -> None:
    """Raises UserError if LOG.WANDB is set and wandb is not installed."""
    if config.LOG.WANDB and importlib.util.find_spec("wandb") is None:
        raise UserError("LOG.WANDB is true, but wandb is not installed: pip install wandb, or set LOG.WANDB to false")


class Tracker:
    """A run of Weights & Biases; resuming or testing a run directory continues the same run.

    Its environment variables configure it: WANDB_PROJECT, WANDB_MODE=offline, WANDB_RUN_GROUP (set by a sweep).
    """

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        """Opens the run.

        Args:
            directory: the run directory; wandb keeps its files in it.
            options: dotted keys of the config and their values.

        Raises:
            UserError: wandb cannot start.
        """
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16],
                name=directory.name,
                dir=str(directory),
                config=dict(options),
                resume="allow",
            )
        except Exception as error:  # wandb's errors have no common class, and the network can fail in many ways
            raise UserError(
                f"LOG.WANDB is true, but wandb cannot start ({reason_of(error)}): log in with `wandb login`, "
                "or set WANDB_MODE=offline, or LOG.WANDB to false"
            ) from error
        self.run.define_metric("*", step_metric="episode")  # a resumed run repeats some episodes

    def log(self, episode: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of an episode, by the names that TensorBoard shows."""
        self.run.log({"episode": episode, **values})

    def finish(self) -> None:
        """Waits until everything is sent or stored."""
        self.run.finish()
