"""Reads frames of one video: a video file, a folder of images, or a video in a packed store.

A video's frames are those that decode, in the order in which they are shown, turned according to its header. PyAV's
full decode defines them; decord, if installed, reads the files for which it is both exact and faster.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import ModuleType

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from episodes.images import (
    list_images,
    probe_webp,
    read_frame_folder,
    read_image,
    read_webp,
    sizes_differ,
    stack_frames,
    wanted_indices,
)
from episodes.limits import LARGEST_FILE, LARGEST_FRAME, MAX_FRAMES, check_file, check_frame_count, check_frame_size
from episodes.packed import in_packed, probe_packed, read_packed
from episodes.video_files import is_webp_animation
from episodes.video_pixels import PLAIN_PIXELS, display_matrix, to_rgb
from utils.errors import UserError
from videotransforms.volume_transforms import FrameChooser

# Codecs for which decord seeks to the right frame. It is off by some frames in AVI, MPEG-1, MPEG-2 and MPEG-4 part 2
# streams with reordered frames, and loses the first group of pictures in MPEG program streams.
DECORD_CONTAINERS = frozenset({"mp4", "webm"})  # the families: mov and mp4, Matroska and WebM
DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})

# The containers of the usual data sets. Others are rejected, among them playlists, which make FFmpeg open other
# files and addresses.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,m4v,h264,hevc,gif,apng"
OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(LARGEST_FRAME)}
SCHEME = "file:"  # before a path, so that a folder's name with a colon is not read as another scheme

# Decoders print damage to standard error; serious damage raises an exception anyway.
av.logging.set_level(av.logging.PANIC)


def read_frames(path: Path, choose: FrameChooser, use_decord: bool = True) -> np.ndarray:
    """Reads the chosen frames of a video.

    Args:
        path: a video file or an animation (GIF, APNG, WebP), a folder of images, or `<packed store>/<class>/<video>`.
        choose: maps the number of frames of the video to the wanted indices, in any order, repeats allowed. Called
            again with the true number for a damaged file whose packets announce another number of frames.
        use_decord: whether decord may read the files for which it is exact and faster.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        UserError: the video is missing or unreadable, or its frames differ in size.
        IndexError: `choose` returns a frame that does not exist.
    """
    path = Path(path)
    if packed := in_packed(path):
        return read_packed(*packed, choose)
    if os.path.isdir(path):
        return read_frame_folder(path, choose)
    if is_webp_animation(path):
        return read_webp(path, choose)
    with open_video(path) as (container, stream):
        packets = _read_packets(container, stream)
        count = sum(not packet.is_discard for packet in packets)
        if count == 0:
            raise _no_frames(path)
        indices = wanted_indices(choose, count, path)
        if not (use_decord and _decord_is_exact(container, stream, packets) and _decord_is_faster(packets, indices)):
            return _read_with_pyav(path, stream, packets, count, indices, choose)
        needs_rotation = _has_display_matrix(stream, packets)
    if not needs_rotation and (frames := _read_with_decord(path, count, indices)) is not None:
        return frames
    with open_video(path) as (container, stream):  # a fresh decoder
        return _read_with_pyav(path, stream, _read_packets(container, stream), count, indices, choose)


def probe(path: Path, enough: int = 1) -> int:
    """Checks cheaply that a video is readable: opens it and decodes its first frame.

    Returns:
        its number of frames; for a video file the number in its header or, without one, that of its packets, counted
        up to `enough`.

    Raises:
        UserError: the video is missing or unreadable.
    """
    path = Path(path)
    if packed := in_packed(path):
        return probe_packed(*packed)
    if os.path.isdir(path):
        images = list_images(path)
        read_image(images[0])
        return len(images)
    if is_webp_animation(path):
        return probe_webp(path)
    with open_video(path) as (container, stream):
        packets = data_packets(container, stream)
        beginning = list(islice(packets, enough))
        if next(_decode(stream, chain(beginning, packets)), None) is None:
            raise _no_frames(path)
        return stream.frames or sum(not packet.is_discard for packet in beginning)


def _no_frames(path: Path) -> UserError:
    """Returns the error for a file without a decodable frame."""
    return UserError(f"No frame of the video file {path} can be decoded: download or convert it again, or remove it.")


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video file with PyAV and closes it afterwards.

    Yields:
        the container and its video stream, which decodes on the calling thread.

    Raises:
        UserError: the file is missing, empty, not a video, or has no video stream.
    """
    try:
        if check_file(path, LARGEST_FILE) == 0:
            raise UserError(f"The video file {path} is empty: download it again, or remove it.")
        container = av.open(f"{SCHEME}{path}", metadata_errors="ignore", options=OPEN_OPTIONS)
    except FileNotFoundError as error:
        raise UserError(f"There is no video {path}: check the data folder and the video list.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Cannot open {path} as a video ({reason}): check the file, download it again, or remove it."
        ) from error
    with container:
        stream = _moving_pictures(container)
        if stream is None:
            raise UserError(f"The file {path} contains no video stream: download it again, or remove it.")
        if stream.codec_context is None:
            raise UserError(f"The video file {path} has an unknown codec: convert it, for example to H.264.")
        check_frame_size(path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(LARGEST_FRAME)}  # the size may change within the stream
        # The loader's workers decode videos in parallel; threads within one video would only add their start-up time.
        stream.thread_type = "NONE"
        stream.thread_count = 1
        yield container, stream


def _moving_pictures(container: av.container.InputContainer) -> av.VideoStream | None:
    """Returns the video stream that a player shows; a picture attached to a sound file, such as a cover, is not one."""
    attached = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), next(iter(streams), None))


