"""A folder is used by one process at a time, until that process ends."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from run.run_directory import LOCK, open_run_directory
from tests.helpers.shipped import ROOT
from utils import files
from utils.errors import UserError
from utils.files import exclusive, last_holder, write_atomically

HOLDER = (
    "import os, sys, time; from pathlib import Path; from utils.files import exclusive; "
    "lock = exclusive(Path(sys.argv[1]), 'it', 'wait'); child = os.fork(); "
    "child or print(os.getpid(), flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts another process that holds the lock of `tmp_path`; its child, whose id it prints, outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())  # type: ignore[union-attr]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    os.kill(child, 9)


def test_a_second_run_is_refused_and_the_first_is_named(holder, tmp_path):
    for resume in (True, False):
        with pytest.raises(UserError) as error:
            open_run_directory(tmp_path, resume)
        for part in (str(tmp_path), f"process {holder.pid} ", os.uname().nodename, "CHECKPOINT.CHECKPOINT_DIR"):
            assert part in str(error.value)
    assert last_holder(tmp_path / LOCK)["process"] == holder.pid


def test_a_killed_process_releases_its_lock_despite_running_children(holder, tmp_path):
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / LOCK, "it", "wait"):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_a_process_can_reacquire_its_lock_and_releases_it_at_the_end(tmp_path):
    other = [sys.executable, "-c", HOLDER.partition("child =")[0], str(tmp_path / LOCK)]

    def fails() -> bool:
        return subprocess.run(other, cwd=ROOT, capture_output=True, check=False).returncode != 0

    first = exclusive(tmp_path / LOCK, "it", "wait")
    with exclusive(tmp_path / LOCK, "it", "wait"):
        pass
    assert fails()
    del first
    assert not fails()


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, written = tmp_path / "shared.json", []

    def write(temporary: Path, content: bytes) -> None:
        temporary.write_bytes(content)
        written.append(temporary)
        if content == b"first":
            monkeypatch.setattr(os, "getpid", lambda: 1)
            write_atomically(path, b"second")  # by another process, before the first has renamed its file

    monkeypatch.setattr(files, "write_bytes", write)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    assert len(set(written)) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, "", "[1]", "no json"])
def test_a_lock_file_without_a_holder_is_ignored(tmp_path, content):
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    assert last_holder(tmp_path / LOCK) == {}
    with exclusive(tmp_path / LOCK, "it", "wait"):
        pass
    assert last_holder(tmp_path / LOCK)["process"] == os.getpid()


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, reason):
    def no_locks(*arguments: object) -> None:
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path / LOCK, "the folder it", "wait"):
        assert "the file system of the folder it does not support locks (no locks here)" in caplog.text
    assert last_holder(tmp_path / LOCK)["process"] == os.getpid()
