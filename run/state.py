"""All that a training consists of between two steps: what a checkpoint holds, and what a resumed run goes on with."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from episodes.bad_clips import BadClips
from models.base import FewShotModel
from run.meter import Meter
from run.solver import Solver
from utils.checkpoint import load_weights
from utils.errors import UserError, reason_of

# No generator is among them: episodes, augmentation and dropout are drawn from (seed, episode) alone.
RESUMABLE = ("model", "optimizer", "meter", "episode", "best_accuracy", "validation_due", "kept", "bad_clips", "data")
KINDS = {"best_accuracy": float, "validation_due": bool, "kept": list, "bad_clips": dict}


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
            UserError: the weights do not fit the model, or the rest is not that of a training.
        """
        load_weights(self.model, content["model"], path)
        try:
            self._refuse_damaged(content)
            self.solver.restore(content["optimizer"])
            self.meter.restore(content["meter"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: the state of the training in it is damaged ({reason_of(error)}); its weights may be tested, "
                f"or resume from another checkpoint of the run, copied to this name"
            ) from error
        self.episode = content["episode"]
        self.best_accuracy = content["best_accuracy"]
        self.validation_due = content["validation_due"]
        self.bad_clips.reasons = dict(content["bad_clips"])
        self.kept = list(content["kept"])

    def _refuse_damaged(self, content: dict[str, Any]) -> None:
        """Raises ValueError for values that no training has."""
        if not (
            all(type(content[name]) is kind for name, kind in KINDS.items())
            and 0 <= content["episode"] <= self.solver.total
            and math.isfinite(content["best_accuracy"])
            and all(type(episode) is int for episode in content["kept"])
            and all(isinstance(text, str) for clip in content["bad_clips"].items() for text in clip)
            and all(type(value) in (int, float) for part in content["meter"] for value in part.values())
        ):
            raise ValueError(f"one of {', '.join(['episode', 'meter', *KINDS])} is not what a training has")
