"""All that a training consists of between two steps: what a checkpoint holds, and what a resumed run goes on with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from episodes.bad_clips import BadClips
from models.base import FewShotModel
from run.meter import Meter
from run.solver import Solver
from utils.checkpoint import load_weights

# No generator is among them: episodes, augmentation and dropout are drawn from (seed, episode) alone.
RESUMABLE = ("model", "optimizer", "meter", "episode", "best_accuracy", "validation_due", "kept", "bad_clips")


@dataclass
class TrainingState:
    """A training after some steps.

    episode: how many it has seen. best_accuracy: of all validations, in percent. validation_due: the run was stopped
    before the validation that belongs after this step. kept: after which episodes there is a checkpoint of its own.
    """

    model: FewShotModel
    solver: Solver
    meter: Meter
    bad_clips: BadClips
    episode: int = 0
    best_accuracy: float = -1.0
    validation_due: bool = False
    kept: list[int] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """What goes into a checkpoint, as tensors and plain values. All processes call this together."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.solver.optimizer.state_dict(),
            "meter": self.meter.state(),
            "episode": self.episode,
            "best_accuracy": self.best_accuracy,
            "validation_due": self.validation_due,
            "bad_clips": dict(self.bad_clips.reasons),
            "kept": list(self.kept),
        }

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Takes over what `content` returned; `path` is for messages.

        Raises:
            UserError: the weights do not fit the model.
        """
        load_weights(self.model, content["model"], path)
        self.solver.optimizer.load_state_dict(content["optimizer"])
        self.meter.restore(content["meter"])
        self.episode = content["episode"]
        self.best_accuracy = content["best_accuracy"]
        self.validation_due = content["validation_due"]
        self.bad_clips.reasons = dict(content["bad_clips"])
        self.kept = list(content["kept"])
