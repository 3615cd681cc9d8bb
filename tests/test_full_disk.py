"""On a full disk no saved file is lost, and the error is reported in one sentence."""

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from episodes.demo.render import render_demo
from run.answers import Answers
from run.metrics_log import METRICS, MetricsWriter, write_test
from run.results import write_results
from run.run_directory import open_run_directory
from tests.helpers.commands import prepare
from tests.helpers.raw_data import render
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import LAST, load_checkpoint
from utils.config import load_config, save_config
from utils.errors import StopRequested, UserError
from utils.files import write_atomically
from utils.logs import set_up_logging

FULL = Path("/dev/full")
NOTHING = np.zeros((0, 1), np.int32)
ANSWERS = Answers(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, {})
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a file on a disk that is always full")


def test_a_failed_save_keeps_the_last_checkpoint_for_resuming(tiny_dataset, tmp_path):
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    steps = ("TRAIN.TRAIN_EPISODES=2", "TRAIN.VAL_FREQ=0", "TEST.TEST_EPISODES=2", "MODEL.SPM.ENABLED=false")
    save_config(tiny_config(tiny_dataset, run, *steps), config)
    # Before the first step a checkpoint holds the weights, 2.4 MB; after it the two moments of Adam too.
    limit = 4_000_000
    finished = subprocess.run(
        [sys.executable, "run/run.py", "--cfg", config],
        cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    (sentence,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "cannot write" in sentence
    assert "untouched" in sentence
    assert load_checkpoint(run / LAST)["episode"] == 0
    assert not list(run.glob("*.part"))
    trained(tiny_dataset, run, *steps, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    assert load_checkpoint(run / LAST)["episode"] == 2


def test_preparation_reports_a_full_disk_and_resumes_with_more_space(tmp_path):
    for folder in "abcdef":
        render(tmp_path / "raw" / folder / "1.mp4", size=(96, 128))
    words = ["custom", "--videos", tmp_path / "raw", "--out", tmp_path / "out"]
    limit = 1_000  # bytes of a file; a frame of 256 pixels has more
    finished = subprocess.run(
        [sys.executable, "run/prepare.py", *words], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "00000001.jpg: File too large; check the path, its permissions and the disk" in finished.stderr
    assert not (tmp_path / "out" / "partial").exists()
    printed = prepare(*words).stdout
    assert "6 to decode" in printed
    assert "complete" in printed


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / f".a.{os.getpid()}.part").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "a", b"content")
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk() -> Iterator[None]:
    """Prevents files from growing within the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_demo_rendering_reports_a_full_disk_and_resumes_with_more_space(tmp_path):
    with full_disk(), pytest.raises(UserError, match=r"cannot write the demo set into .*File too large"):
        render_demo(tmp_path / "demo", 0, 1, 1, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    render_demo(tmp_path / "demo", 0, 1, 1, 1)
    assert (tmp_path / "demo" / "splits" / "classes.yaml").is_file()


def test_a_config_survives_a_failed_rewrite(tiny_dataset, tmp_path):
    config, path = tiny_config(tiny_dataset, tmp_path), tmp_path / "config.yaml"
    save_config(config, path)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        save_config(config, path)
    assert load_config(path).config == config
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_failed_lock_write_is_reported_and_keeps_the_checkpoint(tmp_path):
    (tmp_path / LAST).write_bytes(b"mine")
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*run\.lock: File too large"):
        open_run_directory(tmp_path, resume=True)
    assert (tmp_path / LAST).read_bytes() == b"mine"


def test_unwritable_metrics_are_reported_in_one_sentence(tmp_path):
    (tmp_path / METRICS).symlink_to(FULL)
    with MetricsWriter(tmp_path) as writer, pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space"):
        writer.write(1, "train", {"loss": 1.0})


def test_unwritable_tensorboard_files_are_reported_in_one_sentence(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.tensorboard.flush()

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer.tensorboard, "add_scalar", full)
        with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space"):
            writer.write(2, "train", {"loss": 1.0})


def test_unwritable_tensorboard_test_results_are_reported_in_one_sentence(tmp_path, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("run.metrics_log.SummaryWriter.add_hparams", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space"):
        write_test(tmp_path, 1, {"MODEL.NAME": "otam"}, {"accuracy": 90.0})


def test_unwritable_results_are_reported_and_leave_nothing(tmp_path):
    (tmp_path / f".results.json.{os.getpid()}.part").symlink_to(FULL)
    with pytest.raises(UserError, match=r"cannot write .*results\.json: No space"):
        write_results(tmp_path, {"accuracy": 1}, ANSWERS)
    assert list(tmp_path.iterdir()) == []
    assert write_results(tmp_path, {"accuracy": 1}, ANSWERS).name == "results.json"


def test_a_signal_while_results_are_written_leaves_nothing(tmp_path, monkeypatch):
    def stopped(path: Path, content: bytes) -> None:
        raise StopRequested("stopped", 130)

    monkeypatch.setattr("run.results.write_atomically", stopped)
    with pytest.raises(StopRequested):
        write_results(tmp_path, {"accuracy": 1}, ANSWERS)
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "results.json").write_text("mine")
    assert write_results(tmp_path, {}, ANSWERS).name == "results_2.json"
    assert (tmp_path / "answers_2.npz").is_file()
    assert (tmp_path / "results.json").read_text() == "mine"


def test_a_failing_log_file_is_reported_once_and_the_run_continues(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to(FULL)
    set_up_logging(tmp_path / "log.txt")
    for number in range(3):
        logging.getLogger("run").error("line %d", number)
    output = capsys.readouterr().err
    assert output.count("cannot write") == 1
    assert output.count("line") == 3
    assert "Traceback" not in output
    assert os.fspath(tmp_path) in output
