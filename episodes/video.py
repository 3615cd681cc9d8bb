"""Frames of one video, from a video file or from a folder of images.

A video's frames are those that decode, in the order in which they are shown, turned as its header asks. PyAV's
full decode defines them; decord, where it is installed, reads the files for which it is both exact and faster.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from utils.errors import UserError
from videotransforms.volume_transforms import FrameChooser

VIDEO_SUFFIXES = frozenset({".avi", ".mp4", ".webm", ".mkv", ".mpg", ".mpeg", ".mov"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})

# Where decord's jumps end on the right frame. It is off in AVI, MPEG-1, MPEG-2 and MPEG-4 part 2 streams with
# reordered frames (by some frames), and in MPEG program streams (it loses the first group of pictures).
DECORD_CONTAINERS = frozenset({"mp4", "webm"})  # the families: mov and mp4, Matroska and WebM
DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})

# Decoders report damage on standard error, line by line; what matters of it comes back as an exception.
av.logging.set_level(av.logging.PANIC)


def read_frames(path: Path, choose: FrameChooser) -> np.ndarray:
    """Read the chosen frames of a video file, or of a folder of images.

    Args:
        path: the file or folder.
        choose: gets the number of frames of the video, and returns the indices of the wanted ones in any
            order, also several times the same. Called a second time, with the true number, for a damaged file
            that holds another number of frames than its packets promise.

    Returns uint8 [T, H, W, 3], RGB. Raises UserError when the video is missing or unreadable or when its
    frames differ in size, IndexError when `choose` asks for a frame that does not exist.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_images(path, choose)
    with _open_video(path) as (container, stream):
        packets = _read_packets(container, stream)
        count = sum(not packet.is_discard for packet in packets)
        if count == 0:
            raise _no_frames(path)
        indices = _wanted(choose, count, path)
        if _decord_is_exact(container, stream, packets) and _decord_is_faster(packets, indices):
            frames = _read_with_decord(path, count, indices)
            if frames is not None:
                return frames
        return _read_with_pyav(path, stream, packets, count, indices, choose)


def count_frames(path: Path) -> int:
    """Count the frames of a video by decoding it, or the images of a folder.

    Raises UserError when the video is missing, unreadable or holds no frame.
    """
    path = Path(path)
    if os.path.isdir(path):
        return len(list_images(path))
    with _open_video(path) as (container, stream):
        count = sum(1 for _ in _decode(stream, _read_packets(container, stream)))
    if count == 0:
        raise _no_frames(path)
    return count


def probe(path: Path) -> int:
    """Check cheaply that a video can be read: open it and decode its first frame.

    Returns the number of frames that the file's header gives, 0 where it gives none; for a folder, the number
    of its images, the first of which is opened. Raises UserError when the video is missing or unreadable.
    """
    path = Path(path)
    if os.path.isdir(path):
        images = list_images(path)
        _read_image(images[0])
        return len(images)
    with _open_video(path) as (container, stream):
        if next(_decode(stream, _packets(container, stream)), None) is None:
            raise _no_frames(path)
        return stream.frames


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg.

    Raises UserError when the folder cannot be listed or holds no image.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"Cannot list the frame folder {folder}: {error.strerror}; check its permissions.") from error
    images = [name for name in names if _is_image_name(name)]
    if not images:
        raise UserError(
            f"The frame folder {folder} holds no image (.jpg, .jpeg or .png): extract its frames again, or "
            "remove the video from the list."
        )
    return [folder / name for name in sorted(images, key=_natural_key)]


def _is_image_name(name: str) -> bool:
    """Tell whether a file name is that of a frame; some systems put hidden companions beside each image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that compares the runs of digits in a name as numbers."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that like is compared with like
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name


def _read_images(folder: Path, choose: FrameChooser) -> np.ndarray:
    """Read the chosen images of a folder, and no others: uint8 [T, H, W, 3]."""
    images = list_images(folder)
    indices = _wanted(choose, len(images), folder)
    frames = {index: _read_image(images[index]) for index in sorted(set(indices))}
    return _stack(frames, indices, folder)


def _read_image(path: Path) -> np.ndarray:
    """Read one image as uint8 [H, W, 3], RGB. Raises UserError when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot read the image {path} ({error}): replace it or extract it again.") from error


def _wanted(choose: FrameChooser, count: int, path: Path) -> list[int]:
    """Return the indices that `choose` wants. Raises IndexError for one that is not below `count`."""
    indices = [int(index) for index in choose(count)]
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise IndexError(f"frames {indices} were chosen of {path}, which has {count}")
    return indices


def _stack(frames: dict[int, np.ndarray], indices: Sequence[int], path: Path) -> np.ndarray:
    """Put the frames into the wanted order, uint8 [T, H, W, 3]. Raises UserError when their sizes differ."""
    first = frames[indices[0]]
    for frame in frames.values():
        if frame.shape != first.shape:
            raise _sizes_differ(path, first.shape[:2], frame.shape[:2])
    return np.stack([frames[index] for index in indices])


def _sizes_differ(path: Path, one: tuple[int, ...], other: tuple[int, ...]) -> UserError:
    """Return the error for a video in which frames of two sizes, each (height, width) in pixels, were found."""
    return UserError(
        f"The frames of {path} differ in size ({one[1]} x {one[0]} and {other[1]} x {other[0]} pixels): convert "
        "the video to one size, or remove it from the list."
    )


