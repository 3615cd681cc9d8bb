"""The report: missing, broken and extra videos by name and number, its hash, and `prepare.py check`."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from episodes.data_report import data_report_sha256, find_report, report_sha256
from episodes.preparation.check import check_prepared
from episodes.preparation.report import distribution
from episodes.splits import load_splits
from run.command import exit_code_of
from run.prepare import main
from tests.helpers.commands import prepare
from tests.helpers.raw_data import HMDB_CLASSES, SMALL_EPISODES, hmdb, render, ucf, write_lists
from tests.helpers.shipped import ROOT
from utils.schema import DATASETS

MISSING, BROKEN, EXTRA = "v_YoYo_g01_c01", "v_BasketballDunk_g01_c02", "v_ApplyEyeMakeup_g01_c09"


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[str, ...]:
    """Returns the command for a miniature UCF101 with a missing, a broken and an extra video."""
    raw, split_dir = ucf(tmp_path)
    (raw / "UCF-101/YoYo" / f"{MISSING}.avi").unlink()
    (raw / "UCF-101/BasketballDunk" / f"{BROKEN}.avi").write_bytes(b"not a video")
    render(raw / "UCF-101/ApplyEyeMakeup" / f"{EXTRA}.avi", frames=5)
    options = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    return tuple(map(str, options))


def test_missing_broken_and_extra_videos_are_counted(damaged, tmp_path):
    output = prepare(*damaged, exit_code=1).stdout
    for row in ("test YoYo 2 1 1 0", "val BasketballDunk 2 1 0 1", "train ApplyEyeMakeup 2 3 0 0"):
        (line,) = [line for line in output.splitlines() if line.split()[:2] == row.split()[:2]]
        assert line.split()[:6] == row.split()
    assert f"broken: BasketballDunk/{BROKEN}: " in output
    assert (tmp_path / "out/report.txt").read_text() in output
    report = json.loads((tmp_path / "out/report.json").read_text())["report"]
    assert report["missing_videos"] == 2
    assert report["splits"]["val"]["broken"][0]["video"] == f"BasketballDunk/{BROKEN}"
    assert report["splits"]["train"]["frames_of_the_videos"] == {
        "min": 5, "5%": 5, "median": 14, "95%": 14, "max": 14,
    }  # fmt: skip


def test_a_truncated_video_is_used_and_named_each_time(tmp_path):
    raw, split_dir = ucf(tmp_path)
    video = raw / "UCF-101/YoYo" / f"{MISSING}.avi"
    render(video, frames=28)
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 7 // 10])
    options = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    for _ in range(2):  # the second time from what the first one left
        output = prepare(*options).stdout
        (line,) = [line for line in output.splitlines() if line.startswith("cut off: ")]
        percent = int(re.fullmatch(rf"cut off: YoYo/{MISSING}: ends at (\d+) % of .* used as is", line)[1])
        assert 0 < percent < 90
        assert "complete: every expected video is there" in output.splitlines()
    shutil.rmtree(tmp_path / "out")
    video.unlink()
    render(video, frames=28)
    assert "cut off" not in prepare(*options).stdout


@pytest.mark.parametrize(("allowed", "exit_code"), [(0, 1), (1, 1), (2, 0)])
def test_allow_missing_counts_broken_videos_too(damaged, allowed, exit_code):
    output = prepare(*damaged, "--allow-missing", allowed, exit_code=exit_code).stdout
    assert f" missing, {allowed} allowed (--allow-missing of run/prepare.py ucf101)\n" in output


def test_lists_allow_missing_videos_to_be_named(damaged, tmp_path):
    lines = {
        "train": [f"ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c0{n}" for n in (1, 2)]
        + [f"HandstandPushups/v_HandstandPushups_g01_c0{n}.avi" for n in (1, 2)],
        "val": ["BasketballDunk/v_BasketballDunk_g01_c01", f"BasketballDunk/{BROKEN}"],
        "test": ["YoYo/v_YoYo_g01_c02", f"YoYo/{MISSING}"],
    }
    lists = write_lists(tmp_path / "lists", lines)
    output = prepare(*damaged, "--lists", lists, exit_code=1).stdout
    assert f"missing: YoYo/{MISSING}: no such file" in output
    assert EXTRA not in (tmp_path / "out/splits/trainlist03.txt").read_text()


def test_a_video_that_crashes_the_decoder_is_named_and_the_others_are_prepared(tmp_path, monkeypatch, capsys):
    raw, split_dir = ucf(tmp_path)
    crash = f"os.kill(os.getpid(), signal.SIGSEGV) if {MISSING!r} in str(path) else read(path, *rest)"
    code = (
        "import os, signal, sys; sys.path[0] = {repository!r}; from episodes import decoding, video; "
        f"read = video.read_frames; video.read_frames = lambda path, *rest: {crash}; "
        "decoding.serve({descriptor}, {decord})"
    )
    options = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    with monkeypatch.context() as patch:
        patch.setattr("episodes.decoding.HELPER", code)
        patch.setattr("episodes.decoding._rejected", {})  # what a new process remembers
        assert main(list(map(str, options))) == 1
    output = capsys.readouterr().out
    assert f"broken: YoYo/{MISSING}: Decoding the video {MISSING}.avi crashes the decoder (SIGSEGV)" in output
    assert "INCOMPLETE: 1 expected video is" in output
    assert "1 to decode" in prepare(*options).stdout


def test_names_that_cannot_be_stored_are_reported_on_separate_lines(tmp_path):
    raw, split_dir = ucf(tmp_path)
    for name in (b"line\nend.avi", b"no text \xff.avi"):
        shutil.copy(raw / "UCF-101/YoYo" / f"{MISSING}.avi", bytes(raw / "UCF-101/YoYo") + b"/" + name)
    options = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    output = prepare(*options).stdout.splitlines()
    assert "missing: YoYo/line\\nend: its name contains a control character or a backslash; rename it" in output
    assert "missing: YoYo/no text \\udcff: its name is not UTF-8; rename it" in output


def test_the_hash_does_not_depend_on_the_location(tmp_path):
    hashes = []
    for name in ("one", "two"):
        raw, split_dir = ucf(tmp_path / name)
        (raw / "UCF-101/YoYo" / f"{MISSING}.avi").write_bytes(b"broken")
        out = tmp_path / name / "out"
        prepare("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", out, "--size", 32, exit_code=1)
        hashes.append(data_report_sha256(out / "frames"))
    assert hashes[0] == hashes[1] is not None


def test_the_hash_depends_on_the_frames_and_on_the_videos(tmp_path):
    raw, split_dir = ucf(tmp_path)
    options = ("ucf101", "--videos", raw, "--split-dir", split_dir)
    prepare(*options, "--out", tmp_path / "a", "--size", 32)
    prepare(*options, "--out", tmp_path / "b", "--size", 32, "--frames", 4)
    (raw / "UCF-101/YoYo" / f"{MISSING}.avi").unlink()
    prepare(*options, "--out", tmp_path / "c", "--size", 32, exit_code=1)
    assert len({data_report_sha256(tmp_path / name / "packed") for name in "abc"}) == 3


def test_data_prepared_by_other_means_has_no_report(tmp_path):
    (tmp_path / "report.json").write_text('{"sha256": "of something else"}')
    assert data_report_sha256(tmp_path / "frames") is None
    (tmp_path / "report.json").write_text("{")
    assert data_report_sha256(tmp_path) is None


def test_the_distribution_equals_that_of_the_numbers():
    assert distribution([]) is None
    assert distribution(range(1, 101)) == {"min": 1, "5%": 5, "median": 50, "95%": 95, "max": 100}
    assert distribution([40, 1, 10, 2]) == {"min": 1, "5%": 1, "median": 2, "95%": 10, "max": 40}  # no means of two


# --- check -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a prepared miniature HMDB51; tests that change it restore it."""
    root = tmp_path_factory.mktemp("prepared")
    raw, split_dir = hmdb(root)
    prepare("hmdb51", "--videos", raw, "--split-dir", split_dir, "--out", root / "out", "--size", 32)
    return root / "out"


