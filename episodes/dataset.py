"""Torch data sets and loaders: over episodes for training, over single videos for encoding.

Everything stays uint8 until it is on the device. Shapes: N ways, K shots, Q queries, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from episodes.sampler import EpisodeSampler, generator
from episodes.splits import SplitIndex
from episodes.video import read_frames
from episodes.workers import set_up_worker
from videotransforms.video_transforms import TestTransform, TrainTransform
from videotransforms.volume_transforms import Sampling, frame_chooser


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

    index: its number. clips: uint8 [N*K + Q, T, 3, H, W], support videos by class, then the queries.
    class_ids: int64 [N]. query_labels: int64 [Q].
    """

    index: int
    clips: Tensor
    class_ids: Tensor
    query_labels: Tensor

    def pin_memory(self) -> "EpisodeClips":
        """The same episode in page-locked memory; the DataLoader calls this."""
        return EpisodeClips(
            self.index, self.clips.pin_memory(), self.class_ids.pin_memory(), self.query_labels.pin_memory()
        )


class EpisodeDataset(Dataset[EpisodeClips]):
    """Some training episodes; item j is episode number episodes[j]."""

    def __init__(self, sampler: EpisodeSampler, options: ClipOptions, episodes: range) -> None:
        self.sampler, self.options, self.episodes = sampler, options, episodes
        self.transform = TrainTransform(options.short_side, options.size, options.flip)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, item: int) -> EpisodeClips:
        """Reads and augments all clips of an episode.

        Raises:
            UserError: a video cannot be read.
            IndexError: there is no such item; iteration ends by it.
        """
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} episodes")
        spec = self.sampler.episode(self.episodes[item])
        videos = [*spec.support.ravel(), *spec.query]
        clips = [self._clip(int(video), spec.index, position) for position, video in enumerate(videos)]
        return EpisodeClips(
            spec.index, torch.stack(clips), torch.from_numpy(spec.class_ids), torch.from_numpy(spec.query_labels)
        )

    def _clip(self, video: int, episode: int, position: int) -> Tensor:
        """One augmented clip, drawn from (seed, split, episode, position): uint8 [T, 3, H, W]."""
        index = self.sampler.index
        # From 1, so that no clip shares the stream of the episode's own generator, which ends after `episode`.
        rng = generator(self.sampler.seed, index.split, episode, position + 1)
        frames = read_frames(index.path(video), frame_chooser(self.options.length, self.options.sampling, rng))
        return self.transform(frames, rng)


class VideoDataset(Dataset[Tensor]):
    """The fixed test clip of every video of a split: uint8 [T, 3, H, W]."""

    def __init__(self, index: SplitIndex, options: ClipOptions, videos: Sequence[int]) -> None:
        self.index, self.options, self.videos = index, options, videos
        self.transform = TestTransform(options.short_side, options.size)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, item: int) -> Tensor:
        path = self.index.path(self.videos[item])
        return self.transform(read_frames(path, frame_chooser(self.options.length, self.options.sampling, None)))


def episode_loader(dataset: EpisodeDataset, workers: int, device: torch.device) -> DataLoader[EpisodeClips]:
    """Episodes in order, one at a time, read ahead by `workers` processes."""
    return DataLoader(dataset, batch_size=None, **_loader_options(workers, device))


def video_loader(dataset: VideoDataset, batch_size: int, workers: int, device: torch.device) -> DataLoader[Tensor]:
    """Test clips in order, in batches uint8 [V, T, 3, H, W]."""
    return DataLoader(dataset, batch_size=batch_size, **_loader_options(workers, device))


def _loader_options(workers: int, device: torch.device) -> dict:
    options: dict = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": set_up_worker}
    return options
