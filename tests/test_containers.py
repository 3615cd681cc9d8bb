"""Which files are videos: any suffix of a container, animations by their content, no cover pictures."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from test_video import NUM_FRAMES, choose_all, numbers, render

from episodes import video
from utils.errors import UserError


def write_with_cover(path: Path, film: Path | None) -> Path:
    """Write a file with a sound, an attached picture and, behind them, the video stream of another file."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 200, 160, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(np.zeros((160, 200, 3), np.uint8), format="rgb24")
        packets = [*sound.encode(silence), *sound.encode(), *cover.encode(picture)]
        if film is not None:
            with av.open(str(film)) as source:
                stream = container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packets.append(packet)
        for packet in packets:
            container.mux(packet)
    return path


@pytest.mark.parametrize("read", [video.probe, lambda path: video.read_frames(path, choose_all)])
def test_a_sound_file_with_a_cover_has_no_video(tmp_path: Path, read) -> None:
    path = write_with_cover(tmp_path / "song.mp4", None)
    with pytest.raises(UserError, match="no video stream") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_video_with_a_cover_is_read_without_it(tmp_path: Path) -> None:
    film = render(tmp_path / "film.mp4", "libx264", {"g": "2"}, (72, 96))
    path = write_with_cover(tmp_path / "covered.mp4", film)
    assert numbers(path, choose_all) == list(range(NUM_FRAMES))
    assert video.probe(path) == NUM_FRAMES
