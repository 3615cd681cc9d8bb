"""The run directory: content and rotation of checkpoints, resuming, and the lock of a running process.

    checkpoint_last.pt                the state to resume from; the first file of a run, written at every save
    checkpoint_best.pt                the state with the best validation accuracy; without validation, the last one
    checkpoint_<episode>.pt           the newest CHECKPOINT.KEEP saves
    replay_<episode>.pt               a step with NaN or inf, for `run.py --replay`
    config.yaml, log.txt, metrics.jsonl, tensorboard/, results.json, answers.npz, run.lock

A training run never writes into the directory of another run, and deletes only checkpoints that it wrote.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from episodes.dataset import BadClips
from episodes.sampler import EpisodeSampler
from models.base import FewShotModel
from run import stopping
from run.meter import Meter
from run.metrics_log import TENSORBOARD
from run.solver import Solver
from run.training_step import NotFiniteError
from utils import distributed
from utils.checkpoint import BEST, LAST, load_checkpoint, load_weights, save_checkpoint
from utils.config import config_to_dict, leaves
from utils.config_changes import LENGTH, check_resumed_config
from utils.errors import UserError, counted, reason_of
from utils.files import exclusive, last_holder, launcher, writing
from utils.logs import LOG
from utils.schema import Config

LOCK = "run.lock"
TRACE_SUFFIX = ".pt.trace.json"  # TensorBoard's profiler plugin requires this suffix

logger = logging.getLogger(__name__)


class StoredState(BaseModel):
    """The content of a checkpoint except weights and optimizer; see `TrainingState`. meter: one entry per process."""

    model_config = ConfigDict(strict=True)

    meter: Annotated[list[dict[str, FiniteFloat]], Field(min_length=1)]
    episode: NonNegativeInt
    best_accuracy: FiniteFloat
    validation_due: bool
    kept: list[NonNegativeInt]
    bad_clips: dict[str, str]
    cached_in: Literal["float32", "bfloat16"] | None = None  # older checkpoints have no such entry


@dataclass
class TrainingState:
    """The complete state of a training run between two steps. Checkpoints store it, resumed runs restore it.

    It has no random generator: episodes, augmentation and dropout depend only on (seed, episode).

    episode: number of episodes seen.
    best_accuracy: best accuracy of all validations, in percent.
    validation_due: whether the run was stopped before the validation after this step, or is shortened to this step.
    kept: episodes of the `checkpoint_<episode>.pt` files that this run wrote.
    cached_in: type of the features of TRAIN.CACHED_FEATURES in memory, "float32" or "bfloat16", once they exist.
    """

    model: FewShotModel
    solver: Solver
    meter: Meter
    bad_clips: BadClips
    episode: int = 0
    best_accuracy: float = -1.0
    validation_due: bool = False
    kept: list[int] = field(default_factory=list)
    cached_in: str | None = None

    @classmethod
    def new(cls, model: FewShotModel, device: torch.device, config: Config) -> "TrainingState":
        """Returns the state before the first episode.

        Raises:
            UserError: the model has no parameter to train.
        """
        solver = Solver(model, config.SOLVER, config.TRAIN.TRAIN_EPISODES, config.TRAIN.CLIP_GRAD)
        return cls(model, solver, Meter(device), BadClips(config.DATA.MAX_BAD_CLIPS))

    def content(self) -> dict[str, Any]:
        """Returns the content of a checkpoint, as tensors and plain values; all processes call this together."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.solver.optimizer.state_dict(),
            "meter": self.meter.state(),
            "episode": self.episode,
            "best_accuracy": self.best_accuracy,
            "validation_due": self.validation_due,
            "bad_clips": dict(self.bad_clips.reasons),
            "kept": list(self.kept),
            "cached_in": self.cached_in,
        }

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Restores the content of a checkpoint; `path` is used in messages.

        Raises:
            UserError: the weights do not fit the model, or the file is not the state of such a training run.
        """
        load_weights(self.model, content["model"], path)
        try:
            stored = StoredState.model_validate(content)
            self.solver.restore(content["optimizer"])
            self.meter.restore(stored.meter)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: the training state in it is damaged ({_reason(error)}); its weights can still be tested. To "
                f"resume, copy another checkpoint of the run to this name"
            ) from error
        self.episode, self.best_accuracy = stored.episode, stored.best_accuracy
        self.validation_due, self.kept = stored.validation_due, stored.kept
        self.bad_clips.reasons, self.cached_in = stored.bad_clips, stored.cached_in


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{first['loc'][0]}: {first['msg']}"
    return reason_of(error)


class RunDirectory:
    """The directory of one run with its checkpoints, locked until the process ends.

    All processes call these methods together; only process 0 accesses the files.
    """

    def __init__(self, config: Config, data: dict[str, str]) -> None:
        """Stores the config of the run and the digests of its data, see `RunData.digests`."""
        self.config, self.data = config, data
        self.path = Path(config.CHECKPOINT.CHECKPOINT_DIR)
        self.lock: AbstractContextManager[Any] | None = None

    # --- starting and resuming ----------------------------------------------------------------------------

    def begin(self, state: TrainingState) -> None:
        """Claims the directory and restores the state from its last checkpoint, or writes the first one of a new run.

        Raises:
            UserError: see `open`; or the checkpoint does not fit the state.
        """
        if content := self.open():
            state.restore(content, self.path / LAST)
            self.complete(state)
        else:
            self.save(LAST, state)  # the first file of a run, so that it can always be resumed
        if not self.config.TRAIN.TRAIN_EPISODES:  # without training, the initial state is the best
            self.save(BEST, state)

    def open(self) -> dict[str, Any] | None:
        """Claims the directory; returns the content of the checkpoint to resume from, or None.

        Raises:
            UserError: the directory belongs to another run, or its checkpoint to another experiment.
        """
        return distributed.from_main(self._open)

    def _open(self) -> dict[str, Any] | None:
        resume = self.config.CHECKPOINT.RESUME_FROM_CHECKPOINT or self._is_restart()
        self.claim(resume)
        path = self.path / LAST
        if resume and path.is_file():
            content = load_checkpoint(path)
            if self._ends_here(content):
                content["validation_due"] = True
            self._refuse_other_run(content, path)
            return content
        if resume:
            logger.warning("nothing to resume in %s: a new run begins", self.path)
        return None

    def _is_restart(self) -> bool:
        """Returns whether torchrun restarted this run; it then resumes without --resume."""
        return distributed.is_restart() and last_holder(self.path / LOCK).get("started_by") == launcher()

    def _ends_here(self, content: Mapping[str, Any]) -> bool:
        """Returns whether a run that was longer now ends at its checkpoint: what follows the last step is still due."""
        planned, length = dict(leaves(content.get("config") or {})).get(LENGTH), self.config.TRAIN.TRAIN_EPISODES
        return isinstance(planned, int) and planned > length > 0 and content.get("episode") == length

    def claim(self, resume: bool) -> None:
        """Creates and locks the directory, see `open_run_directory`; only for process 0."""
        self.lock = open_run_directory(self.path, resume)

    def _refuse_other_run(self, content: dict[str, Any], path: Path) -> None:
        """Raises UserError if the checkpoint belongs to another config or other data, or contains only weights."""
        if not content.get("config") or "optimizer" not in content:
            raise UserError(
                f"{path}: contains only weights, which cannot be resumed, only tested; use another directory"
            )
        train, episode = self.config.TRAIN, content["episode"]
        is_complete = episode >= train.TRAIN_EPISODES
        validates = train.VAL_FREQ > 0 and (not is_complete or bool(content.get("validation_due")))
        check_resumed_config(content["config"], config_to_dict(self.config), path, episode, validates)
        before = content.get("data")
        before = before if isinstance(before, dict) else {}
        needed = self.data if episode else self.data.keys() & before.keys()  # training may add the train split
        if differ := [name for name in self.data if name in needed and before.get(name) != self.data[name]]:
            raise UserError(
                f"cannot resume {path} on other data (changed: {', '.join(differ)}): restore DATA.SPLIT_DIR, "
                f"DATA.DATA_DIR and its content, or start a new run with another CHECKPOINT.CHECKPOINT_DIR"
            )
        if episode % train.TASKS_PER_BATCH and not is_complete:
            logger.warning(
                "the resumed run ended with a group of fewer than TRAIN.TASKS_PER_BATCH episodes, so its weights will "
                "differ from those of an uninterrupted run of this length"
            )

    # --- saving -------------------------------------------------------------------------------------------

    def save(self, name: str, state: TrainingState) -> None:
        """Writes one checkpoint.

        Raises:
            UserError: the file cannot be written; an older file of this name remains unchanged.
        """
        train = self.config.TRAIN
        selected_on = train.VAL_SPLIT if name == BEST and train.VAL_FREQ and train.TRAIN_EPISODES else "nothing"
        about = {"config": config_to_dict(self.config), "data": self.data, "selected_on": selected_on}
        self._write(self.path / name, {**state.content(), **about})

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        """Writes a file while the other processes wait, since torchrun kills the writer if another process fails."""
        distributed.from_main(lambda: save_checkpoint(path, content))

    def save_on_schedule(self, state: TrainingState, is_best: bool) -> None:
        """Writes `best` if due, then `last`, then a checkpoint to keep; deletes the oldest beyond CHECKPOINT.KEEP.

        This order loses nothing if the process is killed between two writes: a resumed run continues from `last`, which
        lists the checkpoint to keep before that file exists.
        """
        if is_best:
            self.save(BEST, state)
        is_new = self.config.CHECKPOINT.KEEP and state.episode not in state.kept
        if is_new and distributed.from_main(lambda: self._is_free(kept_name(state.episode))):
            state.kept.append(state.episode)
        self.save(LAST, state)
        self.complete(state)

    def complete(self, state: TrainingState) -> None:
        """Does the work after the write of `last`; a resumed run repeats it, in case a kill prevented it."""
        name = kept_name(state.episode)
        if state.episode in state.kept and distributed.from_main(lambda: not (self.path / name).exists()):
            self.save(name, state)
        while len(state.kept) > self.config.CHECKPOINT.KEEP:
            oldest = self.path / kept_name(state.kept.pop(0))
            if distributed.is_main():
                oldest.unlink(missing_ok=True)

    def _is_free(self, name: str) -> bool:
        path = self.path / name
        if path.exists():
            logger.warning("%s was not written by this run, so it is not changed", path)
        return not path.exists()

    @contextmanager
    def saved_on_interruption(self, state: TrainingState, samplers: Mapping[str, EpisodeSampler]) -> Iterator[None]:
        """Saves the state if a signal or a step with NaN or inf ends this block.

        Args:
            state: the state of the run.
            samplers: name of a split -> its episodes.

        Raises:
            StopRequested: a signal was received; `last` contains the current state.
            UserError: a step was not finite; the message names the file of `--replay`.
        """
        try:
            with stopping.deferred(lambda: self._save_stopped(state)):
                yield
        except NotFiniteError as error:
            path = self._save_replay(state, error.group, samplers["train"])
            raise UserError(f"{error}; to find out where: python run/run.py --replay {path}") from error

    def _save_stopped(self, state: TrainingState) -> str:
        """Writes `last` when a signal ends the run; returns the end of the message."""
        distributed.average_buffers(state.model)
        self.save(LAST, state)
        return f"after {counted(state.episode, 'episode')}, saved in {self.path / LAST}: continue with --resume"

    def _save_replay(self, state: TrainingState, group: range, sampler: EpisodeSampler) -> Path:
        """Writes the file of `run.py --replay` for the step of a group of episodes; returns its path.

        It contains a checkpoint from before the step, and the step's episodes with their videos for a human reader.
        """
        specs = [sampler.episode(i) for i in group]
        videos = [sorted({str(sampler.index.path(int(v))) for v in (*s.support.ravel(), *s.query)}) for s in specs]
        path = self.path / f"replay_{group.start}.pt"
        content = {**state.content(), "episode": group.start, "config": config_to_dict(self.config)}
        replay = {"seed": sampler.seed, "episodes": list(group), "videos": videos}
        self._write(path, {**content, "replay": replay})
        return path


def kept_name(episode: int) -> str:
    """Returns the file name of the checkpoint after a number of episodes."""
    return f"checkpoint_{episode}.pt"


def open_run_directory(directory: Path, resume: bool) -> AbstractContextManager[Any]:
    """Creates a run directory, or opens an existing one with `resume`; returns its lock.

    Raises:
        UserError: the directory is in use, or it is not empty and the run should not or cannot be resumed.
    """
    _refuse_contents(directory, resume)  # before the lock file is written
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"CHECKPOINT.CHECKPOINT_DIR: cannot create {directory}: {error.strerror}") from error
    with writing(directory / LOCK):
        name, instead = f"the run directory {directory}", "choose another directory with CHECKPOINT.CHECKPOINT_DIR"
        lock = exclusive(directory / LOCK, name, instead)
    _refuse_contents(directory, resume)  # another run may have started and ended in the meantime
    return lock


def _refuse_contents(directory: Path, resume: bool) -> None:
    """Raises UserError if the directory contains files of a run, unless that run should and can be resumed."""
    has_run = directory.is_dir() and any(not _is_beside_a_run(path) for path in directory.iterdir())
    if has_run and resume and not (directory / LAST).is_file():
        raise UserError(
            f"the run directory {directory} is not empty but has no {LAST} to resume from, and is never overwritten: "
            f"choose another one with CHECKPOINT.CHECKPOINT_DIR"
        )
    if has_run and not resume:
        raise UserError(
            f"the run directory {directory} is not empty and is never overwritten: continue its run with --resume, or "
            f"start another with CHECKPOINT.CHECKPOINT_DIR=another_directory"
        )


def _is_beside_a_run(path: Path) -> bool:
    """Returns whether a file may exist without a training run: lock, log, test results, trace or partial write."""
    # A test run writes its numbers for TensorBoard too.
    is_result = path.name.startswith(("results", "answers")) and path.suffix in (".json", ".npz")
    return (
        is_result or path.name in (LOCK, LOG, TENSORBOARD) or path.suffix == ".part" or path.name.endswith(TRACE_SUFFIX)
    )
