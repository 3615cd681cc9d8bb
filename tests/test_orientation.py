"""A video is shown as its header requires: rotated, mirrored or tilted, by both readers as by the ffmpeg command."""

import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from episodes import video
from tests.helpers.videos import choose_spread, read_all

# Entries a, b, c, d of a display matrix, and the picture that ffmpeg shows for them.
RIGHT_ANGLES = {
    "mirrored left to right": ((-1, 0, 0, 1), lambda pixels: np.fliplr(pixels)),
    "mirrored top to bottom": ((1, 0, 0, -1), lambda pixels: np.flipud(pixels)),
    "half turn": ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
    "clockwise": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, 3)),
    "counter-clockwise": ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
    "clockwise and mirrored": ((0, 1, 1, 0), lambda pixels: np.fliplr(np.rot90(pixels, 3))),
    "counter-clockwise and mirrored": ((0, -1, -1, 0), lambda pixels: np.fliplr(np.rot90(pixels, 1))),
    "enlarged": ((2, 0, 0, 2), lambda pixels: pixels),
    "without area": ((0, 0, 0, 0), lambda pixels: pixels),
}


def render_corners(path: Path, num_frames: int = 6, ratio: Fraction | None = None) -> Path:
    """Writes a video whose four quarters differ in colour, so that no two orientations look alike."""
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = (220, 40, 40), (40, 200, 40), (40, 40, 220)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "2"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Puts the entries a, b, c, d of a display matrix into the header of an mp4 file."""
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 44  # where the track header holds its matrix, nine 32-bit numbers
    a, b, c, d = (round(value * 2**16) for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("name", RIGHT_ANGLES)
def test_every_right_angle_and_mirroring_is_applied(
    tmp_path: Path, name: str, decord_uses: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, shown = RIGHT_ANGLES[name]
    path = render_corners(tmp_path / "video.mp4")
    stored = read_all(path)
    assert decord_uses == [True]
    write_matrix(path, matrix)
    by_preference = read_all(path)
    np.testing.assert_array_equal(by_preference, np.stack([shown(frame) for frame in stored]))
    monkeypatch.setattr(video, "_decord", lambda: None)
    np.testing.assert_array_equal(read_all(path), by_preference)
    np.testing.assert_array_equal(video.read_frames(path, choose_spread), by_preference[choose_spread(6)])


@pytest.mark.parametrize("degrees", [1, 2, 45, 89, 200, 359])
def test_another_angle_rotates_within_the_frame(tmp_path: Path, degrees: int) -> None:
    path = render_corners(tmp_path / "video.mp4", num_frames=1)
    (stored,) = read_all(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        tilt = graph.add("rotate", f"{degrees}*PI/180" if degrees > 1 else "0")
        graph.link_nodes(graph.add_buffer(template=stream), tilt, graph.add("buffersink")).configure()
        graph.vpush(next(container.decode(stream)))
        expected = graph.vpull().to_ndarray(format="rgb24")
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    write_matrix(path, (cosine, sine, -sine, cosine))
    (frame,) = read_all(path)
    np.testing.assert_array_equal(frame, expected)
    assert np.array_equal(frame, stored) == (degrees == 1)


def test_a_matrix_in_the_stream_is_applied(tmp_path: Path, decord_uses: list[bool]) -> None:
    plain = render_corners(tmp_path / "plain.mp4")
    path = tmp_path / "turned.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        turn = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
        for packet in source.demux(video=0):
            for turned in turn.filter(packet if packet.size else None):
                turned.stream = stream
                target.mux(turned)
    frames = read_all(path)
    assert frames.shape[1:] == (96, 64, 3)
    np.testing.assert_array_equal(frames, np.rot90(read_all(plain), 1, axes=(1, 2)))


def test_nonsquare_pixels_are_not_rescaled(tmp_path: Path, decord_uses: list[bool]) -> None:
    """The released data was made with ffmpeg's `scale`, which knows pixels only; see docs/data.md."""
    path = render_corners(tmp_path / "wide.mp4", ratio=Fraction(16, 9))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 9)
    assert read_all(path).shape == (6, 64, 96, 3)