def _no_frames(path: Path) -> UserError:
    """Return the error for a file in which nothing decodes."""
    return UserError(
        f"No frame of the video file {path} can be decoded: fetch or convert it again, or remove it from the list."
    )


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file with PyAV, and close it afterwards.

    Yields the container and its video stream, set to decode on the calling thread. Raises UserError when the
    file is missing, empty, not a video, or without a video stream.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"The video file {path} is empty: fetch it again, or remove it from the list.")
        container = av.open(str(path), metadata_errors="ignore")
    except FileNotFoundError as error:
        raise UserError(f"There is no video {path}: check the data folder and the video list.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Cannot open {path} as a video ({reason}): check the file, fetch it again, or remove it from the list."
        ) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise UserError(f"The file {path} holds no video stream: fetch it again, or remove it from the list.")
        if stream.codec_context is None:
            raise UserError(f"The codec of the video file {path} is not known: convert it, for instance to H.264.")
        # The loader's workers decode videos side by side; threads inside one video would only add their start.
        stream.thread_type = "NONE"
        stream.thread_count = 1
        yield container, stream


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the stream's packets with data, up to the end of the file or to where it is cut off."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError):
        return


def _read_packets(container: av.container.InputContainer, stream: av.VideoStream) -> list[av.Packet]:
    """Read all compressed packets of the stream, as many bytes as the file has.

    Cheap beside decoding, and in a sound file their number is that of the frames, which many headers lack or
    get wrong.
    """
    return list(_packets(container, stream))


def _decode(stream: av.VideoStream, packets: Iterator[av.Packet] | list[av.Packet]) -> Iterator[av.VideoFrame]:
    """Yield the frames that decode, in the order in which they are shown."""
    decoder = stream.codec_context
    for packet in packets:
        try:
            yield from decoder.decode(packet)
        except (av.FFmpegError, OSError):
            continue  # as players do; the next frames may be sound
    try:
        yield from decoder.decode(None)  # what the decoder still holds back
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
    """Decode the whole video and keep the frames at `indices`: uint8 [T, H, W, 3].

    When other than `count` frames decode, `choose` is asked again, and the video decoded again.
    """
    frames, decoded = _decode_chosen(path, stream, packets, set(indices))
    if decoded == 0:
        raise _no_frames(path)
    if decoded != count:
        indices = _wanted(choose, decoded, path)
        stream.codec_context.flush_buffers()
        frames, _ = _decode_chosen(path, stream, packets, set(indices))
    return _stack(frames, indices, path)


def _decode_chosen(
    path: Path, stream: av.VideoStream, packets: list[av.Packet], wanted: set[int]
) -> tuple[dict[int, np.ndarray], int]:
    """Decode all packets; return the wanted frames by index, uint8 [H, W, 3] each, and the number of all frames.

    Raises UserError when the size of the frames changes, be it between wanted frames or not.
    """
    reformatter = VideoReformatter()  # setting one up takes longer than converting a small frame
    frames = {}
    first_size = None
    decoded = 0
    for frame in _decode(stream, packets):
        size = (frame.height, frame.width)
        first_size = first_size or size
        if size != first_size:
            raise _sizes_differ(path, first_size, size)
        if decoded in wanted:
            pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            frames[decoded] = np.rot90(pixels, round(frame.rotation / 90))  # both turn counter-clockwise
        decoded += 1
    return frames, decoded


def _decord_is_exact(container: av.container.InputContainer, stream: av.VideoStream, packets: list[av.Packet]) -> bool:
    """Tell whether decord gives the same frames as a full decode.

    Beside the containers and codecs that it gets wrong, it counts frames that an edit list hides (in videos cut
    without encoding them again), and fills up with the last frame when the first packets do not decode. Not told
    apart is a rolling refresh (x264's intra-refresh, for live streams): its key packets hold no whole picture.
    """
    return (
        not DECORD_CONTAINERS.isdisjoint(container.format.name.split(","))
        and stream.codec_context.name in DECORD_CODECS
        and packets[0].is_keyframe
        and not any(packet.is_discard or packet.is_corrupt for packet in packets)
    )


def _decord_is_faster(packets: list[av.Packet], indices: list[int]) -> bool:
    """Tell whether decord has groups of pictures to jump over; else it has to decode as much as PyAV."""
    return sum(packet.is_keyframe for packet in packets) > len(set(indices))


@functools.cache
def _decord() -> ModuleType | None:
    """Import decord, None where it cannot be imported (it has no wheel for some platforms)."""
    # Torch first: the other way round, the libraries which the two bring along may clash and end the process.
    import torch  # noqa: F401

    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _read_with_decord(path: Path, count: int, indices: list[int]) -> np.ndarray | None:
    """Read the frames at `indices` with decord: uint8 [T, H, W, 3].

    Returns None where decord is missing, fails, or finds another number of frames than `count`. It fails on
    AV1, and on a few widths of small frames (72 pixels), whose rows it pads.
    """
    decord = _decord()
    if decord is None:
        return None
    try:
        # Opened by the process that reads: a reader does not survive the fork of a worker.
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != count:
            return None
        return reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, OSError, IndexError):
        return None