Check = Callable[..., str]


@pytest.fixture
def check(prepared: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs `prepare.py check` in this process, which has PyTorch loaded already; returns what it prints."""

    def run(data: Path, exit_code: int = 0, splits: Path | None = prepared / "splits") -> str:
        keys = [f"DATA.DATA_DIR={data}", *SMALL_EPISODES] + ([f"DATA.SPLIT_DIR={splits}"] if splits else [])
        words = ["check", str(ROOT / "configs/clipspm/hmdb51.yaml"), *keys]
        assert exit_code_of(lambda: main(words)) == exit_code
        output = capsys.readouterr()
        return output.err if exit_code == 2 else output.out

    return run


@pytest.mark.parametrize("data", ["frames", "packed"])
def test_check_accepts_unchanged_data(prepared, check, data):
    output = check(prepared / data)
    saved = find_report(prepared / data)
    assert saved is not None
    assert f"report sha256 {report_sha256(saved['report'])}" in output
    assert "complete" in output
    assert "climb_stairs" in output


def test_check_runs_as_a_command(prepared):
    keys = (f"DATA.DATA_DIR={prepared / 'packed'}", f"DATA.SPLIT_DIR={prepared / 'splits'}", *SMALL_EPISODES)
    assert "complete" in prepare("check", "configs/clipspm/hmdb51.yaml", *keys).stdout


@pytest.mark.parametrize("damage", [Path.unlink, lambda frame: frame.write_bytes(b"")], ids=["removed", "emptied"])
def test_check_finds_a_removed_or_emptied_frame(prepared, check, damage):
    frame = next((prepared / "frames/golf").rglob("00000003.jpg"))
    content = frame.read_bytes()
    damage(frame)
    try:
        assert "val: 47 frames are stored, 48 in the report" in check(prepared / "frames", exit_code=1)
    finally:
        frame.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("splits/vallist03.txt", "golf/Golf_Swing_#6Iron_golf_f_cm_np1_fr_med_1\n", "", "val: 5 videos, 6 in the rep"),
        ("splits/classes.yaml", "prompt: golf", "prompt: playing golf", "videos, classes or prompts differ"),
        ("report.json", '"missing_videos": 0', '"missing_videos": -1', "report.json was edited"),
        ("report.json", '"splits":', '"parts":', "report.json was edited"),
        ("report.json", '"sha256":', '"md5":', "report.json was edited"),
    ],
)
def test_check_finds_an_edited_list_class_file_and_report(prepared, check, name, old, new, expected):
    path = prepared / name
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))
    try:
        assert expected in check(prepared / "packed", exit_code=1)
    finally:
        path.write_text(before)


def test_check_reads_the_names_of_older_reports(prepared, check):
    path = prepared / "report.json"
    before = path.read_text()
    saved = json.loads(before)
    saved["allowed_lacking"] = saved.pop("allowed_missing")
    saved["report"]["lacking"] = saved["report"].pop("missing_videos")
    saved["sha256"] = report_sha256(saved["report"])
    path.write_text(json.dumps(saved))
    try:
        assert "complete" in check(prepared / "packed")
    finally:
        path.write_text(before)


def test_check_expects_the_listed_videos(tmp_path, check):
    raw, split_dir = hmdb(tmp_path)
    names = {split: [f"{name}/{path.name}" for name in names for path in (raw / name).iterdir()]
             for split, names in HMDB_CLASSES.items()}  # fmt: skip
    lists, out = write_lists(tmp_path / "lists", names), tmp_path / "out"
    (split_dir / "classes.yaml").write_text((split_dir / "classes.yaml").read_text().replace("videos: 3", "videos: 2"))
    options = ("--split-dir", split_dir, "--lists", lists, "--out", out, "--size", 32)
    assert "<--" not in prepare("hmdb51", "--videos", raw, *options).stdout
    assert "<--" not in check(out / "packed", splits=out / "splits")


def test_the_printed_command_is_quoted_for_any_folder(tmp_path):
    raw, split_dir = ucf(tmp_path)
    out = tmp_path / "my data #1: 'ucf'"
    output = prepare("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", out, "--size", 32).stdout
    words = shlex.split(output.splitlines()[-1].removeprefix("next: "))
    # Of a class of val and one of test no episode can be made, which the exit code reports.
    checked = prepare("check", *words[words.index("--cfg") + 1 :], exit_code=1).stdout
    assert "complete: every expected video is there" in checked
    assert "too small for the config: train class 'ApplyEyeMakeup' has 2 videos" in checked


def test_the_printed_command_names_the_split_from_lists(tmp_path, monkeypatch):
    raw, split_dir = hmdb(tmp_path)
    names = {split: [f"{name}/{path.name}" for name in names for path in (raw / name).iterdir()]
             for split, names in HMDB_CLASSES.items()}  # fmt: skip
    lists, out = write_lists(tmp_path / "lists", names), tmp_path / "out"
    shutil.copytree(split_dir, tmp_path / "splits" / DATASETS["hmdb51"])
    monkeypatch.setattr("run.prepare.REPOSITORY", tmp_path)  # a small split in place of the shipped one
    output = prepare("hmdb51", "--videos", raw, "--lists", lists, "--out", out, "--size", 32).stdout
    assert f"DATA.SPLIT_DIR={out / 'splits'}" in output.splitlines()[-1]


def test_a_class_too_small_for_a_shipped_config_is_reported_with_the_config(tmp_path):
    raw, split_dir = ucf(tmp_path)
    output = prepare(
        "ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32
    ).stdout
    sentence = "train class 'HandstandPushups' has 2 videos, an episode of 5 shots and 4 queries per class needs 9"
    (line,) = [line for line in output.splitlines() if sentence in line]
    assert line.startswith("too small for ")
    assert "/ucf101.yaml: " in line


def test_check_without_a_report_compares_with_the_class_list(prepared, check, tmp_path):
    shutil.copytree(prepared / "frames", tmp_path / "frames")
    output = check(tmp_path / "frames")
    assert "no report.json" in output
    assert "complete" in output
    shutil.rmtree(next((tmp_path / "frames/golf").iterdir()))
    lists = tmp_path / "splits"
    lists.mkdir()
    shutil.copy(prepared / "splits/classes.yaml", lists)
    expected = "INCOMPLETE: 1 expected video is missing, 0 allowed (--allow-missing of run/prepare.py)"
    assert expected in check(tmp_path / "frames", 1, lists).splitlines()


def test_check_names_the_command_with_the_option(damaged, tmp_path, check):
    prepare(*damaged, exit_code=1)
    output = check(tmp_path / "out/packed", 1, tmp_path / "split").splitlines()
    assert "INCOMPLETE: 2 expected videos are missing, 0 allowed (--allow-missing of run/prepare.py ucf101)" in output
    saved = json.loads((tmp_path / "out/report.json").read_text())
    del saved["layout"]  # as in older reports, which do not name it
    (tmp_path / "out/report.json").write_text(json.dumps(saved))
    output = check(tmp_path / "out/packed", 1, tmp_path / "split").splitlines()
    assert "INCOMPLETE: 2 expected videos are missing, 0 allowed (--allow-missing of run/prepare.py)" in output


def test_check_reports_a_config_without_its_data(check, tmp_path):
    output = check(tmp_path / "none", exit_code=2)
    assert output.startswith("error: ")
    assert "DATA.DATA_DIR" in output


def test_an_extra_video_does_not_make_up_for_a_missing_one(own):
    (own.videos / "test_action_0/test_action_0_00.mp4").rename(own.videos / "test_action_1/extra.mp4")
    text, is_well = check_prepared(load_splits(own.splits, own.videos, ["test"]), own.videos)
    assert not is_well
    assert "INCOMPLETE" in text
