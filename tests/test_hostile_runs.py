"""A run whose data breaks ends with one sentence and exit code 2; a crash of one decoder does not end it."""

import shutil
import struct
import threading
import time
from pathlib import Path

import pytest

from episodes import decoding
from tests.helpers.commands import SMALL, main_command
from tests.helpers.tiny_dataset import TinyDataset


def overrides(data: TinyDataset, videos: Path, directory: Path, workers: int) -> list[str]:
    return [
        *SMALL, "DATA.DATASET=tiny", f"DATA.DATA_DIR={videos}", f"DATA.SPLIT_DIR={data.splits}",
        f"CHECKPOINT.CHECKPOINT_DIR={directory}", f"DATA.NUM_WORKERS={workers}",
    ]  # fmt: skip


@pytest.mark.parametrize(("workers", "form"), [(0, "videos"), (1, "frames")])
def test_data_that_vanishes_during_a_run_is_reported_in_one_sentence(
    tiny_dataset: TinyDataset, tmp_path: Path, workers: int, form: str
) -> None:
    videos, directory = tmp_path / "data", tmp_path / "run"
    shutil.copytree(getattr(tiny_dataset, form), videos)

    def remove_videos() -> None:
        while not (directory / "checkpoint_last.pt").exists():  # written when training starts
            time.sleep(0.01)
        videos.rename(tmp_path / "gone")

    remover = threading.Thread(target=remove_videos, daemon=True)
    remover.start()
    long = ("DEBUG=false", "TRAIN.TRAIN_EPISODES=100000", "TRAIN.VAL_FREQ=0", "TRAIN.TASKS_PER_BATCH=1")
    arguments = [*overrides(tiny_dataset, videos, directory, workers), *long]
    finished = main_command("configs/clipspm/demo.yaml", *arguments)
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert str(videos) in line
    assert (directory / "checkpoint_last.pt").exists()


def test_a_video_that_aborts_decord_does_not_end_a_run(
    tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("decord")
    videos, uses = tmp_path / "data", tmp_path / "uses"
    use_decord = f"video._decord_is_faster = lambda *_: open({str(uses)!r}, 'a').write('.')"  # also for short videos
    imports = "from episodes.decoding import serve"
    monkeypatch.setattr(
        decoding, "HELPER", decoding.HELPER.replace(imports, f"{imports}; from episodes import video; {use_decord}")
    )
    shutil.copytree(tiny_dataset.videos, videos)
    for path in videos.glob("*_0/*_00.mp4"):  # two decoder processes for each
        content = bytearray(path.read_bytes())
        table = content.index(b"stts") + 12
        content[table : table + 4] = struct.pack(">I", 0x7FFFFFFF)
        path.write_bytes(content)
    finished = main_command("configs/clipspm/demo.yaml", *overrides(tiny_dataset, videos, tmp_path / "run", 1))
    assert finished.returncode == 0, finished.stderr
    assert uses.exists()
