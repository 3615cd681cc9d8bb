"""Torch data sets and loaders: over episodes for training, over single videos for encoding.

Everything stays uint8 until it is on the device. Shapes: N ways, K shots, Q queries, T frames.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from episodes.decoding import read_frames
from episodes.sampler import EpisodeSampler, generator
from episodes.splits import MAX_PROBLEMS_SHOWN, SplitIndex
from utils import distributed
from utils.errors import UserError, first_of
from utils.jobs import block_signals
from videotransforms.video_transforms import TestTransform, TrainTransform, mirror
from videotransforms.volume_transforms import FrameChoice, Sampling

JOB_SIGNALS = (signal.SIGINT, signal.SIGUSR1, *([] if sys.platform == "darwin" else [signal.SIGTERM]))

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipOptions:
    """Settings that turn a video into a clip.

    Attributes:
        length: T, frames in a clip.
        sampling: how they are chosen in training.
        size: side of the crop in pixels.
        short_side: short side of the frame before the crop, in pixels.
        flip: mirror training clips at random.
    """

    length: int
    sampling: Sampling
    size: int
    short_side: int
    flip: bool


@dataclass(frozen=True)
class EpisodeClips:
    """One training episode.

    Attributes:
        index: its number.
        clips: uint8 [N*K + Q, T, 3, H, W], support videos by class, then the queries; channels last in memory, as
            decoded.
        mirrored: for each clip, whether `on` mirrors it.
        class_ids: int64 [N].
        query_labels: int64 [Q].
        bad_clips: unreadable videos, name -> reason; each was replaced by another video of its class.
    """

    index: int
    clips: Tensor
    mirrored: list[bool]
    class_ids: Tensor
    query_labels: Tensor
    bad_clips: dict[str, str]

    def pin_memory(self) -> "EpisodeClips":
        """Returns the episode in page-locked memory; the DataLoader calls this."""
        return replace(
            self,
            clips=self.clips.pin_memory(),
            class_ids=self.class_ids.pin_memory(),
            query_labels=self.query_labels.pin_memory(),
        )

    def on(self, device: torch.device) -> Tensor:
        """Returns the clips on a device, mirrored there: uint8 [N*K + Q, T, 3, H, W], contiguous."""
        return mirror(self.clips.to(device, non_blocking=True), self.mirrored)


class EpisodeDataset(Dataset[EpisodeClips]):
    """Some training episodes; item j is episode number episodes[j]."""

    def __init__(self, sampler: EpisodeSampler, options: ClipOptions, episodes: range, max_bad_clips: int = 0) -> None:
        """Stores the episode numbers, and the number of unreadable videos that an episode may have."""
        self.sampler, self.options, self.episodes, self.max_bad_clips = sampler, options, episodes, max_bad_clips
        self.transform = TrainTransform(options.short_side, options.size, options.flip)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, item: int) -> EpisodeClips:
        """Reads and cuts all clips of an episode.

        Raises:
            UserError: more than `max_bad_clips` videos are unreadable, or their class has no other video left.
            IndexError: `item` is out of range; this ends iteration.
        """
        spec = self.sampler.episode(self.episodes[item])
        videos = [int(video) for video in (*spec.support.ravel(), *spec.query)]
        bad_clips: dict[str, str] = {}
        # Allocated together: stacking single clips would take half as long as decoding them.
        size = self.options.size
        pixels = torch.empty((len(videos), self.options.length, size, size, 3), dtype=torch.uint8)
        clips = pixels.movedim(-1, 2)
        mirrored = [
            self._read_clip(videos, spec.index, position, bad_clips, clips[position]) for position in range(len(videos))
        ]
        return EpisodeClips(
            spec.index,
            clips,
            mirrored,
            torch.from_numpy(spec.class_ids),
            torch.from_numpy(spec.query_labels),
            bad_clips,
        )

    def _read_clip(
        self, videos: list[int], episode: int, position: int, bad_clips: dict[str, str], clip: Tensor
    ) -> bool:
        """Reads videos[position] into `clip`; replaces an unreadable video and records it in `bad_clips`.

        Returns:
            whether the clip should be mirrored.
        """
        index = self.sampler.index
        while True:
            try:
                return self._draw_clip(videos[position], episode, position, clip)
            except UserError as error:
                name = index.video_names[videos[position]]
                bad_clips[name] = str(error)
                raise_if_too_many(bad_clips, self.max_bad_clips)
                videos[position] = self._other_video(videos, episode, position, bad_clips)

    def _other_video(self, videos: list[int], episode: int, position: int, bad_clips: dict[str, str]) -> int:
        """Draws a video of the same class that is not in the episode, from (seed, split, episode, position)."""
        index = self.sampler.index
        class_id = index.class_of_video[videos[position]]
        others = [
            video
            for video in np.setdiff1d(index.videos_of_class[class_id], videos)
            if index.video_names[video] not in bad_clips
        ]
        if not others:
            raise UserError(
                f"class {index.classes[class_id].folder!r} of {index.split} has too few readable videos for "
                f"episode {episode}: prepare the broken ones again ({'; '.join(bad_clips.values())})"
            )
        # The clip's own stream, extended by one nonzero number.
        rng = generator(self.sampler.seed, index.split, episode, position + 1, len(bad_clips))
        return int(rng.choice(others))

    def _draw_clip(self, video: int, episode: int, position: int, clip: Tensor) -> bool:
        """Draws a clip from (seed, split, episode, position) into `clip`; returns whether to mirror it."""
        index = self.sampler.index
        # From 1, so that no clip shares the stream of the episode, whose seed ends with `episode`.
        rng = generator(self.sampler.seed, index.split, episode, position + 1)
        choice = FrameChoice(self.options.length, self.options.sampling, rng)
        frames, choice = read_frames(index.path(video), choice)
        assert choice.rng is not None
        cut, mirrored = self.transform(frames, choice.rng)
        clip.copy_(cut)
        return mirrored


# --- unreadable training videos -----------------------------------------------------------------------------


class _HasBadClips(Protocol):
    @property
    def bad_clips(self) -> dict[str, str]: ...


AnyEpisode = TypeVar("AnyEpisode", bound=_HasBadClips)


class BadClips:
    """The training videos found unreadable so far: name -> reason."""

    def __init__(self, limit: int) -> None:
        """Stores the limit, DATA.MAX_BAD_CLIPS."""
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def watch(self, episodes: Iterable[AnyEpisode]) -> Generator[AnyEpisode, None, None]:
        """Yields the episodes and adds the bad clips of each.

        Raises:
            UserError: there are more than DATA.MAX_BAD_CLIPS.
        """
        for episode in episodes:
            self._add(episode.bad_clips)
            yield episode

    def share(self) -> None:
        """Shares what each process has found; all processes call this together.

        Raises:
            UserError: there are more than DATA.MAX_BAD_CLIPS.
        """
        for reasons in distributed.gather(dict(self.reasons)):
            self._add(reasons)

    def _add(self, reasons: Mapping[str, str]) -> None:
        """Records and logs new bad clips."""
        for name, reason in reasons.items():
            if name not in self.reasons:
                self.reasons[name] = reason
                logger.warning("replaced unreadable video %s by another one of its class: %s", name, reason)
        raise_if_too_many(self.reasons, self.limit)


def raise_if_too_many(reasons: Mapping[str, str], limit: int) -> None:
    """Raises a UserError that names the videos if there are more than DATA.MAX_BAD_CLIPS."""
    if len(reasons) <= limit:
        return
    names = list(reasons)
    raise UserError(
        f"{len(names)} training videos are unreadable, DATA.MAX_BAD_CLIPS allows {limit}: "
        f"{', '.join(first_of(names, MAX_PROBLEMS_SHOWN))}; prepare them again, remove them from the list, or raise "
        f"DATA.MAX_BAD_CLIPS (the most recent: {reasons[names[-1]]})"
    )


# --- test clips and loaders ---------------------------------------------------------------------------------


class VideoDataset(Dataset[Tensor]):
    """The fixed test clip of every video of a split: uint8 [T, 3, H, W]."""

    def __init__(self, index: SplitIndex, options: ClipOptions, videos: Sequence[int]) -> None:
        self.index, self.options, self.videos = index, options, list(videos)
        self.transform = TestTransform(options.short_side, options.size)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, item: int) -> Tensor:
        choice = FrameChoice(self.options.length, self.options.sampling, None)
        frames, _ = read_frames(self.index.path(self.videos[item]), choice)
        return self.transform(frames)


class _Loader(DataLoader):
    """A DataLoader that starts its workers with signals blocked until `set_up_worker` ignores them."""

    def __iter__(self) -> Any:
        with block_signals(*JOB_SIGNALS):
            return super().__iter__()


def episode_loader(dataset: EpisodeDataset, workers: int, device: torch.device) -> DataLoader[EpisodeClips]:
    """Returns a loader of episodes in order, one at a time, read ahead by `workers` processes."""
    return _Loader(dataset, batch_size=None, **_loader_options(workers, device))


class ClipReader:
    """A loader of test clips according to `options`, with `workers` processes.

    Persistent workers are reused for another pass over the same videos, as in repeated validation; a pass over other
    videos, or `close`, ends them.
    """

    def __init__(self, options: ClipOptions, workers: int, keep_workers: bool = False) -> None:
        """Stores the options; workers start with the first pass."""
        self.options, self.workers, self.keep_workers = options, workers, keep_workers and workers > 0
        self._kept: tuple[VideoDataset, DataLoader[Tensor]] | None = None

    def loader(
        self, index: SplitIndex, videos: Sequence[int], batch_size: int, device: torch.device
    ) -> DataLoader[Tensor]:
        """Returns a loader of test clips in order, in batches uint8 [V, T, 3, H, W]."""
        if self._kept:
            dataset, loader = self._kept
            if dataset.index is index and dataset.videos == list(videos) and loader.batch_size == batch_size:
                return loader
        self.close()
        dataset = VideoDataset(index, self.options, videos)
        workers = _loader_options(self.workers, device)
        loader = _Loader(dataset, batch_size=batch_size, persistent_workers=self.keep_workers, **workers)
        if self.keep_workers:
            self._kept = dataset, loader
        return loader

    def close(self) -> None:
        """Ends persistent workers, which live as long as their loader."""
        self._kept = None


def _loader_options(workers: int, device: torch.device) -> dict:
    options: dict = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": set_up_worker}
    return options


def set_up_worker(worker: int) -> None:
    """Ignores signals sent to the whole job (Ctrl-C, SIGTERM, SIGUSR1); called in each new worker.

    The main process finishes its step with the clips that the workers read, and ends them afterwards.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform != "darwin":  # macOS does not report the sender of a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Waits for the SIGTERM with which the main process ends its workers; ignores that of other senders."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
