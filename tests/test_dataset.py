"""Clips of episodes and of single videos, and the check that opens every video before a run."""

import logging
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from episodes import dataset as dataset_module
from episodes.checks import unreadable_videos
from episodes.dataset import ClipOptions, ClipReader, EpisodeDataset, VideoDataset, episode_loader
from episodes.sampler import EpisodeSampler, generator
from episodes.splits import MAX_PROBLEMS_SHOWN, SplitIndex, load_splits
from run.command import plain_message
from tests.helpers.episodes import CPU, OPTIONS, assert_same_episode
from tests.helpers.tiny_dataset import TINY_FRAMES, TinyDataset
from utils.errors import UserError
from videotransforms.volume_transforms import Sampling


@pytest.fixture(params=["videos", "frames", "packed"])
def index(request: pytest.FixtureRequest, tiny_dataset: TinyDataset, tiny_packed: Path) -> SplitIndex:
    """Returns the training videos, as files, as folders of frames and in a packed store."""
    root = tiny_packed if request.param == "packed" else getattr(tiny_dataset, request.param)
    return load_splits(tiny_dataset.splits, root, ["train"])["train"]


@pytest.fixture
def own_root(tiny_dataset: TinyDataset, tmp_path: Path) -> Iterator[Path]:
    """Returns a copy of the video files, for tests that change them."""
    shutil.copytree(tiny_dataset.videos, tmp_path / "videos")
    yield tmp_path / "videos"
    shutil.rmtree(tmp_path)


@pytest.fixture
def one_video(tiny_dataset: TinyDataset, own_root: Path) -> dict[str, SplitIndex]:
    """Returns all splits, with the same video under every name: what differs between two clips was drawn."""
    source = (tiny_dataset.videos / "train_action_0" / "train_action_0_00.mp4").read_bytes()
    for path in own_root.glob("*/*.mp4"):
        path.write_bytes(source)
    return load_splits(tiny_dataset.splits, own_root, ["train", "val", "test"])


def episodes_of(
    index: SplitIndex,
    first: int = 0,
    last: int = 4,
    way: int = 3,
    shot: int = 2,
    queries: int = 1,
    seed: int = 6,
    options: ClipOptions = OPTIONS,
) -> EpisodeDataset:
    return EpisodeDataset(EpisodeSampler(index, way, shot, queries, seed), options, range(first, last))


def count_distinct(clips: Sequence[Tensor]) -> int:
    return len({clip.numpy().tobytes() for clip in clips})


# --- training episodes ------------------------------------------------------------------------------------


def test_a_training_episode_is_uint8_support_by_class_then_queries(index: SplitIndex) -> None:
    episodes = episodes_of(index, first=10, last=12)
    item = episodes[1]
    spec = episodes.sampler.episode(11)
    assert item.index == 11
    assert item.clips.dtype == torch.uint8
    assert item.clips.shape == (3 * 2 + 3 * 1, 4, 3, 24, 24)
    assert item.clips.movedim(2, -1).is_contiguous()  # one block, which a single copy takes to the device
    assert len(item.mirrored) == len(item.clips)
    assert item.class_ids.tolist() == spec.class_ids.tolist()
    assert item.query_labels.tolist() == spec.query_labels.tolist()
    assert item.class_ids.dtype == item.query_labels.dtype == torch.int64


def test_clips_drawn_for_mirroring_are_mirrored_on_the_device(index: SplitIndex) -> None:
    item = episodes_of(index)[0]
    assert set(item.mirrored) == {True, False}
    on_device = item.on(CPU)
    assert on_device.is_contiguous()
    for clip, cut, mirrored in zip(on_device, item.clips, item.mirrored, strict=True):
        assert torch.equal(clip, cut.flip(-1) if mirrored else cut)
    plain = episodes_of(index, options=replace(OPTIONS, flip=False))[0]
    assert not any(plain.mirrored)
    assert torch.equal(plain.on(CPU), item.clips)


