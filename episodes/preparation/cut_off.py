"""Finds videos that are shorter than their header announces, as after an interrupted download."""

import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

import av

from episodes.limits import MAX_FRAMES
from episodes.video import data_packets, open_video
from episodes.video_files import is_webp_animation


def share_present(path: Path) -> float:
    """Returns the share of the announced frames that a video file contains, in [0, 1]; decodes nothing.

    This is the larger of the shares of frames and of time, since either can be too low in an intact file (an edit list
    hides frames, AVI omits repeated ones). It is 1 for a folder of images, and if the header has no length (MPEG
    program streams, fragmented MP4).

    Raises:
        UserError: the video is missing or unreadable.
    """
    if os.path.isdir(path) or is_webp_animation(path):
        return 1.0
    with open_video(path) as (container, stream):
        packets = list(islice(data_packets(container, stream), MAX_FRAMES))
        shares = []
        if stream.frames:
            shares.append(len(packets) / stream.frames)
        if (announced := _announced_seconds(container, stream)) > 0:
            shares.append(_end_in_seconds(stream, packets) / announced)
    return max(0.0, min(1.0, max(shares, default=1.0)))


def _announced_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns the length of the video stream in its header; 0 where FFmpeg would estimate it from the file size."""
    formats = container.format.name.split(",")
    if "avi" in formats and stream.average_rate:
        return float(stream.frames / stream.average_rate)
    if "mp4" in formats and stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if "matroska" in formats:
        return _seconds(stream.metadata.get("DURATION", ""))
    return 0.0


def _seconds(written: str) -> float:
    """Returns the seconds of "00:00:02.400000000", 0 for any other form."""
    try:
        hours, minutes, seconds = written.split(":")
        return timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds)).total_seconds()
    except (ValueError, OverflowError):
        return 0.0


def _end_in_seconds(stream: av.VideoStream, packets: Sequence[av.Packet]) -> float:
    """Returns the time at which the last packet ends; all of these containers begin at 0."""
    ends = [max(times) + (packet.duration or 0) for packet in packets if (times := _times(packet))]
    return float(max(ends, default=0) * (stream.time_base or 0))


def _times(packet: av.Packet) -> list[int]:
    return [time for time in (packet.pts, packet.dts) if time is not None]
