"""Preparation that is interrupted, repeated or run by several processes gives the same data, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.helpers.commands import prepare
from tests.helpers.raw_data import all_files, render, ucf, write_class_file
from tests.helpers.shipped import ROOT
from utils.errors import UserError

CLASSES = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
VIDEOS = 12


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns 4 classes of 12 videos; the split is in `split`. Tests only read it."""
    root = tmp_path_factory.mktemp("raw")
    for names in CLASSES.values():
        for name in names:
            for number in range(VIDEOS):
                render(root / "videos" / name / f"{name}_{number}.avi", frames=40, size=(96, 128))
    write_class_file(root / "split", "hmdb51", CLASSES, VIDEOS, listed=False)
    return root


def arguments_of(raw: Path, out: Path, workers: int = 1) -> list[str]:
    options = ["hmdb51", "--videos", raw / "videos", "--split-dir", raw / "split", "--out", out, "--workers", workers]
    return [str(option) for option in options]


@pytest.fixture(scope="module")
def uninterrupted(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    prepare(*arguments_of(raw, out))
    return all_files(out)


def test_a_killed_run_resumes_to_the_same_bytes(raw, uninterrupted, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "run/prepare.py", *arguments_of(raw, out)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(done := list(out.glob("frames/*/*"))) < 5:
        assert running.poll() is None
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (out / "report.json").exists()
    half = out / "frames" / "d" / "d_11"  # as after a power failure
    half.mkdir(parents=True, exist_ok=True)
    (half / "00000001.jpg").write_bytes(b"")
    written = {folder: folder.stat().st_mtime_ns for folder in done}
    output = prepare(*arguments_of(raw, out)).stdout
    assert f"{4 * VIDEOS} videos requested, 0 already prepared" not in output
    assert {folder: folder.stat().st_mtime_ns for folder in done} == written
    assert all_files(out) == uninterrupted


def test_ctrl_c_is_reported_in_one_sentence(raw, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "run/prepare.py", *arguments_of(raw, out, workers=2)]
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # As from a terminal: background processes of a shell ignore the signal, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(out.glob("frames/*/*")):
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, output = running.communicate(timeout=60)
    assert running.returncode == 130
    (line,) = [line for line in output.splitlines() if not line.startswith("decoding: ")]  # a slow machine's progress
    assert "SIGINT" in line
    assert "start the same command again" in line
    assert not (out / "partial").exists()


def test_two_processes_write_the_same_bytes_as_one(raw, uninterrupted, tmp_path):
    prepare(*arguments_of(raw, tmp_path / "out", workers=2))
    assert all_files(tmp_path / "out") == uninterrupted


def test_a_second_run_changes_no_files(tmp_path):
    raw, split_dir = ucf(tmp_path)
    arguments = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    data = [*(tmp_path / "out/frames").rglob("*"), *(tmp_path / "out/packed").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in data}
    assert "8 already prepared, 0 to decode" in prepare(*arguments).stdout
    assert {path: path.stat().st_mtime_ns for path in data} == before


def test_a_replaced_raw_video_is_decoded_again(tmp_path):
    raw, split_dir = ucf(tmp_path)
    arguments = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    before = all_files(tmp_path / "out")
    render(raw / "UCF-101/YoYo/v_YoYo_g01_c01.avi", frames=23)
    assert "7 already prepared, 1 to decode" in prepare(*arguments).stdout
    changed = {name for name, content in all_files(tmp_path / "out").items() if before[name] != content}
    assert {name.split("/")[0] for name in changed} == {"frames", "packed", "report.json", "report.txt"}
    assert "packed/test.sqlite" in changed
    assert "packed/train.sqlite" not in changed


def test_an_interrupted_run_leaves_no_store_of_earlier_frames(tmp_path, monkeypatch):
    raw, split_dir = ucf(tmp_path)
    arguments = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    assert list((tmp_path / "out/packed").glob("*.sqlite"))
    render(raw / "UCF-101/YoYo/v_YoYo_g01_c01.avi", frames=23)
    monkeypatch.setattr("episodes.preparation.prepare._decode", Mock(side_effect=UserError("interrupted")))
    prepare(*arguments, exit_code=2)
    assert not list((tmp_path / "out/packed").glob("*.sqlite"))


def test_other_settings_are_refused_and_change_nothing(raw, tmp_path):
    out = tmp_path / "out"
    arguments = arguments_of(raw, out)
    (out).mkdir()
    prepare(*arguments, "--size", 32)
    before = all_files(out)
    output = prepare(*arguments, "--size", 48, exit_code=2).stderr
    assert "was prepared with size 32 (requested: 48)" in output
    assert len(output.splitlines()) == 1
    assert all_files(out) == before


def test_concurrent_preparation_of_a_folder_is_refused(raw, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "run/prepare.py", *arguments_of(raw, out)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not list(out.glob("frames/*")):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGSTOP)  # so that it does not finish first
        assert f"is in use by process {running.pid} on" in prepare(*arguments_of(raw, out), exit_code=2).stderr
    finally:
        running.kill()
        running.wait()


def test_frames_added_by_the_user_are_not_removed(tmp_path):
    raw, split_dir = ucf(tmp_path)
    arguments = ("ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    note = tmp_path / "out/frames/YoYo/v_YoYo_g01_c01/note.txt"
    note.write_text("mine")
    assert "which this command did not write" in prepare(*arguments, exit_code=2).stderr
    assert note.read_text() == "mine"


def test_raw_videos_may_be_removed_after_preparation(tmp_path):
    raw, split_dir = ucf(tmp_path)
    lists = tmp_path / "lists"
    arguments = ["ucf101", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out", "--size", 32]
    prepare(*arguments)
    shutil.copytree(tmp_path / "out/splits", lists)
    before = all_files(tmp_path / "out")
    (raw / "UCF-101/YoYo/v_YoYo_g01_c01.avi").unlink()
    prepare(*arguments, "--lists", lists)
    assert all_files(tmp_path / "out") == before