def test_clips_come_from_the_videos_of_the_episode(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    # Videos of one colour each, which no crop, mirror or choice of frames changes.
    names = load_splits(tiny_dataset.splits, tiny_dataset.videos, ["train"])["train"].video_names
    for number, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        for frame in range(6):
            Image.new("RGB", (40, 32), (number, 0, 255 - number)).save(tmp_path / name / f"{frame}.png")
    index = load_splits(tiny_dataset.splits, tmp_path, ["train"])["train"]
    episodes = episodes_of(index)
    spec = episodes.sampler.episode(2)
    videos = [*spec.support.ravel().tolist(), *spec.query.tolist()]
    assert episodes[2].clips[:, 0, 0, 0, 0].tolist() == videos
    assert episodes[2].clips[:, -1, 2, -1, -1].tolist() == [255 - video for video in videos]
    assert VideoDataset(index, OPTIONS, videos)[3][0, 0, 0, 0] == videos[3]


@pytest.mark.parametrize("sampling", ["linspace", "segments"])
def test_episodes_are_bit_exact_for_any_number_of_workers(index: SplitIndex, sampling: Sampling) -> None:
    episodes = episodes_of(index, options=replace(OPTIONS, sampling=sampling))
    alone = list(episode_loader(episodes, 0, CPU))
    with_workers = list(episode_loader(episodes, 2, CPU))
    assert [item.index for item in alone] == [0, 1, 2, 3]
    for one, other in zip(alone, with_workers, strict=True):
        assert_same_episode(one, other)


def test_clips_do_not_depend_on_global_random_state_or_earlier_reads(index: SplitIndex) -> None:
    episodes = episodes_of(index)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = episodes[2]
    torch.manual_seed(1)
    np.random.seed(1)
    assert_same_episode(episodes[2], expected)
    _ = episodes[3]
    assert_same_episode(episodes[2], expected)
    assert_same_episode(pickle.loads(pickle.dumps(episodes))[2], expected)


def test_clips_depend_only_on_episode_and_position(
    one_video: dict[str, SplitIndex],
) -> None:
    train = one_video["train"]
    small = episodes_of(train, way=2, shot=1, queries=1)[1].on(CPU)
    large = episodes_of(train, way=5, shot=3, queries=2)[1].on(CPU)
    assert torch.equal(large[: len(small)], small)


def test_clips_differ_between_seeds_splits_episodes_and_positions(
    one_video: dict[str, SplitIndex],
) -> None:
    train, val = one_video["train"], one_video["val"]
    items = [*episodes_of(train), episodes_of(train, seed=7)[0], episodes_of(val)[0]]
    clips = [clip for item in items for clip in item.on(CPU)]
    # There are some thousand ways to cut this video; a few of the 54 clips may agree by chance.
    assert count_distinct(clips) >= len(clips) - 3


def test_clips_and_episodes_use_separate_random_numbers(index: SplitIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def spy(seed: int, split: str, *numbers: int) -> np.random.Generator:
        rng = generator(seed, split, *numbers)
        states.append(str(rng.bit_generator.state))
        return rng

    monkeypatch.setattr(dataset_module, "generator", spy)
    episodes = episodes_of(index)
    for item in range(4):
        _ = episodes[item]
        states.append(str(generator(6, "train", item).bit_generator.state))
    assert len(set(states)) == len(states) == 4 * (9 + 1)


def test_training_clips_of_one_video_differ_between_episodes(index: SplitIndex) -> None:
    episodes = episodes_of(index, last=20)
    clips_of_video: dict[int, list[Tensor]] = {}
    for item in episodes:
        spec = episodes.sampler.episode(item.index)
        for video, clip in zip([*spec.support.ravel(), *spec.query], item.on(CPU), strict=True):
            clips_of_video.setdefault(int(video), []).append(clip)
    several = [clips for clips in clips_of_video.values() if len(clips) > 2]
    assert len(several) > 10
    assert all(count_distinct(clips) > 1 for clips in several)


def test_resuming_at_an_episode_gives_the_same_episodes(index: SplitIndex) -> None:
    whole, rest = episodes_of(index, 0, 5), episodes_of(index, 3, 5)
    assert len(whole) == 5
    assert len(rest) == 2
    for one, other in zip(list(episode_loader(whole, 0, CPU))[3:], episode_loader(rest, 2, CPU), strict=True):
        assert_same_episode(one, other)


def test_iteration_ends_and_out_of_range_items_are_refused(index: SplitIndex) -> None:
    episodes = episodes_of(index, 3, 5)
    assert [item.index for item in episodes] == [3, 4]
    with pytest.raises(IndexError):
        _ = episodes[2]
    assert list(episode_loader(episodes_of(index, 5, 5), 0, CPU)) == []


# --- test clips -------------------------------------------------------------------------------------------


def test_test_clips_do_not_depend_on_batches_workers_or_order(index: SplitIndex) -> None:
    numbers = [7, 0, 3, 35, 12]
    expected = torch.stack([VideoDataset(index, OPTIONS, [number])[0] for number in numbers])
    assert expected.dtype == torch.uint8
    assert expected.shape == (5, 4, 3, 24, 24)
    assert count_distinct(list(expected)) == 5
    for sampling, flip, batch_size, workers in [("linspace", True, 2, 0), ("segments", False, 5, 2)]:
        options = replace(OPTIONS, sampling=sampling, flip=flip)
        batches = list(ClipReader(options, workers).loader(index, numbers, batch_size, CPU))
        assert [len(batch) for batch in batches] == ([2, 2, 1] if batch_size == 2 else [5])
        assert torch.equal(torch.cat(batches), expected)


def test_persistent_workers_reread_videos_and_end_on_request(index: SplitIndex) -> None:
    before, reader = set(active_children()), ClipReader(OPTIONS, 2, keep_workers=True)
    first = torch.cat(list(reader.loader(index, [7, 0, 3], 2, CPU)))
    processes = set(active_children()) - before
    assert len(processes) == 2
    next(iter(reader.loader(index, [7, 0, 3], 2, CPU)))  # and no more of them, as where a signal stops a validation
    again = torch.cat(list(reader.loader(index, [7, 0, 3], 2, CPU)))
    assert torch.equal(again, first)
    assert set(active_children()) - before == processes

    others = list(reader.loader(index, [35, 12], 2, CPU))
    assert torch.equal(torch.cat(others), torch.cat(list(ClipReader(OPTIONS, 0).loader(index, [35, 12], 2, CPU))))
    assert not set(active_children()) & processes
    next(iter(reader.loader(index, [35, 12], 1, CPU)))
    reader.close()
    assert set(active_children()) == before


def test_a_short_video_repeats_its_last_frame(index: SplitIndex) -> None:
    options = replace(OPTIONS, length=TINY_FRAMES + 4)
    clip = VideoDataset(index, options, [0])[0]
    assert len(clip) == TINY_FRAMES + 4
    assert count_distinct(list(clip)) == TINY_FRAMES
    assert all(torch.equal(frame, clip[TINY_FRAMES - 1]) for frame in clip[TINY_FRAMES:])
    training_clip = episodes_of(index, options=options)[0].clips[0]
    assert all(torch.equal(frame, training_clip[TINY_FRAMES - 1]) for frame in training_clip[TINY_FRAMES:])


# --- unreadable videos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["garbage", "missing"])
@pytest.mark.parametrize("training", [True, False])
def test_an_unreadable_video_is_reported_in_one_sentence_by_workers(
    tiny_dataset: TinyDataset, own_root: Path, kind: str, training: bool
) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    for path in own_root.glob("train_*/*.mp4"):
        path.write_bytes(b"not a video" * 50) if kind == "garbage" else path.unlink()

    def loader(workers: int) -> DataLoader:
        if training:
            return episode_loader(episodes_of(index), workers, CPU)
        return ClipReader(OPTIONS, workers).loader(index, [4, 5], 2, CPU)

    messages = []
    for workers in (0, 2):
        batches = iter(loader(workers))
        with pytest.raises(UserError) as caught:
            next(batches)
        messages.append(plain_message(caught.value))
        if workers:
            # The error keeps the iterator in a reference cycle, and the garbage collector, unlike the end of a command,
            # would wait five seconds for each worker.
            batches._shutdown_workers()
    assert messages[0] == messages[1]
    assert str(own_root) in messages[0]
    assert "\n" not in messages[0]
    assert "Traceback" not in messages[0]


def test_the_check_reports_every_unreadable_video(tiny_dataset: TinyDataset, own_root: Path) -> None:
    indexes = load_splits(tiny_dataset.splits, own_root, ["train", "test"])
    garbage, cut, missing, empty = (
        own_root / name / f"{name}_00.mp4"
        for name in ("train_action_0", "train_action_1", "train_action_2", "test_action_0")
    )
    garbage.write_bytes(b"not a video" * 50)
    cut.write_bytes(cut.read_bytes()[:100])
    missing.unlink()
    empty.write_bytes(b"")
    problems = unreadable_videos(list(indexes.values()), 4, 2)
    assert len(problems) == 4
    for path, problem in zip((garbage, cut, missing, empty), problems, strict=True):
        assert str(path) in problem


def test_a_folder_without_frames_is_reported_and_not_a_video(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset.frames / "test_action_0", tmp_path / "frames" / "test_action_0")
    for number in range(1, 5):
        shutil.copytree(tiny_dataset.frames / f"test_action_{number}", tmp_path / "frames" / f"test_action_{number}")
    folder = tmp_path / "frames" / "test_action_0" / "test_action_0_00"
    for image in folder.iterdir():
        image.unlink()
    index = load_splits(tiny_dataset.splits, tmp_path / "frames", ["test"])["test"]
    assert "test_action_0/test_action_0_00" not in index.video_names
    assert any(str(folder) in note and "no supported image" in note for note in index.notes)


def test_the_check_limits_the_number_of_reported_problems(tiny_dataset: TinyDataset, own_root: Path) -> None:
    indexes = load_splits(tiny_dataset.splits, own_root, ["train", "test"])
    for path in own_root.glob("*/*.mp4"):
        path.write_bytes(b"not a video" * 50)
    problems = unreadable_videos(list(indexes.values()), 4, 2)
    assert len(problems) == MAX_PROBLEMS_SHOWN + 1
    assert problems[-1] == f"... and {66 - MAX_PROBLEMS_SHOWN} more unreadable videos"


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_the_check_reports_short_videos_once(index: SplitIndex, caplog: pytest.LogCaptureFixture, threads: int) -> None:
    with caplog.at_level(logging.INFO, logger="episodes.checks"):
        unreadable_videos([index], TINY_FRAMES, threads)
        assert caplog.messages == []
        unreadable_videos([index], TINY_FRAMES + 1, threads)
    (message,) = caplog.messages
    assert message.startswith("36 of 36 videos have fewer than 13 frames; their last frame is repeated")
    assert str(index.path(0)) in message
