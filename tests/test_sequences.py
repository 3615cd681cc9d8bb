"""Data sets whose folders hold several sequences of images, read directly and prepared: one is used and reported."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from episodes import checks
from episodes.checks import report_sequences, unreadable_videos
from episodes.images import find_frames, note_summary
from episodes.preparation.raw_layouts import LeftOut, raw_videos
from episodes.search import SPLITS
from episodes.splits import SplitIndex, load_splits
from episodes.video import read_frames
from run.feature_cache import data_digest
from run.prepare import main
from tests.helpers.raw_data import render, write_class_file
from utils.errors import UserError

CLASSES = {"train": ["golf", "hug"], "val": ["kick", "run"], "test": ["sit", "wave"]}
NAMES = [name for names in CLASSES.values() for name in names]
COLOUR, OTHER = 200, 40  # grey values of colour frames and of all other images


def frames(folder: Path, pattern: str, value: int, number: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for position in range(1, number + 1):
        Image.new("RGB", (40, 40), (value, value, value)).save(folder / pattern.format(position))


def in_one_folder(root: Path) -> Path:
    for name in NAMES:
        frames(root / name / "clip_1", "flow_x_{:05}.jpg", OTHER)
        frames(root / name / "clip_1", "flow_y_{:05}.jpg", OTHER)
        frames(root / name / "clip_1", "img_{:05}.jpg", COLOUR)
    return root


def in_folders_of_a_video(root: Path) -> Path:
    for name in NAMES:
        frames(root / name / "clip_1" / "rgb", "{:05}.jpg", COLOUR)
        frames(root / name / "clip_1" / "flow", "{:05}.jpg", OTHER)
    return root


def in_folders_above_the_classes(root: Path) -> Path:
    for name in NAMES:
        frames(root / "rgb" / name / "clip_1", "{:05}.jpg", COLOUR)
        frames(root / "flow" / name / "clip_1", "flow_x_{:05}.jpg", OTHER)
    (root / "annotations").mkdir()
    (root / "annotations" / "trainlist.txt").write_text("golf/clip_1\n")
    return root


def in_folders_above_the_classes_of_a_split(root: Path) -> Path:
    for split, names in CLASSES.items():
        for name in names:
            frames(root / split / "rgb" / name / "clip_1", "{:05}.jpg", COLOUR)
            frames(root / split / "flow" / name / "clip_1", "flow_x_{:05}.jpg", OTHER)
    return root


def in_folders_below_the_classes(root: Path) -> Path:
    for name in NAMES:
        for clip in ("clip_1", "clip_2"):
            frames(root / name / "depth" / clip, "{:05}.png", OTHER)
            frames(root / name / "images" / clip, "{:05}.jpg", COLOUR)
    return root


def in_a_folder_below_the_frames(root: Path) -> Path:
    for name in NAMES:
        frames(root / name / "clip_1", "{:05}.jpg", COLOUR)
        frames(root / name / "clip_1" / "flow", "{:05}.jpg", OTHER)
    return root


LAYOUTS = {
    layout.__name__: (layout, note)
    for layout, note in [
        (in_one_folder, "img_*.jpg, not flow_x_*.jpg, flow_y_*.jpg"),
        (in_folders_of_a_video, "rgb/*.jpg, not flow/"),
        (in_folders_above_the_classes, "rgb/ is used, not flow/"),
        (in_folders_above_the_classes_of_a_split, "rgb/ is used, not flow/"),
        (in_folders_below_the_classes, "images/ is used, not depth/"),
        (in_a_folder_below_the_frames, "*.jpg, not flow/"),
    ]
}


def indexes_of(root: Path, tmp_path: Path) -> dict[str, SplitIndex]:
    split_dir = write_class_file(tmp_path / "split", "tiny", CLASSES, 1, listed=False)
    return load_splits(split_dir, root, SPLITS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_colour_frames_are_read_directly_and_reported(tmp_path: Path, caplog, layout: str) -> None:
    build, note = LAYOUTS[layout]
    indexes = indexes_of(build(tmp_path / "raw"), tmp_path)
    for index in indexes.values():
        assert [name.split("/")[1] for name in index.video_names][:1] == ["clip_1"]
        for video in range(len(index)):
            pixels = read_frames(index.path(video), np.arange)
            assert len(pixels) == 4
            assert abs(pixels.mean() - COLOUR) < 3
    with caplog.at_level(logging.INFO):
        unreadable_videos(list(indexes.values()), clip_length=4, threads=1)
    assert note in caplog.text + "\n".join(line for index in indexes.values() for line in index.notes)


def test_the_most_common_kinds_of_folders_are_listed_first() -> None:
    numbers = {f"kind {number}": number for number in range(1, 14)} | {"": 99}  # most folders have one sequence
    *listed, more = note_summary(numbers)
    assert [line.split()[0] for line in listed] == [str(number) for number in range(13, 3, -1)]
    assert "3 more" in more


def test_the_folders_compared_without_opening_videos_are_spread_over_all(tmp_path: Path, caplog, monkeypatch) -> None:
    paths = [tmp_path / str(number) for number in range(9)]
    for path in paths:
        path.mkdir()
    index = MagicMock(path=paths.__getitem__, __len__=lambda self: len(paths))
    compared: list[str] = []
    monkeypatch.setattr(checks, "MAX_LISTED", 3)
    monkeypatch.setattr(checks, "sequence_note", lambda path: compared.append(path.name) or "several")
    with caplog.at_level(logging.INFO):
        report_sequences([index])
    assert compared == ["0", "4", "8"]
    assert "3 of 9 folders" in caplog.text


def test_colour_frames_are_reported_without_opening_videos(tmp_path: Path, caplog) -> None:
    index = indexes_of(in_one_folder(tmp_path / "raw"), tmp_path)["train"]
    for image in index.path(0).iterdir():
        image.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        report_sequences([index])
    assert "2 folders with several sequences: frames are img_*.jpg, not flow_x_*.jpg, flow_y_*.jpg" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_colour_frames_are_prepared_and_reported(tmp_path: Path, capsys, layout: str) -> None:
    build, note = LAYOUTS[layout]
    raw, out = build(tmp_path / "raw"), tmp_path / "out"
    assert main(["custom", "--videos", str(raw), "--out", str(out), "--size", "32", "--workers", "1"]) == 0
    assert note in capsys.readouterr().out
    assert note in (out / "report.json").read_text()
    stored = sorted((out / "frames").glob("*/*"))
    assert {folder.parent.name for folder in stored} == set(NAMES)
    assert {folder.name for folder in stored} <= {"clip_1", "clip_2"}
    for folder in stored:
        pixels = read_frames(folder, np.arange)
        assert len(pixels) == 4
        assert abs(pixels.mean() - COLOUR) < 3


def videos_and_frames(root: Path) -> Path:
    for name in NAMES:
        render(root / "videos" / name / f"{name}_1.avi", frames=5)
        frames(root / "rawframes" / name / f"{name}_1", "img_{:05}.jpg", OTHER, number=7)
    return root


def test_videos_are_preferred_to_raw_frames(tmp_path: Path, capsys) -> None:
    raw = videos_and_frames(tmp_path / "raw")
    indexes = indexes_of(raw, tmp_path)
    paths = [path for index in indexes.values() for path in index.video_paths]
    assert len(paths) == len(NAMES)
    assert all(path.startswith("videos/") and path.endswith(".avi") for path in paths)
    assert "videos/ is used, not rawframes/" in "\n".join(indexes["train"].notes)
    assert main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--size", "32"]) == 0
    assert "videos/ is used, not rawframes/" in capsys.readouterr().out


def test_an_empty_folder_beside_raw_frames_is_ignored(tmp_path: Path) -> None:
    raw = videos_and_frames(tmp_path / "raw")
    shutil.rmtree(raw / "videos")
    (raw / "videos").mkdir()
    paths = [path for index in indexes_of(raw, tmp_path).values() for path in index.video_paths]
    assert all(path.startswith("rawframes/") for path in paths)
    assert {video.above for video in raw_videos(raw)} == {(name,) for name in NAMES}


@pytest.mark.parametrize("find", [indexes_of, lambda root, _: list(raw_videos(root))])
def test_two_folders_of_colour_frames_are_refused(tmp_path: Path, find: Callable) -> None:
    for kind in ("images", "frames", "flow"):
        for name in NAMES:
            frames(tmp_path / "raw" / kind / name / "clip_1", "{}.jpg", COLOUR)
    with pytest.raises(UserError, match="frames/ and images/"):
        find(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("form", ["thumbs", "flow_x", "rgb", "jpegs_256"])
@pytest.mark.parametrize("videos_are_files", [True, False])
def test_another_form_of_the_videos_is_skipped(tmp_path: Path, capsys, form: str, videos_are_files: bool) -> None:
    raw = tmp_path / "raw"
    for name in NAMES:
        frames(raw / name / form, "{:05}.jpg", OTHER)
        for clip in ("clip_1", "face_2"):  # a video may have such a word in its name
            if videos_are_files:
                render(raw / name / f"{clip}.avi", frames=5)
            else:
                frames(raw / name / clip, "{:05}.jpg", COLOUR)
    indexes = indexes_of(raw, tmp_path)
    assert [name for index in indexes.values() for name in index.video_names] == [
        f"{name}/{clip}" for names in CLASSES.values() for name in names for clip in ("clip_1", "face_2")
    ]
    assert f"golf/{form}" in "\n".join(indexes["train"].notes)
    assert main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--size", "32"]) == 0
    assert f"left out: golf/{form}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out" / "frames" / "golf").iterdir()) == ["clip_1", "face_2"]


@pytest.mark.parametrize("form", ["a_flow", "a_rgb_frames", "a-thumbs", "a_flow_x", "b_depth", "a_jpegs_256"])
@pytest.mark.parametrize("form_is_file", [True, False])
def test_another_form_of_one_video_is_skipped(tmp_path: Path, form: str, form_is_file: bool) -> None:
    raw = tmp_path / "raw"
    for name in NAMES:
        for clip in (
            "a.avi",
            "b_rgb.avi",
            "c_flow.avi",
            "a_run_flow.avi",
            "a_2.avi",
            *([f"{form}.avi"] * form_is_file),
        ):
            render(raw / name / clip, frames=2)
        if not form_is_file:
            frames(raw / name / form, "{:05}.jpg", OTHER)
    kept = ["a", "a_2", "a_run_flow", "b_rgb", "c_flow"]  # with such words, but not beside a video of the name without
    index = indexes_of(raw, tmp_path)["train"]
    assert [name for name in index.video_names if name.startswith("golf/")] == [f"golf/{name}" for name in kept]
    assert [note for note in index.notes if f"golf/{form}" in note]
    left_out: list[LeftOut] = []
    assert [video.name for video in raw_videos(raw, (), left_out) if video.above == ("golf",)] == kept
    (file,) = [file for file in left_out if file.above == ("golf",)]
    assert (file.path.stem, file.may_be_video) == (form, form_is_file)


def test_a_class_named_like_a_form_of_another_is_kept(tmp_path: Path) -> None:
    for name in ("wave", "wave_small", "wave_flow"):
        frames(tmp_path / "train" / name / "clip_1", "{}.jpg", COLOUR)
    assert {video.above[1] for video in raw_videos(tmp_path)} == {"wave", "wave_small", "wave_flow"}


def test_videos_in_two_sizes_are_refused(tmp_path: Path) -> None:
    for kind in ("videos", "videos_240p"):
        for name in NAMES:
            render(tmp_path / "raw" / kind / name / f"{name}_1.avi", frames=2)
    with pytest.raises(UserError, match="videos/ and videos_240p/"):
        list(raw_videos(tmp_path / "raw"))


def test_folders_of_several_cameras_are_refused_with_their_videos(tmp_path: Path) -> None:
    for name in NAMES:
        for clip in ("clip_1", "clip_2"):
            for camera in ("cam0", "cam1"):
                frames(tmp_path / "raw" / name / clip / camera, "{:05}.jpg", COLOUR)
    with pytest.raises(UserError, match=r"golf/clip_1 and .*golf/clip_2 .* cam0"):
        main(["custom", "--videos", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_classes_named_like_sequences_in_a_split_are_kept(tmp_path: Path) -> None:
    for name in ("pose", "flow", "jump"):
        frames(tmp_path / "train" / name / "clip_1", "{}.jpg", COLOUR)
    assert {video.above[1] for video in raw_videos(tmp_path)} == {"pose", "flow", "jump"}


def test_a_folder_without_readable_images_is_not_a_video(tmp_path: Path, capsys) -> None:
    raw = in_one_folder(tmp_path / "raw")
    (raw / "golf" / "empty").mkdir()
    (raw / "golf" / "phone").mkdir()
    (raw / "golf" / "phone" / "1.heic").touch()
    index = indexes_of(raw, tmp_path)["train"]
    assert index.video_names == ("golf/clip_1", "hug/clip_1")
    notes = "\n".join(index.notes)
    assert "golf/empty" in notes
    assert "golf/phone" in notes
    assert "1 .heic" in notes
    assert main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--size", "32"]) == 1
    output = capsys.readouterr().out
    assert "left out: golf/empty" in output
    assert "left out: golf/phone" in output
    assert "INCOMPLETE" in output


def test_links_out_of_the_data_root_are_reported_in_one_sentence(tmp_path: Path) -> None:
    elsewhere = in_one_folder(tmp_path / "elsewhere")
    for name in NAMES:
        (tmp_path / "raw" / name).mkdir(parents=True)
        for clip in ("clip_1", "clip_2"):
            (tmp_path / "raw" / name / clip).symlink_to(elsewhere / name / "clip_1", target_is_directory=True)
    with pytest.raises(UserError) as caught:
        indexes_of(tmp_path / "raw", tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    for part in ("12 links", str(tmp_path / "raw" / "golf" / "clip_1"), str(elsewhere), "DATA.DATA_DIR"):
        assert part in str(caught.value)


def test_videos_in_several_unknown_sequences_are_reported_as_broken(tmp_path: Path, capsys) -> None:
    raw = in_one_folder(tmp_path / "raw")
    for camera in (1, 2):
        frames(raw / "golf" / "clip_2", f"cam{camera}_{{:05}}.jpg", COLOUR)
    assert main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--size", "32"]) == 1
    output = capsys.readouterr().out
    assert "broken: golf/clip_2" in output
    assert "cam1_*.jpg" in output
    assert "cam2_*.jpg" in output
    problems = unreadable_videos(list(indexes_of(raw, tmp_path).values()), clip_length=4, threads=1)
    assert problems
    assert all(re.search(r"cam1_.*cam2_", problem) for problem in problems)


def test_classes_named_like_sequences_are_kept(tmp_path: Path) -> None:
    for name in ("pose", "flow", "depth", "jump"):
        frames(tmp_path / name / "clip_1", "{}.jpg", COLOUR)
    assert sorted(video.above for video in raw_videos(tmp_path)) == [("depth",), ("flow",), ("jump",), ("pose",)]


def test_a_picture_in_a_class_folder_is_not_a_video(tmp_path: Path) -> None:
    for name in ("golf_1", "golf_2"):
        frames(tmp_path / "all" / "golf" / name, "{}.jpg", COLOUR)
    frames(tmp_path / "all" / "golf", "cover.jpg", OTHER, number=1)
    left_out: list[LeftOut] = []
    assert [video.name for video in raw_videos(tmp_path, left_out=left_out)] == ["golf_1", "golf_2"]
    assert [file.name for file in left_out] == ["all/golf/cover.jpg"]


def test_deep_frames_are_prepared_as_they_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in NAMES:
        folder = tmp_path / "raw" / name / "clip_1"
        folder.mkdir(parents=True)
        wall = (900 + rng.integers(0, 300, (40, 40))).astype(np.uint16)
        for number in range(20):
            values = wall.copy()
            values[10:30, number : number + 15] = 1500 + 50 * number
            Image.fromarray(values).save(folder / f"{number}.png")
    words = ["custom", "--videos", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--size", "40"]
    assert main([*words, "--frames", "all", "--quality", "1"]) == 0
    for name in NAMES:
        direct = read_frames(tmp_path / "raw" / name / "clip_1", np.arange).astype(int)
        prepared = read_frames(tmp_path / "out" / "frames" / name / "clip_1", np.arange).astype(int)
        assert direct.max() - direct.min() > 250
        assert np.abs(direct - prepared).mean() < 5


@pytest.mark.parametrize("linked", [False, True])
def test_a_changed_frame_changes_the_data_digest(tmp_path: Path, linked: bool) -> None:
    index = indexes_of(in_folders_of_a_video(tmp_path / "raw"), tmp_path)["train"]
    folder = index.path(0) / "rgb"
    if linked:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        (index.path(0) / "circle").symlink_to(index.path(0))
        assert find_frames(index.path(0)).images
    before = data_digest(index)
    assert data_digest(index) == before
    (folder / "00002.jpg").write_bytes(b"another image")
    assert data_digest(index) != before
