"""Torch data sets and loaders: over episodes for training, over single videos for encoding.

Everything stays uint8 until it is on the device. Shapes: N ways, K shots, Q queries, T frames.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from episodes.bad_clips import refuse_too_many
from episodes.decoding import read_frames
from episodes.sampler import EpisodeSampler, generator
from episodes.splits import SplitIndex
from episodes.workers import set_up_worker
from utils.errors import UserError
from utils.jobs import children_block
from videotransforms.video_transforms import TestTransform, TrainTransform, mirror
from videotransforms.volume_transforms import FrameChoice, Sampling

OF_THE_WHOLE_RUN = (signal.SIGINT, signal.SIGUSR1, *([] if sys.platform == "darwin" else [signal.SIGTERM]))


@dataclass(frozen=True)
class ClipOptions:
    """How a clip is made from a video.

    length: T frames; sampling: which ones in training; size: side of the crop in pixels;
    short_side: of the frame before the crop, in pixels; flip: mirror training clips at random.
    """

    length: int
    sampling: Sampling
    size: int
    short_side: int
    flip: bool


@dataclass(frozen=True)
class EpisodeClips:
    """One training episode.

    index: its number. clips: uint8 [N*K + Q, T, 3, H, W], support videos by class, then the queries; the channels of
    a pixel lie together, as they were decoded. mirrored: for each of them, whether `on` mirrors it.
    class_ids: int64 [N]. query_labels: int64 [Q]. bad_clips: the videos that could not be read, name -> why;
    another one of the class has taken the place of each.
    """

    index: int
    clips: Tensor
    mirrored: list[bool]
    class_ids: Tensor
    query_labels: Tensor
    bad_clips: dict[str, str]

    def pin_memory(self) -> "EpisodeClips":
        """The same episode in page-locked memory; the DataLoader calls this."""
        return replace(
            self,
            clips=self.clips.pin_memory(),
            class_ids=self.class_ids.pin_memory(),
            query_labels=self.query_labels.pin_memory(),
        )

    def on(self, device: torch.device) -> Tensor:
        """The clips on a device, mirrored there: uint8 [N*K + Q, T, 3, H, W], contiguous."""
        return mirror(self.clips.to(device, non_blocking=True), self.mirrored)


class EpisodeDataset(Dataset[EpisodeClips]):
    """Some training episodes; item j is episode number episodes[j]."""

    def __init__(self, sampler: EpisodeSampler, options: ClipOptions, episodes: range, max_bad_clips: int = 0) -> None:
        """Takes which episodes these are, and how many videos that cannot be read are tolerated in one of them."""
        self.sampler, self.options, self.episodes, self.max_bad_clips = sampler, options, episodes, max_bad_clips
        self.transform = TrainTransform(options.short_side, options.size, options.flip)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, item: int) -> EpisodeClips:
        """Reads and cuts all clips of an episode.

        Raises:
            UserError: more videos than `max_bad_clips` cannot be read, or no other one of their class is left.
            IndexError: there is no such item; iteration ends by it.
        """
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} episodes")
        spec = self.sampler.episode(self.episodes[item])
        videos = [int(video) for video in (*spec.support.ravel(), *spec.query)]
        bad_clips: dict[str, str] = {}
        # One piece of memory from the start: putting single clips together costs half as much as decoding them.
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
        """Reads videos[position] into `clip`; one that is broken goes to `bad_clips`, and another takes its place.

        Returns whether the clip is to be mirrored.
        """
        index = self.sampler.index
        while True:
            try:
                return self._draw_clip(videos[position], episode, position, clip)
            except UserError as error:
                name = index.video_names[videos[position]]
                bad_clips[name] = str(error)
                refuse_too_many(bad_clips, self.max_bad_clips)
                videos[position] = self._other_video(videos, episode, position, bad_clips)

    def _other_video(self, videos: list[int], episode: int, position: int, bad_clips: dict[str, str]) -> int:
        """A video of the same class that is not in the episode, drawn from (seed, split, episode, position)."""
        index = self.sampler.index
        class_id = index.class_of_video[videos[position]]
        others = [
            video
            for video in np.setdiff1d(index.videos_of_class[class_id], videos)
            if index.video_names[video] not in bad_clips
        ]
        if not others:
            raise UserError(
                f"class {index.classes[class_id].folder!r} of {index.split} has too few videos that can be read for "
                f"episode {episode}: prepare the broken ones again ({'; '.join(bad_clips.values())})"
            )
        # Counted on from the clip's own stream by one number that is not zero.
        rng = generator(self.sampler.seed, index.split, episode, position + 1, len(bad_clips))
        return int(rng.choice(others))

    def _draw_clip(self, video: int, episode: int, position: int, clip: Tensor) -> bool:
        """Fills `clip`, uint8 [T, 3, H, W], with one drawn from (seed, split, episode, position); true: to mirror."""
        index = self.sampler.index
        # From 1, so that no clip shares the stream of the episode's own generator, which ends after `episode`.
        rng = generator(self.sampler.seed, index.split, episode, position + 1)
        choice = FrameChoice(self.options.length, self.options.sampling, rng)
        frames, choice = read_frames(index.path(video), choice)
        assert choice.rng is not None
        cut, mirrored = self.transform(frames, choice.rng)
        clip.copy_(cut)
        return mirrored


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
    """Starts its processes with the signals blocked that `set_up_worker` then ignores."""

    def __iter__(self) -> Any:
        with children_block(*OF_THE_WHOLE_RUN):
            return super().__iter__()


def episode_loader(dataset: EpisodeDataset, workers: int, device: torch.device) -> DataLoader[EpisodeClips]:
    """Episodes in order, one at a time, read ahead by `workers` processes."""
    return _Loader(dataset, batch_size=None, **_loader_options(workers, device))


class ClipReader:
    """Makes test clips as `options` say; `workers` processes read them.

    Processes that are kept wait after the last clip until the same videos are asked for again, as in one validation
    after the other; other videos, or `close`, end them.
    """

    def __init__(self, options: ClipOptions, workers: int, keep_workers: bool = False) -> None:
        """Takes how clips are made and read; starts nothing yet."""
        self.options, self.workers, self.keep_workers = options, workers, keep_workers and workers > 0
        self._kept: tuple[VideoDataset, DataLoader[Tensor]] | None = None

    def loader(
        self, index: SplitIndex, videos: Sequence[int], batch_size: int, device: torch.device
    ) -> DataLoader[Tensor]:
        """Test clips in order, in batches uint8 [V, T, 3, H, W]."""
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
        """Ends the processes that were kept: they live as long as their loader."""
        self._kept = None


def _loader_options(workers: int, device: torch.device) -> dict:
    options: dict = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": set_up_worker}
    return options
