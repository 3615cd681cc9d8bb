"""The checkpoint files of one run: which there are, when they are deleted, and which one a run resumes from."""

import logging
from pathlib import Path
from typing import IO, Any

from episodes.sampler import EpisodeSampler
from run.state import RESUMABLE, TrainingState
from utils import distributed
from utils.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from utils.config import config_to_dict
from utils.config_changes import refuse_other_config
from utils.errors import UserError
from utils.lock import last_holder
from utils.records import can_resume, open_run_directory
from utils.schema import Config

logger = logging.getLogger(__name__)


class CheckpointFiles:
    """`best`, `last` and the newest CHECKPOINT.KEEP others, in a directory that is this run's as long as it lives.

    All processes call these functions together; process 0 alone touches the files.
    """

    def __init__(self, config: Config, data: dict[str, str]) -> None:
        """Takes the config of the run, and by name what else decides its numbers: digests of its splits, mirroring."""
        self.config, self.data = config, data
        self.directory = Path(config.CHECKPOINT.CHECKPOINT_DIR)
        self.lock: IO[str] | None = None

    def open(self) -> dict[str, Any] | None:
        """Makes the directory this run's; returns the content of the checkpoint to go on from, if there is one.

        Raises:
            UserError: the directory belongs to another run, or its checkpoint to another experiment.
        """
        return distributed.from_main(self._open)

    def _open(self) -> dict[str, Any] | None:
        resume = self.config.CHECKPOINT.RESUME_FROM_CHECKPOINT or self._is_restart()
        self.claim(resume)
        if not (resume and can_resume(self.directory)):
            if resume:
                logger.warning("there is nothing to resume in %s: a new run begins", self.directory)
            return None
        path = self.directory / LAST
        content = load_checkpoint(path)
        if not content.get("config") or any(key not in content for key in RESUMABLE):
            raise UserError(f"{path}: holds weights only, which can be tested but not resumed; use another directory")
        train = self.config.TRAIN
        validates = train.VAL_FREQ > 0 and (content["episode"] < train.TRAIN_EPISODES or content["validation_due"])
        refuse_other_config(content["config"], config_to_dict(self.config), path, content["episode"], validates)
        self._refuse_other_data(content["data"], content["episode"], path)
        if content["episode"] % train.TASKS_PER_BATCH and content["episode"] < train.TRAIN_EPISODES:
            logger.warning(
                "the run that is continued ended with a group of fewer than TRAIN.TASKS_PER_BATCH episodes, so its "
                "weights will not be those of a run that was so long from the start"
            )
        return content

    def _refuse_other_data(self, stored: Any, episode: int, path: Path) -> None:
        """Raises UserError where the classes or videos are not those that the run began with.

        A run that has trained on nothing yet may not have had the train split.
        """
        before = stored if isinstance(stored, dict) else {}
        begun = self.data if episode else self.data.keys() & before.keys()
        differ = [name for name in self.data if name in begun and before.get(name) != self.data[name]]
        if differ:
            raise UserError(
                f"cannot resume {path} on other data (not as it was: {', '.join(differ)}): set DATA.SPLIT_DIR, "
                f"DATA.DATA_DIR and what lies there back, or start a new run with another CHECKPOINT.CHECKPOINT_DIR"
            )

    def claim(self, resume: bool) -> None:
        """Makes the directory this run's, see `open_run_directory`; for process 0."""
        self.lock = open_run_directory(self.directory, resume, distributed.launcher())

    def _is_restart(self) -> bool:
        """Whether torchrun has restarted this very run, which then needs nobody to say that it should resume."""
        return distributed.is_restart() and last_holder(self.directory).get("started_by") == distributed.launcher()

    def save(self, name: str, state: TrainingState) -> None:
        """Writes one checkpoint.

        Raises:
            UserError: it cannot be written; what was there before is untouched.
        """
        about = {"config": config_to_dict(self.config), "data": self.data, "selected_on": self._selected_on(name)}
        self._write(self.directory / name, {**state.content(), **about})

    def _selected_on(self, name: str) -> str:
        """The split whose accuracy picks a checkpoint: that of the validation for `best`, no one for the others."""
        train = self.config.TRAIN
        return train.VAL_SPLIT if name == BEST and train.VAL_FREQ and train.TRAIN_EPISODES else "nothing"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        """Writes a file; the others wait, since the first process that ends has torchrun end the one that writes."""
        distributed.from_main(lambda: save_checkpoint(path, content))

    def save_on_schedule(self, state: TrainingState, is_best: bool) -> None:
        """Writes `best` if it is, `last`, and one to keep; then deletes those that are too many."""
        if is_best:
            self.save(BEST, state)
        keeps = self.config.CHECKPOINT.KEEP > 0 and distributed.from_main(lambda: self._may_keep(state))
        if keeps:
            state.kept.append(state.episode)
        self.save(LAST, state)  # after `best`, which a run that was killed between the two writes once more
        if keeps:  # after `last`, which names it already: a kill leaves none that nobody knows
            self.save(kept_name(state.episode), state)
        self._delete_old(state)

    def complete(self, state: TrainingState) -> None:
        """Does what a kill after the write of `last` has left undone."""
        missing = state.episode in state.kept and not (self.directory / kept_name(state.episode)).exists()
        if distributed.from_main(lambda: missing):
            self.save(kept_name(state.episode), state)
        self._delete_old(state)

    def save_replay(self, state: TrainingState, group: range, sampler: EpisodeSampler) -> Path:
        """Writes what `run.py --replay` needs to repeat the step of a group of episodes: a checkpoint from before it,
        and for a reader the episodes with the videos in them; returns its path.
        """
        specs = [sampler.episode(i) for i in group]
        videos = [sorted({str(sampler.index.path(int(v))) for v in (*s.support.ravel(), *s.query)}) for s in specs]
        path = self.directory / f"replay_{group.start}.pt"
        content = {**state.content(), "episode": group.start, "config": config_to_dict(self.config)}
        replay = {"seed": sampler.seed, "episodes": list(group), "videos": videos}
        self._write(path, {**content, "replay": replay})
        return path

    def _may_keep(self, state: TrainingState) -> bool:
        path = self.directory / kept_name(state.episode)
        if path.exists():
            logger.warning("%s was not written by this run, so it is left as it is", path)
        return not path.exists()

    def _delete_old(self, state: TrainingState) -> None:
        """Deletes of the checkpoints that this run says it wrote all but the newest CHECKPOINT.KEEP."""
        while len(state.kept) > self.config.CHECKPOINT.KEEP:
            episode = state.kept.pop(0)
            if distributed.is_main():
                (self.directory / kept_name(episode)).unlink(missing_ok=True)


def kept_name(episode: int) -> str:
    """The file name of the checkpoint after so many episodes."""
    return f"checkpoint_{episode}.pt"