def data_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the stream's packets with data, up to the end of the file or the place where it is cut off."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError):
        return


def _read_packets(container: av.container.InputContainer, stream: av.VideoStream) -> list[av.Packet]:
    """Reads all compressed packets of the stream.

    This is cheap compared with decoding. An intact file has as many packets as frames, a number that is missing or
    wrong in many headers.

    Raises:
        UserError: there are too many.
    """
    packets = list(islice(data_packets(container, stream), MAX_FRAMES + 1))
    check_frame_count(container.name.removeprefix(SCHEME), len(packets))
    return packets


def _decode(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """Yields the frames that decode, in the order in which they are shown."""
    decoder = stream.codec_context
    for packet in packets:
        try:
            yield from decoder.decode(packet)
        except (av.FFmpegError, OSError):
            continue  # as players do; the next frames may be intact
    try:
        yield from decoder.decode(None)  # frames still buffered in the decoder
    except (av.FFmpegError, OSError):
        return


def _read_with_pyav(
    path: Path,
    stream: av.VideoStream,
    packets: list[av.Packet],
    count: int,
    indices: list[int],
    choose: FrameChooser,
) -> np.ndarray:
    """Decodes the whole video and keeps the frames at `indices`: uint8 [T, H, W, 3].

    If the number of decoded frames is not `count`, `choose` is called again and the video decoded again.
    """
    frames, decoded = _decode_chosen(path, stream, packets, set(indices))
    if decoded == 0:
        raise _no_frames(path)
    if decoded != count:
        indices = wanted_indices(choose, decoded, path)
        # Opened again: flushing does not reset a decoder after damage.
        with open_video(path) as (container, stream):
            frames, again = _decode_chosen(path, stream, _read_packets(container, stream), set(indices))
        if again != decoded:
            raise _no_frames(path)
    return stack_frames(frames, indices, path)


def _decode_chosen(
    path: Path, stream: av.VideoStream, packets: list[av.Packet], wanted: set[int]
) -> tuple[dict[int, np.ndarray], int]:
    """Decodes all packets; returns the wanted frames by index, uint8 [H, W, 3] each, and the number of all frames.

    Raises:
        UserError: the size of the frames changes, even if not among the wanted ones.
    """
    frames, decoded = {}, 0
    for convert in _shown(path, stream, packets):
        if decoded in wanted:
            frames[decoded] = convert()
        decoded += 1
    return frames, decoded


def shown_frames(path: Path) -> Iterator[Callable[[], np.ndarray]]:
    """Yields for each frame of a video file, as they are shown, a function that converts it to uint8 [H, W, 3]."""
    with open_video(path) as (container, stream):
        yield from _shown(path, stream, data_packets(container, stream))


def _shown(path: Path, stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[Callable[[], np.ndarray]]:
    """Yields a function for each frame that decodes; converting all of them would take longer than decoding.

    Raises:
        UserError: the size of the frames changes.
    """
    reformatter = VideoReformatter()  # setting one up takes longer than converting a small frame
    first_size = matrix = None
    for frame in _decode(stream, packets):
        size = (frame.height, frame.width)
        first_size = first_size or size
        if size != first_size:
            raise sizes_differ(path, first_size, size)
        own_matrix = display_matrix(frame)
        matrix = matrix if own_matrix is None else own_matrix  # in some streams only key frames have it
        yield functools.partial(to_rgb, path, frame, matrix, reformatter)


def _decord_is_exact(container: av.container.InputContainer, stream: av.VideoStream, packets: list[av.Packet]) -> bool:
    """Returns whether decord gives the same frames as a full decode.

    It fails on some containers and codecs. It may also choose another one of several video streams, count frames that
    an edit list hides (in videos cut without re-encoding), or repeat the last frame if the first packets do not decode.
    A rolling refresh (x264's intra-refresh, for live streams), whose key packets contain partial pictures, is not
    detected.
    """
    return (
        len(container.streams.video) == 1
        and not DECORD_CONTAINERS.isdisjoint(container.format.name.split(","))
        and stream.codec_context.name in DECORD_CODECS
        and stream.codec_context.pix_fmt in PLAIN_PIXELS
        and packets[0].is_keyframe
        and not any(packet.is_discard or packet.is_corrupt for packet in packets)
    )


def _decord_is_faster(packets: list[av.Packet], indices: list[int]) -> bool:
    """Returns whether decord can skip groups of pictures; otherwise it must decode as much as PyAV."""
    return sum(packet.is_keyframe for packet in packets) > len(set(indices))


def _has_display_matrix(stream: av.VideoStream, packets: list[av.Packet]) -> bool:
    """Decodes the first frame and returns whether it is shown turned or mirrored.

    decord follows other rules: it ignores mirroring, and a display matrix in the stream itself.
    """
    first = next(_decode(stream, packets), None)
    return first is not None and display_matrix(first) is not None


@functools.cache
def _decord() -> ModuleType | None:
    """Imports decord; returns None if it cannot be imported (some platforms have no wheel).

    Call it only after torch is loaded, or in a process without torch, such as the helper of `episodes.decoding`: if
    torch is loaded later, the bundled libraries of the two may clash and crash the process.
    """
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _read_with_decord(path: Path, count: int, indices: list[int]) -> np.ndarray | None:
    """Reads the frames at `indices` with decord: uint8 [T, H, W, 3].

    Returns None if decord is missing, fails, or finds another number of frames than `count`. It fails on AV1, and on
    a few widths of small frames (72 pixels), whose rows it pads.
    """
    decord = _decord()
    if decord is None:
        return None
    try:
        # Opened for each read, since a reader does not survive a fork.
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != count:
            return None
        return reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, OSError, IndexError):
        return None
