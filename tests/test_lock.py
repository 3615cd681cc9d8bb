"""One run in one directory, for as long as its process lives and no longer."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.lock import LOCK, last_holder, lock_directory
from utils.records import open_run_directory

ROOT = Path(__file__).resolve().parents[1]
HOLDER = (
    "import os, sys, time; from pathlib import Path; from utils.lock import lock_directory; "
    "file = lock_directory(Path(sys.argv[1]), 'somebody'); child = os.fork(); "
    "print(child, flush=True) if child else None; time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`; its child, whose number it prints, outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())  # type: ignore[union-attr]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    os.kill(child, 9)


def test_a_second_run_is_refused_and_told_who_has_the_directory(holder, tmp_path):
    for resume in (True, False):
        with pytest.raises(UserError) as error:
            open_run_directory(tmp_path, resume)
        for part in (str(tmp_path), f"process {holder.pid} ", os.uname().nodename, "CHECKPOINT.CHECKPOINT_DIR"):
            assert part in str(error.value)
    assert last_holder(tmp_path)["started_by"] == "somebody"


def test_a_killed_process_holds_nothing_even_while_its_children_live(holder, tmp_path):
    holder.kill()
    holder.wait()
    with lock_directory(tmp_path, "me"):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", [None, "", "[1]", "no json"])
def test_a_lock_file_that_says_nothing_is_no_matter(tmp_path, content):
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    assert last_holder(tmp_path) == {}
    lock_directory(tmp_path, "me").close()
    assert last_holder(tmp_path)["started_by"] == "me"
