"""Sends the numbers of a run to Weights & Biases if LOG.WANDB is set; the package is imported only then.

Its environment variables configure it: WANDB_PROJECT, WANDB_MODE=offline, WANDB_RUN_GROUP (set by a sweep).
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, reason_of
from utils.schema import Config

PROJECT = "few-shot-action-recognition"


def raise_if_missing(config: Config) -> None:
    """Raises UserError if a run should be tracked and wandb is not installed."""
    if config.LOG.WANDB and importlib.util.find_spec("wandb") is None:
        raise UserError("LOG.WANDB is true, but wandb is not installed: pip install wandb, or set LOG.WANDB to false")


class Tracker:
    """A run of Weights & Biases; resuming or testing a run directory continues the same run."""

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
