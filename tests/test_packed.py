"""The packed store: the pixels of its JPEG files for any reader, and no incomplete stores."""

import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from episodes import packed
from episodes.dataset import ClipOptions, EpisodeDataset, VideoDataset
from episodes.packed import in_packed, packed_videos, read_packed, write_packed
from episodes.sampler import EpisodeSampler
from episodes.splits import SplitIndex, load_splits
from episodes.video import probe, read_frames
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TINY_FRAMES, TinyDataset, tiny_class_names, tiny_frame_files, tiny_video_names
from utils.errors import UserError
from videotransforms.volume_transforms import spread_indices

OPTIONS = ClipOptions(length=4, sampling="linspace", size=24, short_side=28, flip=True)
VIDEO = "train_action_0/train_action_0_00"


@pytest.fixture
def frames(tiny_dataset: TinyDataset) -> list[tuple[str, list[Path]]]:
    return tiny_frame_files(tiny_dataset.frames, "train")


@pytest.fixture
def store(frames: list[tuple[str, list[Path]]], tmp_path: Path) -> Path:
    """Returns a store that a test may change."""
    write_packed(tmp_path / "train.sqlite", frames)
    return tmp_path / "train.sqlite"


def index_of(tiny_dataset: TinyDataset, root: Path, split: str = "train") -> SplitIndex:
    return load_splits(tiny_dataset.splits, root, [split])[split]


def choose_spread(num_frames: int) -> np.ndarray:
    return spread_indices(num_frames, 5)


def choose_mixed(num_frames: int) -> np.ndarray:
    return np.array([7, 0, 7, num_frames - 1])


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", [np.arange, choose_spread, choose_mixed])
def test_a_store_and_a_folder_give_the_same_pixels(
    tiny_dataset: TinyDataset, tiny_packed: Path, choose: Callable[[int], np.ndarray]
) -> None:
    for name in tiny_class_names("train"):
        for video in tiny_video_names(name):
            packed = read_packed(tiny_packed / "train.sqlite", f"{name}/{video}", choose)
            np.testing.assert_array_equal(packed, read_frames(tiny_dataset.frames / name / video, choose))
            np.testing.assert_array_equal(packed, read_frames(tiny_packed / "train.sqlite" / name / video, choose))
            assert packed.flags.writeable
            assert packed.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}])
def test_every_kind_of_jpeg_is_read_as_from_a_folder(tmp_path: Path, mode: str, options: dict) -> None:
    folder = tmp_path / "frames" / "class" / "video"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(folder / "1.jpg", **options)
    write_packed(tmp_path / "test.sqlite", [("class/video", [folder / "1.jpg"])])
    packed = read_packed(tmp_path / "test.sqlite", "class/video", np.arange)
    assert packed.shape == (1, 33, 47, 3)
    np.testing.assert_array_equal(packed, read_frames(folder, np.arange))


def test_names_and_frame_counts_keep_the_order_of_writing(frames: list[tuple[str, list[Path]]], tmp_path: Path) -> None:
    videos = [(name, files[: 1 + number % 3]) for number, (name, files) in enumerate(reversed(frames))]
    write_packed(tmp_path / "train.sqlite", videos)
    assert list(packed_videos(tmp_path / "train.sqlite").items()) == [(name, len(files)) for name, files in videos]


