"""Episode i as a pure function of (seed, split, i).

There is no state, so every worker, every rank and a resumed run get the same episode i, for every method.

Shapes: N ways, K shots, Q queries of an episode (N * queries per class).
"""

import hashlib
import zlib
from dataclasses import dataclass

import numpy as np

from episodes.splits import TOO_FEW_CLASSES, SplitIndex
from utils.errors import UserError, counted, first_of

MAX_CLASSES_SHOWN = 2  # classes of each split with too few videos, listed in a message


@dataclass(frozen=True)
class EpisodeSpec:
    """The videos of one episode.

    index: the number i of the episode.
    class_ids: int64 [N], positions among the classes of the split.
    support: int64 [N, K], video numbers, row n from class_ids[n].
    query: int64 [Q], video numbers in random order, so that their order does not depend on their classes.
    query_labels: int64 [Q], the position of each query's class in class_ids.
    """

    index: int
    class_ids: np.ndarray
    support: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray


class EpisodeSampler:
    """A sampler of N-way K-shot episodes of one split; all classes, and all videos of a class, are equally likely."""

    def __init__(self, index: SplitIndex, way: int, shot: int, query_per_class: int, seed: int) -> None:
        """Checks that every episode can be sampled.

        Args:
            index: the split.
            way: N classes per episode.
            shot: K support videos per class.
            query_per_class: queries per class.
            seed: different seeds give independent episodes.

        Raises:
            UserError: fewer classes than ways, or a class with fewer videos than shot + query_per_class.
        """
        problems = []
        if len(index.classes) < way:
            remedy = "; lower TRAIN.WAY, TRAIN.VAL_WAY or TEST.WAY"
            if len(index.classes) < 2:
                remedy = f"; {TOO_FEW_CLASSES[index.split]}"
            problems.append(
                f"{index.split} of {index.dataset} has {counted(len(index.classes), 'class')}, "
                f"a {way}-way episode needs {way}" + remedy
            )
        small = [
            f"{index.split} class {entry.folder!r} has {counted(len(videos), 'video')}, an episode of "
            f"{counted(shot, 'shot')} and {counted(query_per_class, 'query')} per class needs "
            f"{shot + query_per_class}; lower SHOT or QUERY_PER_CLASS"
            for entry, videos in zip(index.classes, index.videos_of_class, strict=True)
            if len(videos) < shot + query_per_class
        ]
        problems += first_of(small, MAX_CLASSES_SHOWN, f" of the {len(index.classes)} {index.split} classes")
        if problems:
            raise UserError("\n".join(problems))
        self.index, self.way, self.shot, self.query_per_class, self.seed = index, way, shot, query_per_class, seed

    def episode(self, i: int) -> EpisodeSpec:
        """Samples episode number i >= 0."""
        rng = generator(self.seed, self.index.split, i)
        class_ids = rng.choice(len(self.index.classes), size=self.way, replace=False)
        chosen = np.stack([self._choose_videos(rng, class_id) for class_id in class_ids])
        order = rng.permutation(self.way * self.query_per_class)
        labels = np.repeat(np.arange(self.way), self.query_per_class)
        return EpisodeSpec(
            index=i,
            class_ids=class_ids,
            support=chosen[:, : self.shot],
            query=chosen[:, self.shot :].reshape(-1)[order],
            query_labels=labels[order],
        )

    def _choose_videos(self, rng: np.random.Generator, class_id: int) -> np.ndarray:
        """Draws K + queries different videos of one class: int64 [K + queries]."""
        videos = self.index.videos_of_class[class_id]
        return rng.choice(videos, size=self.shot + self.query_per_class, replace=False, shuffle=True)

    def digest(self, count: int) -> str:
        """Returns the SHA-256 of the episodes 0 .. count - 1, which is equal only for the same videos."""
        digest = hashlib.sha256(f"{self.index.digest()} {self.way} {self.shot} {self.query_per_class}".encode())
        for i in range(count):
            spec = self.episode(i)
            digest.update(np.concatenate([spec.support.ravel(), spec.query]).astype("<i8").tobytes())
        return digest.hexdigest()


def generator(seed: int, split: str, *numbers: int) -> np.random.Generator:
    """Returns a random generator that depends only on its arguments: the run's seed, the split and e.g. the episode.

    numpy pads the numbers with zeros, so a trailing zero changes nothing: an optional last number must start at 1.
    """
    return np.random.default_rng([seed, zlib.crc32(split.encode()), *numbers])
