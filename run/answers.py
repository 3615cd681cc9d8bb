"""answers.npz: every answer of a test run, for tables, figures, paired comparisons and intervals over videos.

Shapes: E episodes, N ways, K shots, Q queries, V videos and C classes of the split.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError
from utils.statistics import Estimate, over_videos

if TYPE_CHECKING:  # comparing results does not require PyTorch
    from episodes.sampler import EpisodeSampler
    from models.base import ProtocolName
    from run.evaluation import Evaluation

ARRAYS = ("classes", "prompts", "videos", "class_ids", "support", "query", "labels")
SCORES = "scores_"


@dataclass(frozen=True)
class Answers:
    """The videos of all episodes of a test run, and the scores of every query.

    classes, prompts: str [C], folder and prompt of each class.
    videos: str [V], `class/video` names.
    class_ids: int32 [E, N], positions in classes.
    support: int32 [E, N, K], positions in videos.
    query: int32 [E, Q], positions in videos.
    labels: int32 [E, Q], position of the true class among the N.
    scores: protocol -> float32 [E, Q, N].
    """

    classes: np.ndarray
    prompts: np.ndarray
    videos: np.ndarray
    class_ids: np.ndarray
    support: np.ndarray
    query: np.ndarray
    labels: np.ndarray
    scores: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, sampler: "EpisodeSampler", evaluations: "Mapping[ProtocolName, Evaluation]") -> "Answers":
        """Collects the answers of a test run from its evaluations of episodes 0 to E-1 of the sampler."""
        index = sampler.index
        episodes = len(next(iter(evaluations.values())).scores)
        specs = [sampler.episode(i) for i in range(episodes)]
        return cls(
            classes=np.array([entry.folder for entry in index.classes]),
            prompts=np.array(index.prompts),
            videos=np.array(index.video_names),
            class_ids=np.stack([spec.class_ids for spec in specs]).astype(np.int32),
            support=np.stack([spec.support for spec in specs]).astype(np.int32),
            query=np.stack([spec.query for spec in specs]).astype(np.int32),
            labels=np.stack([spec.query_labels for spec in specs]).astype(np.int32),
            scores={protocol: evaluation.scores for protocol, evaluation in evaluations.items()},
        )

    @classmethod
    def load(cls, path: Path) -> "Answers":
        """Reads answers.npz.

        Raises:
            UserError: the file is missing, or does not contain the answers of a test run.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            scores = {name[len(SCORES) :]: arrays.pop(name) for name in list(arrays) if name.startswith(SCORES)}
            answers = cls(**{name: arrays[name] for name in ARRAYS}, scores=scores)
            is_whole = answers._is_whole()
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; run the test again to write it") from error
        except Exception as error:  # damaged bytes make the reader raise all kinds of errors
            raise UserError(f"{path} does not contain the answers of a test run; run the test again") from error
        if not is_whole:
            raise UserError(f"{path} contains answers that do not fit together; run the test again")
        return answers

    def _is_whole(self) -> bool:
        """Returns whether shapes and positions fit each other, and each video is one of its class.

        Raises:
            Exception: a position or a shape is impossible; the exception may have any type.
        """
        (episodes, ways), queries = self.class_ids.shape, self.query.shape[1]
        positions = (self.class_ids, self.support, self.query, self.labels)
        class_of_video = self.class_of_video()
        return (
            self.classes.shape == self.prompts.shape == (len(set(self.classes.tolist())),)
            and self.prompts.dtype.kind == "U"
            and self.support.shape[:2] == (episodes, ways)
            and self.query.shape == self.labels.shape == (episodes, queries)
            and all(one.dtype.kind == "i" and one.size and one.min() >= 0 for one in positions)
            and bool((class_of_video[self.query] == self.true_classes()).all())
            and bool((class_of_video[self.support] == self.class_ids[..., None]).all())
            and all(one.shape == (episodes, queries, ways) and np.isfinite(one).all() for one in self.scores.values())
        )

    def as_npz(self) -> bytes:
        """Returns the content of answers.npz, the same bytes for the same answers."""
        buffer = io.BytesIO()
        scores = {SCORES + protocol: scores for protocol, scores in self.scores.items()}
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS} | scores
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    def is_right(self, protocol: str) -> np.ndarray:
        """Returns whether each answer is right, bool [E, Q]."""
        return self.scores[protocol].argmax(axis=-1) == self.labels

    def class_of_video(self) -> np.ndarray:
        """Returns the class of each video as a position in classes, int32 [V]."""
        position = {name: number for number, name in enumerate(self.classes.tolist())}
        return np.array([position[name.partition("/")[0]] for name in self.videos.tolist()], dtype=np.int32)

    def over_videos(self, values: np.ndarray) -> Estimate | None:
        """Returns the mean of a value per answer, float [E, Q], with its error; see `utils.statistics.over_videos`."""
        return over_videos(values, self.support, self.query, self.class_of_video())

    def true_classes(self) -> np.ndarray:
        """Returns the class of each query as a position in classes, int32 [E, Q]."""
        return np.take_along_axis(self.class_ids, self.labels, axis=1)

    def chosen_classes(self, protocol: str) -> np.ndarray:
        """Returns the predicted class of each query as a position in classes, int32 [E, Q]."""
        return np.take_along_axis(self.class_ids, self.scores[protocol].argmax(axis=-1), axis=1)
