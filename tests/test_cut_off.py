"""Truncated videos are distinguished from complete ones, even if frames are hidden by an edit list."""

import shutil
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from episodes.decoding import call
from episodes.preparation.cut_off import share_present
from episodes.preparation.extract import WHOLE
from tests.helpers.videos import ALL, REAL, render_all
from utils.errors import UserError

SILENT = ("mpeg1.mpg", "mpeg2.mpeg")  # their headers announce nothing


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_all(tmp_path_factory.mktemp("videos"))


def cut(video: Path, folder: Path, share: float = 0.6) -> Path:
    """Writes a truncated copy."""
    content = video.read_bytes()
    (folder / video.name).write_bytes(content[: int(share * len(content))])
    return folder / video.name


def remux(source: Path, target: Path, hidden: int = 0, sound: float = 0, **options: str) -> Path:
    """Writes the same packets in another file, the first frames hidden, with some seconds of silent audio."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        silence = new.add_stream("aac", rate=48000) if sound else None
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts -= hidden * packet.duration
                packet.dts -= hidden * packet.duration
                packet.stream = stream
                new.mux(packet)
        for number in range(int(sound * 50)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, 960 * number
            new.mux(silence.encode(frame))
        if silence:
            new.mux(silence.encode())
    return target


@pytest.mark.parametrize("name", ALL)
def test_a_complete_video_is_reported_as_complete(videos, name):
    assert share_present(videos / name) == 1


@pytest.mark.parametrize("name", sorted(ALL.keys() - SILENT))
def test_an_interrupted_copy_is_reported(videos, tmp_path, name):
    assert 0 < share_present(cut(videos / name, tmp_path)) < WHOLE


@pytest.mark.parametrize("name", SILENT)
def test_a_header_without_length_is_not_reported_as_truncated(videos, tmp_path, name):
    assert share_present(cut(videos / name, tmp_path)) == 1


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4.avi"])
def test_sound_longer_than_the_video_is_not_reported_as_truncated(videos, tmp_path, name):
    source = next(video for video in videos.iterdir() if name.startswith(video.stem))
    assert share_present(remux(source, tmp_path / name, sound=10)) >= 0.95  # AVI's header counts one frame more


def test_frames_hidden_by_an_edit_list_are_not_missing(videos, tmp_path):
    trimmed = remux(videos / "h264.mp4", tmp_path / "trimmed.mp4", hidden=25, avoid_negative_ts="disabled")
    with av.open(str(trimmed)) as container:
        stream = container.streams.video[0]
        assert sum(packet.size > 0 for packet in container.demux(stream)) < 0.6 * stream.frames
    assert share_present(trimmed) == 1


def test_a_folder_of_images_is_complete(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    assert share_present(tmp_path) == 1


def test_the_isolated_check_gives_the_same_answers_and_errors(videos, tmp_path):
    half = cut(videos / "h264.mp4", tmp_path)
    assert call(share_present, half) == share_present(half)
    (tmp_path / "text.mp4").write_text("This is not a video.\n")
    for ask in (share_present, partial(call, share_present)):
        with pytest.raises(UserError, match=r"Cannot open .*text\.mp4"):
            ask(tmp_path / "text.mp4")


@pytest.mark.parametrize("written", ["nan", "00:00:inf", "00:00:1e400", "-1:00:00", "9" * 400 + ":00:00", "00:00"])
def test_an_invalid_length_is_not_reported_as_truncated(tmp_path, videos, written):
    path = shutil.copy(videos / "h264_open_groups.mkv", tmp_path / "odd.mkv")
    content = Path(path).read_bytes()
    (start,) = [i for i in range(len(content)) if content.startswith(b"00:00:02.000000000", i)]
    odd = written.encode().ljust(18, b"\0")[:18]
    Path(path).write_bytes(content[:start] + odd + content[start + 18 :])
    assert share_present(Path(path)) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this clone")
def test_real_clips_are_complete():
    clips = [clip for clip in sorted(REAL.rglob("*")) if clip.suffix in (".mp4", ".avi", ".mpg", ".webm")]
    assert clips
    assert [share_present(clip) for clip in clips] == [1] * len(clips)
