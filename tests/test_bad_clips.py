"""Videos that break during a run: replaced in training, counted and reported; an error everywhere else."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from episodes.dataset import BadClips, EpisodeClips, EpisodeDataset, VideoDataset, episode_loader
from episodes.sampler import EpisodeSampler, generator
from episodes.splits import SplitIndex, load_splits
from run.main_run import Learner
from tests.helpers.episodes import CPU, OPTIONS, assert_same_episode
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import lines_of, tiny_config
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

UNCHECKED = "DATA.CHECK_VIDEOS=false"


@pytest.fixture
def own_root(tiny_dataset: TinyDataset, tmp_path: Path) -> Iterator[Path]:
    """Returns a copy of the video files, for tests that break some."""
    shutil.copytree(tiny_dataset.videos, tmp_path / "videos")
    yield tmp_path / "videos"
    shutil.rmtree(tmp_path)


def break_videos(root: Path, *names: str) -> None:
    for name in names:
        (root / f"{name}.mp4").write_bytes(b"not a video")


def episodes_of(index: SplitIndex, most: int, count: int = 6, shot: int = 2) -> EpisodeDataset:
    return EpisodeDataset(EpisodeSampler(index, 3, shot, 1, 6), OPTIONS, range(count), most)


def read_with_bad(root: Path, tiny_dataset: TinyDataset, names: list[str], workers: int = 0) -> list[EpisodeClips]:
    break_videos(root, *names)
    index = load_splits(tiny_dataset.splits, root, ["train"])["train"]
    return list(episode_loader(episodes_of(index, len(names)), workers, CPU))


def videos_of(index: SplitIndex, episode: int, shot: int = 2) -> list[int]:
    spec = EpisodeSampler(index, 3, shot, 1, 6).episode(episode)
    return [*spec.support.ravel().tolist(), *spec.query.tolist()]


# --- one episode ------------------------------------------------------------------------------------------


def test_only_the_clip_of_the_broken_video_is_replaced(tiny_dataset: TinyDataset, own_root: Path) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    before = episodes_of(index, 0)[0]
    position = 4
    name = index.video_names[videos_of(index, 0)[position]]
    break_videos(own_root, name)
    after = episodes_of(index, 1)[0]
    assert list(after.bad_clips) == [name]
    assert f"{name}.mp4" in after.bad_clips[name]
    same = [torch.equal(one, other) for one, other in zip(before.on(CPU), after.on(CPU), strict=True)]
    assert same == [number != position for number in range(len(same))]
    assert torch.equal(before.class_ids, after.class_ids)
    assert torch.equal(before.query_labels, after.query_labels)
    assert before.bad_clips == {}


def test_the_replacement_has_the_same_class_and_is_new_to_the_episode(
    tiny_dataset: TinyDataset, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    # Two of each class's six videos are broken, so that some others are broken too.
    break_videos(own_root, *(f"{entry.folder}/{entry.folder}_{n:02d}" for entry in index.classes for n in (1, 4)))
    read: dict[int, int] = {}
    draw_clip = EpisodeDataset._draw_clip

    def draw_and_record(self: EpisodeDataset, video: int, episode: int, position: int, clip: torch.Tensor) -> None:
        draw_clip(self, video, episode, position, clip)
        read[position] = video

    monkeypatch.setattr(EpisodeDataset, "_draw_clip", draw_and_record)
    for episode in range(6):
        item = episodes_of(index, 12, shot=3)[episode]
        planned, videos = videos_of(index, episode, shot=3), [read[position] for position in range(12)]
        assert len(set(videos)) == 12
        assert index.class_of_video[videos].tolist() == index.class_of_video[planned].tolist()
        assert not {index.video_names[video] for video in videos} & set(item.bad_clips)
        kept = [video for video in planned if index.video_names[video] not in item.bad_clips]
        assert set(kept) <= set(videos)


def test_the_replacement_depends_on_episode_position_and_attempt(tiny_dataset: TinyDataset, own_root: Path) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    videos, broken = videos_of(index, 0), {"a": "", "b": ""}
    for count in (1, 2):
        bad_clips = dict(list(broken.items())[:count])
        for position in range(9):
            others = np.setdiff1d(index.videos_of_class[index.class_of_video[videos[position]]], videos)
            expected = generator(6, "train", 0, position + 1, count).choice(others)
            assert episodes_of(index, 2)._other_video(videos, 0, position, bad_clips) == expected


def test_an_episode_with_too_many_broken_videos_stops(
    tiny_dataset: TinyDataset, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    break_videos(own_root, *(index.video_names[video] for video in videos_of(index, 0)[2:]))
    tried: list[int] = []
    draw_clip = EpisodeDataset._draw_clip

    def draw_and_record(self: EpisodeDataset, video: int, *arguments: Any) -> bool:
        tried.append(video)
        return draw_clip(self, video, *arguments)

    monkeypatch.setattr(EpisodeDataset, "_draw_clip", draw_and_record)
    with pytest.raises(UserError, match=r"2 training videos .* DATA\.MAX_BAD_CLIPS allows 1"):
        _ = episodes_of(index, 1)[0]
    broken = [video for video in tried if (own_root / f"{index.video_names[video]}.mp4").stat().st_size < 100]
    assert len(broken) == 2  # and no other one was opened


def test_replacements_do_not_depend_on_the_number_of_workers(tiny_dataset: TinyDataset, own_root: Path) -> None:
    names = ["train_action_0/train_action_0_03", "train_action_2/train_action_2_00", "train_action_4/train_action_4_05"]
    alone = read_with_bad(own_root, tiny_dataset, names)
    with_workers = read_with_bad(own_root, tiny_dataset, names, workers=2)
    assert len({name for item in alone for name in item.bad_clips}) >= 2
    for one, other in zip(alone, with_workers, strict=True):
        assert_same_episode(one, other)
        assert one.bad_clips == other.bad_clips


def test_a_class_with_too_few_readable_videos_is_reported(tiny_dataset: TinyDataset, own_root: Path) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["train"])["train"]
    names = [f"train_action_1/train_action_1_{number:02d}" for number in range(4)]
    break_videos(own_root, *names)
    episode = next(i for i in range(20) if 1 in EpisodeSampler(index, 3, 2, 1, 6).episode(i).class_ids)
    with pytest.raises(UserError, match="class 'train_action_1' of train has too few readable videos") as caught:
        _ = episodes_of(index, 10, count=20)[episode]
    assert all(name in str(caught.value) for name in names)


def test_a_broken_test_clip_is_an_error(tiny_dataset: TinyDataset, own_root: Path) -> None:
    index = load_splits(tiny_dataset.splits, own_root, ["test"])["test"]
    break_videos(own_root, index.video_names[3])
    with pytest.raises(UserError, match=index.video_names[3]):
        _ = VideoDataset(index, OPTIONS, [3])[0]


# --- a whole run ------------------------------------------------------------------------------------------


def episode_with(bad_clips: dict[str, str]) -> EpisodeClips:
    nothing = torch.zeros(0)
    return EpisodeClips(0, nothing, [], nothing, nothing, bad_clips)


def test_each_video_counts_once_and_one_too_many_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    bad_clips = BadClips(2)
    with caplog.at_level(logging.WARNING, logger="episodes.dataset"):
        found = ({"a/1": "broken"}, {"a/1": "broken", "b/2": "empty"}, {}, {"b/2": "empty"})
        assert len(list(bad_clips.watch(map(episode_with, found)))) == 4
        bad_clips.share()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "replaced unreadable video a/1 by another one of its class",
        "replaced unreadable video b/2 by another one of its class",
    ]
    with pytest.raises(
        UserError, match=r"3 training videos .* DATA\.MAX_BAD_CLIPS allows 2: a/1, b/2.*most recent: gone"
    ):
        list(bad_clips.watch([episode_with({"c/3": "gone"})]))


def test_bad_clips_are_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    bad_clips = BadClips(2)
    bad_clips.reasons = {"a/1": "broken"}
    monkeypatch.setattr(distributed, "gather", lambda own: [own, {"b/2": "empty"}])
    bad_clips.share()
    assert bad_clips.reasons == {"a/1": "broken", "b/2": "empty"}
    monkeypatch.setattr(distributed, "gather", lambda own: [{"c/3": "gone"}, own])
    with pytest.raises(UserError, match="c/3"):
        bad_clips.share()


def bad_clips_of(directory: Path) -> list[str]:
    return list(load_checkpoint(directory / "checkpoint_last.pt")["bad_clips"])


def broken_run(data: TinyDataset, root: Path, directory: Path, *overrides: str) -> Learner:
    return Learner(tiny_config(data, directory, f"DATA.DATA_DIR={root}", UNCHECKED, "TRAIN.VAL_FREQ=0", *overrides))


def test_a_run_counts_bad_clips_in_metrics_checkpoint_and_results(
    tiny_dataset: TinyDataset, own_root: Path, tmp_path: Path
) -> None:
    learner = broken_run(tiny_dataset, own_root, tmp_path / "run", "TEST.TEST_EPISODES=2")
    index = learner.data.splits["train"]
    spec = learner.data.samplers["train"].episode(3)
    name = index.video_names[int(spec.query[0])]
    break_videos(own_root, name)
    learner.train()
    counts = [line["train/bad_clips"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert counts[1:] == [1, 1]  # after 4 and 6 episodes
    assert bad_clips_of(tmp_path / "run") == [name]
    assert learner.test()["bad_clips"] == [name]


def test_a_resumed_run_remembers_earlier_bad_clips(tiny_dataset: TinyDataset, own_root: Path, tmp_path: Path) -> None:
    directory, steady = tmp_path / "run", "SOLVER.LR_SCH=none"
    learner = broken_run(tiny_dataset, own_root, directory, steady, "TRAIN.TRAIN_EPISODES=4")
    name = learner.data.splits["train"].video_names[int(learner.data.samplers["train"].episode(3).query[0])]
    break_videos(own_root, name)
    learner.train()
    shutil.copy(tiny_dataset.videos / f"{name}.mp4", own_root / f"{name}.mp4")  # so that the second part finds none
    broken_run(tiny_dataset, own_root, directory, steady, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true").train()
    content = load_checkpoint(directory / "checkpoint_last.pt")
    assert (content["episode"], list(content["bad_clips"])) == (6, [name])


def test_a_run_stops_above_max_bad_clips_and_resumes_with_a_higher_limit(
    tiny_dataset: TinyDataset, own_root: Path, tmp_path: Path
) -> None:
    whole = broken_run(tiny_dataset, own_root, tmp_path / "whole")
    index = whole.data.splits["train"]
    break_videos(own_root, *(index.video_names[int(whole.data.samplers["train"].episode(i).query[0])] for i in (0, 5)))
    whole.train()
    with pytest.raises(UserError, match=r"DATA\.MAX_BAD_CLIPS allows 1"):
        broken_run(tiny_dataset, own_root, tmp_path / "cut", "DATA.MAX_BAD_CLIPS=1").train()
    resumed = broken_run(tiny_dataset, own_root, tmp_path / "cut", "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    resumed.train()
    assert bad_clips_of(tmp_path / "cut") == bad_clips_of(tmp_path / "whole")
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_validation_and_test_stop_at_a_broken_clip(tiny_dataset: TinyDataset, own_root: Path, tmp_path: Path) -> None:
    learner = broken_run(tiny_dataset, own_root, tmp_path / "run")
    learner.train()
    spec = learner.data.samplers["test"].episode(0)
    name = learner.data.splits["test"].video_names[int(spec.query[0])]
    break_videos(own_root, name)
    with pytest.raises(UserError, match=name):
        learner.test()
