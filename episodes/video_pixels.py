"""Converts decoded frames of a video to RGB as players show them: with the right colours, turned and mirrored.

The display matrix of a video turns and mirrors it. The rules are those of the ffmpeg command: right angles turn and
mirror whole pixels; any other angle turns the picture inside its rectangle, and the corners become black.
"""

import math
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter

from utils.errors import UserError

# All programs convert these to the same RGB. For others (10-bit video of phones, 4:1:1 of DV) only FFmpeg's filters
# agree with ffmpeg; decord and PyAV's converter are off by up to 90 of 255.
PLAIN_PIXELS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Returns the display matrix of a frame, int32 [9], or None for a frame that is shown as it is stored."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return np.frombuffer(bytes(data), dtype=np.int32, count=9) if isinstance(data, SideData) else None


def to_rgb(path: Path, frame: av.VideoFrame, matrix: np.ndarray | None, reformatter: VideoReformatter) -> np.ndarray:
    """Converts a frame to uint8 [H, W, 3], turned according to its display matrix."""
    if matrix is None:
        return _convert(path, frame, reformatter)
    return _turn(_convert(path, _tilt(frame, matrix), reformatter), matrix)


def _convert(path: Path, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Converts a frame to uint8 [H, W, 3]; raises UserError for an unknown pixel format."""
    try:
        if frame.format.name not in PLAIN_PIXELS:
            return _convert_with_filters(frame)
        return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"The video {path} has an unknown pixel format: convert it, for example to H.264, or remove it from the "
            "list."
        ) from error


def _convert_with_filters(frame: av.VideoFrame) -> np.ndarray:
    """Converts a frame to uint8 [H, W, 3] with FFmpeg's filters."""
    graph = av.filter.Graph()
    stored = graph.add(
        "buffer",
        f"width={frame.width}:height={frame.height}:pix_fmt={frame.format.name}:time_base=1/25:"
        f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
    )
    graph.link_nodes(stored, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull().to_ndarray()


def _turn(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turns and mirrors the pixels of a frame, uint8 [H, W, 3], if its matrix has a right angle.

    Mirroring does not change the angle, only signs in the matrix.
    """
    across, transposed, down = (int(matrix[position]) for position in (0, 3, 4))
    angle = _clockwise(matrix)
    if angle == 90:
        return pixels.transpose(1, 0, 2) if transposed > 0 else np.rot90(pixels, -1)
    if angle == 180:
        pixels = pixels[:, ::-1] if across < 0 else pixels
        return pixels[::-1] if down < 0 else pixels
    if angle == 270:
        return pixels[::-1, ::-1].transpose(1, 0, 2) if transposed < 0 else np.rot90(pixels)
    return pixels[::-1] if angle == 0 and down < 0 else pixels


def _tilt(frame: av.VideoFrame, matrix: np.ndarray) -> av.VideoFrame:
    """Turns the picture of a frame inside its rectangle if its matrix has no right angle."""
    angle = _clockwise(matrix)
    if angle % 90 == 0 or angle == 1:  # ffmpeg leaves out one degree
        return frame
    graph = av.filter.Graph()
    stored = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(stored, graph.add("rotate", f"{angle}*PI/180"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def _clockwise(matrix: np.ndarray) -> int:
    """Returns the angle of a matrix in whole degrees, from 0 to 359; 0 for a matrix that maps to a line."""
    a, b, _, c, d = (float(value) for value in matrix[:5])
    scales = math.hypot(a, c), math.hypot(b, d)
    return 0 if 0 in scales else round(math.degrees(math.atan2(b / scales[1], a / scales[0]))) % 360