def test_only_the_chosen_frames_are_decoded(frames: list[tuple[str, list[Path]]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(frames[0][1][0].read_bytes()[:200])
    write_packed(tmp_path / "train.sqlite", [("class/video", [frames[0][1][0], broken])])
    assert len(read_packed(tmp_path / "train.sqlite", "class/video", lambda num_frames: np.zeros(3, int))) == 3
    with pytest.raises(UserError, match=r"frame 1 of class/video in .*train\.sqlite"):
        read_packed(tmp_path / "train.sqlite", "class/video", np.arange)


@pytest.mark.parametrize("folder", ["a b", "per%cent", "a?mode=rwc", "hash#", "ümläut", "quote'\""])
def test_a_store_can_be_read_from_any_folder(store: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    moved = shutil.move(store, tmp_path / folder / "train.sqlite")
    assert probe(Path(moved) / VIDEO) == TINY_FRAMES
    assert os.listdir(tmp_path / folder) == ["train.sqlite"]


def test_a_read_only_store_is_read(store: Path) -> None:
    store.chmod(0o444)
    store.parent.chmod(0o555)
    try:
        assert probe(store / VIDEO) == TINY_FRAMES
        assert os.listdir(store.parent) == ["train.sqlite"]
    finally:
        store.parent.chmod(0o755)


def test_choosing_a_missing_frame_is_refused(store: Path) -> None:
    with pytest.raises(IndexError, match="which has 12"):
        read_packed(store, VIDEO, lambda num_frames: np.array([num_frames]))


def test_a_replaced_store_is_reread(store: Path, frames: list[tuple[str, list[Path]]]) -> None:
    assert len(packed_videos(store)) == len(frames)
    write_packed(store, frames[:1])
    assert list(packed_videos(store)) == [VIDEO]


def test_a_store_overwritten_at_equal_size_is_reread(frames: list[tuple[str, list[Path]]], tmp_path: Path) -> None:
    store, other = tmp_path / "test.sqlite", tmp_path / "other.sqlite"
    for path, name, (_, files) in ((store, "a/first", frames[0]), (other, "a/other", frames[0])):
        write_packed(path, [(name, files)])
    assert list(packed_videos(store)) == ["a/first"]
    assert store.stat().st_size == other.stat().st_size
    store.write_bytes(other.read_bytes())  # the same file on disk with new content
    os.utime(store, ns=(1, 1))
    assert list(packed_videos(store)) == ["a/other"]


def test_a_folder_named_like_a_store_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data.sqlite" / "class").mkdir(parents=True)
    assert in_packed(tmp_path / "data.sqlite" / "class" / "video") is None


# --- many readers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_and_the_main_process_read_equal_frames(
    tiny_dataset: TinyDataset, tiny_packed: Path, method: str, workers: int
) -> None:
    dataset = VideoDataset(index_of(tiny_dataset, tiny_packed), OPTIONS, range(36))
    expected = torch.stack([dataset[item] for item in range(36)])  # opens the store before the fork
    loader = DataLoader(dataset, batch_size=6, num_workers=workers, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(dataset[0], expected[0])


def connection_number(store: Path) -> int:
    """Identifies the connection of this process; a fork keeps its parent's under the old number."""
    return id(packed._connection(store))


def test_a_fork_does_not_use_the_connection_of_its_parent(store: Path) -> None:
    expected = read_packed(store, VIDEO, np.arange)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.apply(connection_number, (store,)) != connection_number(store)
        results = [pool.apply_async(read_packed, (store, VIDEO, np.arange)) for _ in range(12)]
        assert all(np.array_equal(result.get(60), expected) for result in results)
    np.testing.assert_array_equal(read_packed(store, VIDEO, np.arange), expected)


def test_threads_can_read_concurrently(store: Path, frames: list[tuple[str, list[Path]]]) -> None:
    names = [name for name, _ in frames] * 3
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: read_packed(store, name, choose_spread), names))
    for name, result in zip(names, results, strict=True):
        np.testing.assert_array_equal(result, read_packed(store, name, choose_spread))


def test_a_used_data_set_can_be_pickled(tiny_dataset: TinyDataset, tiny_packed: Path) -> None:
    sampler = EpisodeSampler(index_of(tiny_dataset, tiny_packed), 3, 1, 1, 6)
    dataset = EpisodeDataset(sampler, OPTIONS, range(2))
    assert torch.equal(dataset[1].clips, pickle.loads(pickle.dumps(dataset))[1].clips)


# --- writing ----------------------------------------------------------------------------------------------

WRITE = """
import sys
from pathlib import Path
from episodes.packed import write_packed
store, folder, slow = Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
def videos():
    for video in sorted(folder.glob("train*/*")):
        yield f"{video.parent.name}/{video.name}", sorted(video.iterdir())
        if slow:
            print("one", flush=True)
            sys.stdin.readline()
write_packed(store, videos())
"""


def test_the_same_frames_give_the_same_bytes_in_any_process(
    store: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    for number in range(2):
        other = tmp_path / f"other{number}.sqlite"
        subprocess.run([sys.executable, "-c", WRITE, other, tiny_dataset.frames], cwd=ROOT, check=True)
        assert other.read_bytes() == store.read_bytes()


def test_a_store_contains_no_uninitialised_memory(
    frames: list[tuple[str, list[Path]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite zeroes unused bytes only with secure_delete; otherwise it writes previous contents of memory."""
    settings = []

    class Noted(sqlite3.Connection):
        def close(self) -> None:
            settings.append(self.execute("PRAGMA secure_delete").fetchone())
            super().close()

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, factory=Noted, **options))
    write_packed(tmp_path / "new.sqlite", frames[:1])
    assert settings == [(1,)]


def test_a_killed_write_leaves_no_new_store_and_the_old_one_unchanged(
    store: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    before = store.read_bytes()
    for path in (store, tmp_path / "new.sqlite"):
        command = [sys.executable, "-c", WRITE, path, tiny_dataset.frames, "slow"]
        writing = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        writing.stdout.readline()
        writing.send_signal(signal.SIGKILL)
        writing.communicate()
    assert store.read_bytes() == before
    assert list(tmp_path.glob("*.sqlite")) == [store]
    with pytest.raises(UserError, match="is not a complete packed store"):
        packed_videos(tmp_path / "new.sqlite.part")
    write_packed(tmp_path / "new.sqlite", tiny_frame_files(tiny_dataset.frames, "train"))
    assert (tmp_path / "new.sqlite").read_bytes() == before
    assert not (tmp_path / "new.sqlite.part").exists()


def test_a_full_disk_is_reported_and_leaves_nothing(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    store = tmp_path / "train.sqlite"
    command = [sys.executable, "-c", WRITE, store, tiny_dataset.frames]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert f"UserError: Cannot write the packed store {store}" in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_interrupt_while_writing_leaves_nothing(
    frames: list[tuple[str, list[Path]]], tmp_path: Path
) -> None:
    def interrupted():
        yield frames[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "train.sqlite", interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("videos", "reason"),
    [
        ([("class/video", ["missing.jpg"])], "Cannot read the frame .*missing.jpg"),
        ([("class/video", ["empty.jpg"])], "empty.jpg is not a JPEG file"),
        ([("class/video", ["image.png"])], "image.png is not a JPEG file"),
        ([("class/video", [])], "'class/video' has no frame"),
        ([("class/video", ["1.jpg"]), ("class/video", ["1.jpg"])], "'class/video' occurs twice"),
        ([("class/\udcff", ["1.jpg"])], "is not UTF-8"),
    ],
)
def test_unstorable_frames_are_reported_and_leave_nothing(
    tmp_path: Path, videos: list[tuple[str, list[str]]], reason: str
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "empty.jpg").touch()
    for name in ("1.jpg", "image.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    with pytest.raises(UserError, match=reason):
        write_packed(tmp_path / "train.sqlite", [(name, [folder / file for file in files]) for name, files in videos])
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write the packed store .*nowhere"):
        write_packed(tmp_path / "nowhere" / "train.sqlite", [])


# --- damage -----------------------------------------------------------------------------------------------


def foreign(kind: str, store: Path) -> Path:
    """Replaces a store by something else."""
    content = store.read_bytes()
    store.unlink()
    if kind == "empty":
        store.touch()
    elif kind == "text":
        store.write_text("This is not a database.\n" * 500)
    elif kind == "cut":
        store.write_bytes(content[: len(content) // 2])
    elif kind == "zeros":
        store.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif kind == "other":
        with sqlite3.connect(store) as connection:
            connection.execute("CREATE TABLE videos (name TEXT, frames INTEGER)")
        connection.close()
    elif kind == "folder":
        store.mkdir()
    return store


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "zeros", "other", "folder"])
@pytest.mark.parametrize("read", [packed_videos, lambda store: read_packed(store, VIDEO, np.arange)])
def test_an_incomplete_store_is_reported_in_one_sentence(
    store: Path, kind: str, read: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError) as caught:
        read(foreign(kind, store))
    message = str(caught.value)
    assert str(store) in message
    assert message.endswith(".")
    assert "\n" not in message


ENDLESS = """
DROP TABLE videos;
CREATE VIEW videos AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n)
SELECT id, 'a/' || id AS name, id AS first, 1 AS frames FROM n;
"""


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE videos SET first = first + 1 WHERE id = 2", "UPDATE videos SET frames = frames - 1 WHERE id = 2",
        "UPDATE videos SET frames = 0", "UPDATE videos SET frames = 0 WHERE id = (SELECT max(id) FROM videos)",
        "UPDATE videos SET frames = 'x'", "UPDATE videos SET frames = 12.5",
        f"UPDATE videos SET frames = {2**63 - 1}", "UPDATE videos SET name = x'ff' WHERE id = 3",
        "UPDATE frames SET jpeg = 5", "UPDATE frames SET jpeg = 'text'", ENDLESS,
    ],
)  # fmt: skip
def test_damaged_entries_are_refused_and_never_give_other_frames(store: Path, statement: str) -> None:
    connection = sqlite3.connect(store)
    connection.executescript(statement)
    connection.close()
    with pytest.raises(UserError, match=r"^[^\n]*train\.sqlite is damaged[^\n]*$"):
        read_packed(store, VIDEO, np.arange)


def test_a_store_of_a_newer_version_is_refused(store: Path) -> None:
    with sqlite3.connect(store) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(UserError, match="version 2, expected version 1"):
        packed_videos(store)


def test_a_video_missing_from_the_store_is_reported(store: Path) -> None:
    for read in (probe, lambda path: read_frames(path, np.arange)):
        with pytest.raises(UserError, match=r"no video 'train_action_0/other' in the packed store .*train\.sqlite"):
            read(store / "train_action_0" / "other")


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for width in (40, 50):
        Image.new("RGB", (width, 30)).save(tmp_path / f"{width}.jpg")
    write_packed(tmp_path / "train.sqlite", [("class/video", [tmp_path / "40.jpg", tmp_path / "50.jpg"])])
    with pytest.raises(UserError, match=r"differ in size \(40 x 30 and 50 x 30 pixels\)"):
        read_packed(tmp_path / "train.sqlite", "class/video", np.arange)
