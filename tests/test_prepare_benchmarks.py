"""Each benchmark, from a miniature raw download to data that a config reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from episodes.data_report import find_report, report_sha256
from episodes.preparation.plan import make_plan
from episodes.search import SPLITS
from episodes.splits import ClassEntry, ClassList, load_splits
from episodes.video import read_frames
from run.command import exit_code_of
from run.prepare import main
from run.run import main as train
from tests.helpers.commands import SMALL, prepare
from tests.helpers.raw_data import all_files, hmdb, kinetics, ssv2, ucf, write_lists
from tests.helpers.shipped import ROOT
from utils.schema import DATASETS
from videotransforms.video_transforms import TestTransform
from videotransforms.volume_transforms import FrameChoice


def check_loads(out: Path, split_dir: Path, videos: dict[str, int]) -> None:
    """Asserts that frames and packed stores give the same index, which matches the report."""
    report = json.loads((out / "report.json").read_text())["report"]
    for data in ("frames", "packed"):
        indexes = load_splits(out / "splits", out / data, SPLITS, split_dir)
        assert {split: len(index) for split, index in indexes.items()} == videos
        assert {split: index.notes for split, index in indexes.items()} == dict.fromkeys(SPLITS, ())
        for split, index in indexes.items():
            assert index.digest() == report["splits"][split]["split_sha256"]


def test_hmdb51_with_its_odd_file_names_is_prepared_from_class_folders(tmp_path):
    raw, split_dir = hmdb(tmp_path)
    before = all_files(raw)
    output = prepare("hmdb51", "--videos", raw, "--out", tmp_path / "out", "--split-dir", split_dir).stdout
    assert "complete: every expected video is there" in output
    check_loads(tmp_path / "out", split_dir, {"train": 9, "val": 6, "test": 6})
    assert len(list((tmp_path / "out/frames/golf/Golf_Swing_#6Iron_golf_f_cm_np1_fr_med_1").iterdir())) == 8
    assert all_files(raw) == before


@pytest.mark.parametrize("below", ["", "UCF-101"])
def test_ucf101_is_found_in_its_folder_and_in_the_folder_above(tmp_path, below):
    raw, split_dir = ucf(tmp_path)
    prepare("ucf101", "--videos", raw / below, "--out", tmp_path / "out", "--split-dir", split_dir)
    check_loads(tmp_path / "out", split_dir, {"train": 4, "val": 2, "test": 2})


def test_kinetics_is_found_by_id_with_or_without_times_below_any_folder(tmp_path):
    raw, split_dir, lists = kinetics(tmp_path)
    arguments = ("kinetics", "--videos", raw, "--split-dir", split_dir, "--lists", lists)
    prepare(*arguments, "--out", tmp_path / "out")
    check_loads(tmp_path / "out", split_dir, {"train": 4, "val": 2, "test": 4})
    for name in (tmp_path / "out/splits/vallist03.txt").read_text().splitlines():
        folder, video = name.split("/")
        assert folder == "baking_cookies"
        assert len(video) == 11


@pytest.mark.parametrize("suffix", [".mp4", ".mp4.webm"])
def test_a_kinetics_file_cut_at_other_times_is_skipped_with_any_suffix(tmp_path, suffix):
    for identity in ("-514AQUrSow", "x514AQUrSow"):
        (tmp_path / f"{identity}_000033_000043{suffix}").touch()
    lines = {
        "train": ["a/-514AQUrSow_000010_000020"],
        "val": ["b/-514AQUrSow"],
        "test": ["c/x514AQUrSow_000033_000043"],
    }
    entries = {split: [ClassEntry(lines[split][0][0], lines[split][0][0], 1)] for split in SPLITS}
    class_list = ClassList(tmp_path / "classes.yaml", "kinetics", True, True, entries)
    plan = make_plan("kinetics", class_list, tmp_path, write_lists(tmp_path / "lists", lines), [])
    assert [video.source is not None for video in plan.videos] == [False, True, True]


def test_a_kinetics_file_of_the_listed_times_is_preferred_to_the_whole_video(tmp_path):
    cut, whole, other = (f"-514AQUrSow{times}.mp4" for times in ("_000010_000020", "", "_000033_000043"))
    for folder, name in (("1", cut), ("2", other), ("3", whole)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    entries = {split: [ClassEntry(split, split, 1)] for split in SPLITS}
    class_list = ClassList(tmp_path / "classes.yaml", "kinetics", True, True, entries)
    for listed, expected in (("-514AQUrSow_000010_000020", [cut, whole]), ("-514AQUrSow", [whole, cut, other])):
        lines = {split: [f"{split}/{split:->11}"] for split in SPLITS} | {"train": [f"train/{listed}"]}
        lists = write_lists(tmp_path / "lists", lines)
        video = make_plan("kinetics", class_list, tmp_path, lists, [lists]).videos[0]
        assert [path.name for path in (video.source, *video.others)] == expected


def test_a_kinetics_video_in_the_folder_of_another_class_is_not_used(tmp_path):
    raw, split_dir, lists = kinetics(tmp_path)
    test_list = lists / "testlist03.txt"
    test_list.write_text(test_list.read_text().replace("ski jumping", "unboxing", 1))
    out = tmp_path / "out"
    assert (
        main(["kinetics", *map(str, ("--videos", raw, "--split-dir", split_dir, "--lists", lists, "--out", out))]) == 1
    )
    assert "only in the folder of ski_jumping" in (out / "report.txt").read_text()
    assert len((out / "splits/testlist03.txt").read_text().splitlines()) == 3


def test_a_raw_video_is_never_used_for_two_listed_videos(tmp_path):
    (tmp_path / "5.webm").touch()
    lines = {"train": ["train0/5"], "val": ["val0/6"], "test": ["test0/5"]}
    entries = {split: [ClassEntry(f"{split}0", split, 1)] for split in SPLITS}
    class_list = ClassList(tmp_path / "classes.yaml", "ssv2_small", True, False, entries)
    plan = make_plan("ssv2_small", class_list, tmp_path, write_lists(tmp_path / "lists", lines), [])
    assert [video.reason for video in plan.videos] == ["", "no such file", "5.webm is used for train0/5"]


def test_an_unavailable_kinetics_video_is_named_and_can_be_allowed(tmp_path):
    raw, split_dir, lists = kinetics(tmp_path)
    lost = next(raw.glob("train/water skiing/*"))
    lost.rename(lost.with_name(lost.name.replace("_000010_000020", "_000033_000043")))
    arguments = ("kinetics", "--videos", raw, "--split-dir", split_dir, "--lists", lists, "--out", tmp_path / "out")
    output = prepare(*arguments, exit_code=1).stdout
    assert f"missing: water_skiing/{lost.name[:11]}: found only with other start and end times" in output
    assert "INCOMPLETE: 1 expected video is missing" in output
    output = prepare(*arguments, "--allow-missing", 1).stdout
    assert "0 to decode" in output
    assert "1 expected video is missing, 1 allowed" in output
    assert len(load_splits(tmp_path / "out/splits", tmp_path / "out/packed", ["train"], split_dir)["train"]) == 3


@pytest.mark.parametrize(("name", "first"), [("ssv2_full", 0), ("ssv2_small", 24)])
def test_ssv2_is_found_by_number_and_its_numbered_classes_by_position(tmp_path, name, first):
    raw, split_dir, lists = ssv2(tmp_path, first)
    prepare(name, "--videos", raw, "--out", tmp_path / "out", "--split-dir", split_dir, "--lists", lists)
    check_loads(tmp_path / "out", split_dir, {"train": 4, "val": 2, "test": 2})
    (first_line, *_) = (tmp_path / "out/splits/trainlist03.txt").read_text().splitlines()
    assert first_line.startswith(f"train{first}/")


def test_lists_of_the_same_videos_have_one_report(tmp_path):
    raw, split_dir, _ = ssv2(tmp_path, 24)
    by_label = {"train": [], "val": [], "test": []}
    for entry in json.loads((raw / "something-something-v2-train.json").read_text()):
        split = "test" if entry["template"].startswith("Plugging") else "train"
        by_label[split].append(f"{entry['template'].replace('[', '').replace(']', '')}/{entry['id']}")
    for entry in json.loads((raw / "something-something-v2-validation.json").read_text()):
        by_label["val"].append(f"Pouring something into something/{entry['id']}.webm 7")
    hashes = []
    for lists in (tmp_path / "lists", write_lists(tmp_path / "by_label", by_label, "{}list07.txt", end="\r\n")):
        out = tmp_path / f"out_{lists.name}"
        arguments = ("--videos", raw, "--out", out, "--split-dir", split_dir, "--lists", lists, "--size", 32)
        prepare("ssv2_small", *arguments)
        saved = find_report(out / "packed")
        assert saved is not None
        hashes.append(report_sha256(saved["report"]))
    assert hashes[0] == hashes[1]


def test_lists_contradicting_annotations_are_refused_before_decoding(tmp_path):
    raw, split_dir, lists = ssv2(tmp_path)
    path = lists / "train_few_shot.txt"
    path.write_text(
        path.read_text().replace("train0", "trainX").replace("train1", "train0").replace("trainX", "train1")
    )
    arguments = ("--videos", raw, "--out", tmp_path / "out", "--split-dir", split_dir, "--lists", lists)
    output = prepare("ssv2_full", *arguments, exit_code=2).stderr
    assert "4 listed videos have another class in the annotations" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["kinetics", "ssv2_full", "ssv2_small"])
def test_a_benchmark_of_chosen_videos_reports_that_it_needs_lists(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    output = prepare(name, "--videos", raw, "--out", tmp_path / "out", exit_code=2).stderr
    assert output.startswith("error: ")
    assert "--lists" in output
    assert not (tmp_path / "out").exists()


def test_unextracted_archives_are_reported(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "brush_hair.rar").write_bytes(b"Rar!")
    output = prepare("hmdb51", "--videos", raw, "--out", tmp_path / "out", exit_code=2).stderr
    assert "unpack" in output


@pytest.mark.parametrize("name", [*DATASETS, "custom"])
@pytest.mark.parametrize(
    ("videos", "out"),
    [
        ("raw", "raw"), ("raw", "raw/out"), ("raw", "raw/a/../new/out"), ("raw", "link"), ("link", "raw/out"),
        ("raw", "linked"), ("kept/frames", "kept"), ("kept/packed/raw", "kept"), ("kept/partial/raw", "kept"),
        ("kept/splits", "kept"),
    ],
)  # fmt: skip
def test_preparing_into_the_raw_videos_is_refused(tmp_path, capsys, name, videos, out):
    for raw in ("raw", "kept/frames", "kept/packed/raw", "kept/partial/raw", "kept/splits"):
        (tmp_path / raw / "a").mkdir(parents=True)
        (tmp_path / raw / "a/1.mp4").touch()
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/frames").symlink_to(tmp_path / "raw")
    before = sorted(tmp_path.rglob("*"))
    assert exit_code_of(lambda: main([name, "--videos", f"{tmp_path}/{videos}", "--out", f"{tmp_path}/{out}"])) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"--videos {tmp_path}/{videos}" in sentence
    assert f"--out {tmp_path}/{out}" in sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_raw_videos_may_be_in_the_output_folder(tmp_path):
    raw, split_dir = ucf(tmp_path)
    before = all_files(raw)
    prepare("ucf101", "--videos", raw, "--out", tmp_path, "--split-dir", split_dir, "--size", 32)
    check_loads(tmp_path, split_dir, {"train": 4, "val": 2, "test": 2})
    assert all_files(raw) == before


def test_linked_videos_and_folders_are_followed(tmp_path):
    raw, split_dir = ucf(tmp_path)
    linked = tmp_path / "linked"
    linked.mkdir()
    for number, folder in enumerate(sorted((raw / "UCF-101").iterdir())):
        if number % 2:
            (linked / folder.name).symlink_to(folder)
        else:
            (linked / folder.name).mkdir()
            for video in folder.iterdir():
                (linked / folder.name / video.name).symlink_to(video)
    (linked / "circle").symlink_to(linked)
    prepare("ucf101", "--videos", linked, "--out", tmp_path / "out", "--split-dir", split_dir, "--size", 32)
    check_loads(tmp_path / "out", split_dir, {"train": 4, "val": 2, "test": 2})


def test_training_on_frames_equals_training_on_videos_up_to_jpeg_loss(tmp_path):
    raw, split_dir = ucf(tmp_path)
    options = ("--short-side", "--size", 64, "--quality", 2)
    prepare("ucf101", "--videos", raw, "--out", tmp_path / "out", "--split-dir", split_dir, *options)
    of_frames = load_splits(tmp_path / "out/splits", tmp_path / "out/frames", ["test"], split_dir)["test"]
    for name in of_frames.video_names:
        source = raw / "UCF-101" / f"{name}.avi"
        clips = [
            TestTransform(64, 56)(read_frames(path, FrameChoice(8, "linspace", None))).numpy().astype(int)
            for path in (source, tmp_path / "out/frames" / name)
        ]
        # JPEG keeps half of the colour's resolution; compare the brightness, which distinguishes frames.
        brightness = [clip.mean(axis=1) for clip in clips]
        assert np.abs(brightness[0] - brightness[1]).mean() < 6
        moved = np.abs(brightness[0] - np.roll(brightness[1], 1, axis=0)).mean()
        assert moved > 2 * np.abs(brightness[0] - brightness[1]).mean()


def test_a_shipped_config_trains_on_prepared_data(tmp_path, monkeypatch):
    raw, split_dir, lists = kinetics(tmp_path)
    out = tmp_path / "data/kinetics"
    prepare("kinetics", "--videos", raw, "--split-dir", split_dir, "--lists", lists, "--size", 32, "--out", out)
    monkeypatch.chdir(tmp_path)
    train(["--cfg", str(ROOT / "configs/clipspm/kinetics.yaml"), *SMALL, "TRAIN.WAY=2", "TRAIN.VAL_FREQ=0"])
    assert (tmp_path / "checkpoints/clipspm_kinetics/results.json").is_file()
