"""Locations of raw videos: split folders, folders of a NAS, and the usual causes when nothing is found."""

import json
from pathlib import Path

import pytest

from episodes.preparation.custom import find_classes
from episodes.preparation.raw_layouts import by_class, by_number, raw_videos
from episodes.search import SPLITS
from run.command import exit_code_of
from run.prepare import main
from tests.helpers.raw_data import render, ssv2, write_class_file, write_lists
from utils.errors import UserError

NAMES = {"train": ["cut", "peel"], "val": ["fry", "knead"], "test": ["boil", "stir"]}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def cause_of(root: Path) -> str:
    """Returns the message for a folder in which no numbered video is found."""
    with pytest.raises(UserError) as caught:
        by_number(raw_videos(root), root)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["hmdb51_org.rar"], ["hmdb51_org.rar", "unpack"]),
        (["hmdb51/brush_hair.rar"], ["hmdb51/brush_hair.rar", "unpack"]),
        (["UCF101/UCF101.zip"], ["UCF101.zip", "unpack"]),
        (["20bn-something-something-v2-00", "20bn-something-something-v2-01"], ["v2-00", "join"]),
        (["ssv2/20bn-something-something-v2-19"], ["ssv2/20bn-something-something-v2-19", "join"]),
        (["ucf.tar.gz.aa", "ucf.tar.gz.ab"], ["ucf.tar.gz.aa", "join"]),
        (["a.z01", "a.zip"], ["a.z01", "join"]),
        (["78687.webm.part"], ["78687.webm.part", "download"]),
        (["videos/20bn.zip.crdownload"], ["20bn.zip.crdownload", "download"]),
        (["notes.txt"], ["the folder that contains them"]),
    ],
)
def test_an_empty_search_names_the_likely_cause(tmp_path, files, parts):
    message = cause_of(touch(tmp_path, *files))
    for part in (str(tmp_path), *parts):
        assert part in message


def test_a_class_folder_given_as_root_is_reported(tmp_path):
    root = touch(tmp_path / "hmdb51" / "brush_hair", "a.avi")
    with pytest.raises(UserError) as caught:
        by_class(raw_videos(root), ["brush_hair", "clap"], root)
    assert str(tmp_path / "hmdb51") in str(caught.value)


def test_folders_of_a_nas_and_of_archives_are_not_searched(tmp_path):
    root = touch(
        tmp_path, "1.webm", "@eaDir/2.webm", "@eaDir/3/SYNOPHOTO_THUMB_M.jpg", "#recycle/4.webm", "__MACOSX/5.webm",
        "lost+found/6.webm", "$RECYCLE.BIN/7.webm", "a/@eaDir/8.webm", "System Volume Information/9.webm",
    )  # fmt: skip
    assert list(by_number(raw_videos(root), root)) == ["1"]


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Train", "validation", "testing")])
def test_split_folders_above_classes_determine_the_split(tmp_path, folders):
    for split, folder in zip(SPLITS, folders, strict=True):
        touch(tmp_path, *(f"{folder}/{name}/{number}.mp4" for name in NAMES[split] for number in range(2)))
    classes = find_classes(tmp_path, [])
    assert classes.split == NAMES
    assert classes.counts == dict.fromkeys([name for names in NAMES.values() for name in names], 2)


def test_a_class_in_two_split_folders_is_refused_by_name(tmp_path):
    touch(tmp_path, "train/cut/1.mp4", "train/peel/2.mp4", "test/cut/3.mp4", "test/boil/4.mp4")
    with pytest.raises(UserError, match="'cut'"):
        find_classes(tmp_path, [])


def test_classes_named_like_splits_are_kept(tmp_path):
    touch(tmp_path, "train/1.mp4", "bus/2.mp4", "test/track/3.mp4")
    classes = find_classes(tmp_path, [])
    assert classes.split is None
    assert sorted(classes.counts) == ["bus", "test", "train"]


def test_a_root_one_level_too_high_is_refused_with_the_right_folder(tmp_path):
    touch(tmp_path, "clips/cut/1.mp4", "clips/peel/2.mp4", "clips/@eaDir/3.mp4")
    with pytest.raises(UserError) as caught:
        find_classes(tmp_path, [])
    assert str(tmp_path / "clips") in str(caught.value)


def test_custom_data_in_split_folders_keeps_its_split(tmp_path, capsys):
    for split, names in NAMES.items():
        for name in names:
            render(tmp_path / "raw" / split / name / f"{name}.mp4")
    words = ["custom", "--videos", tmp_path / "raw", "--out", tmp_path / "out", "--size", "32", "--workers", "1"]
    assert main([str(word) for word in words]) == 0
    assert "complete" in capsys.readouterr().out
    for split, names in NAMES.items():
        assert (tmp_path / f"out/splits/{split}list03.txt").read_text() == "".join(f"{n}/{n}\n" for n in names)


@pytest.mark.parametrize("name", ["hmdb51", "kinetics", "ssv2_small"])
def test_the_first_readable_file_of_several_is_used_and_reported(tmp_path, capsys, name):
    """The first file by path is damaged; a second run finds everything prepared."""
    video = {"hmdb51": "clip", "kinetics": "-514AQUrSow", "ssv2_small": "78687"}[name]
    classes = {split: [names[0]] for split, names in NAMES.items()}
    split_dir = write_class_file(tmp_path / "split", name, classes, 1, listed=name != "hmdb51")
    raw = touch(tmp_path / "raw", f"a/boil/{video}.mp4", *(["b/cut/x.txt"]))
    (raw / f"a/boil/{video}.mp4").write_bytes(b"not a video")
    render(raw / f"b/boil/{video}.mp4")
    render(raw / f"c/boil/{video}.mp4", frames=20)
    words = ["--videos", raw, "--out", tmp_path / "out", "--split-dir", split_dir, "--size", 32, "--workers", 1]
    if name != "hmdb51":
        lines = {"train": ["cut/00000000001"], "val": ["fry/00000000002"], "test": [f"boil/{video}"]}
        words += ["--lists", write_lists(tmp_path / "lists", lines)]
    for decoded in (1, 0):
        assert main([name, *map(str, words), "--allow-missing", "2"]) == 0
        printed = capsys.readouterr().out
        assert f"{decoded} to decode" in printed
        report = json.loads((tmp_path / "out/report.json").read_text())["report"]["splits"]["test"]
        assert (report["found"], report["broken"]) == (1, [])
        (choice,) = report["several files"]
        assert choice["video"] == f"boil/{video}"
        assert choice["reason"].startswith(f"b/boil/{video}.mp4 is used")
        assert f"a/boil/{video}.mp4" in choice["reason"]
        assert choice["reason"] in printed


@pytest.mark.parametrize("folder", ["", "20bn"])
def test_unjoined_parts_of_something_something_are_reported(tmp_path, capsys, folder):
    _, split_dir, lists = ssv2(tmp_path)
    raw = tmp_path / "parts" / folder
    touch(raw, "20bn-something-something-v2-00", "20bn-something-something-v2-01")
    words = ["ssv2_small", "--videos", str(tmp_path / "parts"), "--split-dir", str(split_dir), "--lists", str(lists)]
    assert exit_code_of(lambda: main([*words, "--out", str(tmp_path / "out")])) == 2
    (output,) = capsys.readouterr().err.splitlines()
    assert "20bn-something-something-v2-00" in output
    assert "join" in output
    assert not (tmp_path / "out").exists()
