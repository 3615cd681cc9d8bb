"""`prepare.py check` detects changed bytes of prepared frames, and `prepare.py` prepares such videos again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from episodes.data_report import report_sha256
from episodes.preparation import check as checking
from episodes.preparation.checksums import checksum, evenly_spaced, size_of
from run.prepare import main
from tests.helpers.commands import prepare
from tests.helpers.raw_data import SMALL_EPISODES, all_files, hmdb
from tests.helpers.shipped import ROOT

Check = Callable[..., str]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a miniature HMDB51 in `raw` and `split`, prepared into `out`; tests work on a copy."""
    root = tmp_path_factory.mktemp("once")
    raw, split_dir = hmdb(root)
    prepare("hmdb51", "--videos", raw, "--split-dir", split_dir, "--out", root / "out", "--size", 32)
    return root


@pytest.fixture
def root(once: Path, tmp_path: Path) -> Path:
    shutil.copytree(once, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def check(root: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs `prepare.py check` for `frames` or `packed`; returns what it prints."""

    def run(data: str, *options: str, exit_code: int = 0) -> str:
        keys = [f"DATA.DATA_DIR={root / 'out' / data}", f"DATA.SPLIT_DIR={root / 'out/splits'}", *SMALL_EPISODES]
        assert main(["check", str(ROOT / "configs/clipspm/hmdb51.yaml"), *options, *keys]) == exit_code
        return capsys.readouterr().out

    return run


def change(root: Path, data: str) -> str:
    """Changes one byte of one video of val, with the same size; returns the video's name."""
    if data == "packed":
        store = root / "out/packed/val.sqlite"
        store.write_bytes(store.read_bytes().replace(b"frame 5 of", b"frame 6 of", 1))
        return "cartwheel/"
    frame = sorted((root / "out/frames/golf").rglob("*.jpg"))[-1]
    content = bytearray(frame.read_bytes())
    content[-9] ^= 1
    frame.write_bytes(content)
    return f"golf/{frame.parent.name}"


@pytest.mark.parametrize("data", ["frames", "packed"])
def test_one_changed_byte_is_detected_and_its_video_is_named(root, check, data):
    assert "DIFFERS" not in check(data)
    name = change(root, data)
    (line,) = [line for line in check(data, exit_code=1).splitlines() if "frames differ" in line]
    assert line.startswith(f"val: {name}")


@pytest.mark.parametrize(
    ("limit", "numbers"), [(100, range(10)), (99, range(0, 10, 2)), (60, range(0, 10, 2)), (1, [0])]
)
def test_a_sample_has_the_most_videos_below_the_limit(limit, numbers):
    names = [f"a/{number}" for number in range(10)]
    recorded = dict.fromkeys(names, "digest 10")
    assert evenly_spaced(names, recorded, limit) == [f"a/{number}" for number in numbers]


@pytest.mark.parametrize("data", ["frames", "packed"])
def test_large_data_is_sampled_unless_full_is_given(root, check, monkeypatch, data):
    monkeypatch.setattr(checking, "QUICK_BYTES", 1)  # the first video of each split alone
    name = change(root, "frames")
    store = root / "out/packed/val.sqlite"
    # The last of the videos: each has a frame of this comment.
    before, _, after = store.read_bytes().rpartition(b"frame 5 of")
    store.write_bytes(before + b"frame 6 of" + after)
    output = check(data)
    assert "val: frames of 1 of 6 videos compared with their checksums; --full compares all" in output
    output = check(data, "--full", exit_code=1)
    assert "val: frames of 6 of 6 videos compared with their checksums\n" in output
    assert ("val: golf/" if data == "packed" else name) in output


def test_a_changed_file_size_is_detected_without_reading_everything(root, check, monkeypatch):
    monkeypatch.setattr(checking, "QUICK_BYTES", 1)
    frame = sorted((root / "out/frames/golf").rglob("*.jpg"))[-1]
    frame.write_bytes(frame.read_bytes()[:-1])
    assert f"golf/{frame.parent.name}" in check("frames", exit_code=1)
    store = root / "out/packed/val.sqlite"
    store.write_bytes(store.read_bytes() + b"\0" * 4096)
    assert "val.sqlite" in check("packed", exit_code=1)


def test_overwritten_pages_of_a_store_are_detected(root, check):
    store = root / "out/packed/train.sqlite"
    content = store.read_bytes()
    half = len(content) // 2
    store.write_bytes(content[:half] + bytes(4096) + content[half + 4096 :])
    assert "train: " in check("packed", "--full", exit_code=1)


def prepare_again(root: Path, *options: object, exit_code: int = 0) -> str:
    folders = ("--videos", root / "raw", "--split-dir", root / "split", "--out", root / "out")
    return prepare("hmdb51", *folders, "--size", 32, *options, exit_code=exit_code).stdout


def test_preparing_again_restores_changed_videos_and_stores(root, check):
    before = all_files(root / "out")
    name = change(root, "frames")
    change(root, "packed")
    output = prepare_again(root)
    assert f"changed since it was prepared, and prepared again: {name}" in output
    assert "1 to decode" in output
    assert all_files(root / "out") == before
    change(root, "packed")  # the store alone
    assert "0 to decode" in prepare_again(root)
    assert all_files(root / "out") == before


def test_changed_frames_without_a_raw_video_are_named_and_not_used(root):
    lists = shutil.copytree(root / "out/splits", root / "lists")
    name = change(root, "frames")
    (root / "raw" / f"{name}.avi").unlink()
    output = prepare_again(root, "--lists", lists, exit_code=1)
    assert f"broken: {name}: its frames have changed" in output
    assert f"missing: {name}" not in output
    assert name not in (root / "out/splits/vallist03.txt").read_text()


def test_a_report_without_checksums_is_valid_except_with_full(root, check):
    path = root / "out/report.json"
    saved = json.loads(path.read_text())
    assert saved["sha256"] == report_sha256(saved["report"])
    del saved["checksums"]
    path.write_text(json.dumps(saved))
    change(root, "frames")
    output = check("frames")
    assert f"report sha256 {saved['sha256']}" in output
    assert "no checksums in report.json" in output
    assert "no checksums in report.json" in check("frames", "--full", exit_code=1)


def test_edited_checksums_are_detected(root, check):
    path = root / "out/report.json"
    saved = json.loads(path.read_text())
    saved["checksums"]["videos"].popitem()
    path.write_text(json.dumps(saved))
    assert "checksums of report.json were edited" in check("packed", exit_code=1)
    saved["checksums"] = 1
    path.write_text(json.dumps(saved))
    assert "checksums of report.json were edited" in check("packed", exit_code=1)


def test_the_report_hash_does_not_depend_on_frame_bytes(root):
    """Another release of the JPEG encoder may write other bytes; the data is the same."""
    before = json.loads((root / "out/report.json").read_text())
    change(root, "frames")
    (root / "out/report.json").unlink()  # so that the changed frame is what was prepared
    prepare_again(root)
    after = json.loads((root / "out/report.json").read_text())
    assert before["sha256"] == after["sha256"]
    assert before["checksums"]["sha256"] != after["checksums"]["sha256"]


def test_the_same_bytes_in_other_frames_have_another_checksum(tmp_path):
    found = []
    for name, frames in (("one", (b"ab", b"c")), ("other", (b"a", b"bc"))):
        (tmp_path / name).mkdir()
        for number, content in enumerate(frames, start=1):
            (tmp_path / name / f"{number:08d}.jpg").write_bytes(content)
        found.append(checksum(tmp_path / name))
    assert found[0] != found[1]
    assert [size_of(one) for one in found] == [3, 3]
