"""Recognises video files: containers by suffix; animations and files without a suffix by content."""

import os
from functools import partial
from pathlib import Path

from PIL import Image

CONTAINER_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mp4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".xvid",
    ".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".m2p", ".vob", ".vro", ".ts", ".mts", ".m2ts", ".m2t", ".tp",
    ".trp", ".wmv", ".asf", ".wm", ".flv", ".ogv", ".ogg", ".ogm", ".h264", ".264", ".avc", ".hevc", ".h265", ".265",
})  # fmt: skip
ANIMATION_SUFFIXES = frozenset({".gif", ".apng", ".png", ".webp"})  # or still images
VIDEO_SUFFIXES = CONTAINER_SUFFIXES | ANIMATION_SUFFIXES  # not part of the name of a video

FIRST_BYTES = 1024  # enough to recognise the kind of a file
PACKET = 188  # bytes of an MPEG transport stream; M2TS files have four more before each packet
# The first bytes of each kind of file. RealMedia, MXF, IVF, Y4M, WTV, DV and Flash are recognised but not supported.
BEGINNINGS = (
    b"\x1aE\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    b"\0\0\0\x01\x67", b"\0\0\0\x01\x27", b"\0\0\0\x01\x09", b"\0\0\0\x01\x40", b"\0\0\0\x01\x46", b"GIF8",
    b".RMF", b"\x06\x0e\x2b\x34", b"DKIF", b"YUV4MPEG2", b"\xb7\xd8\x00\x20\x37\x49\xda\x11", b"\x1f\x07\0", b"FWS",
    b"CWS",
)  # fmt: skip
SOUND_AND_IMAGE_BRANDS = (b"M4A", b"M4B", b"avif", b"heic", b"heix", b"mif1", b"crx ")  # of ISO files such as MP4


def is_video_file(path: str) -> bool:
    """Returns whether a file is a supported video; a file that cannot be opened is judged by its suffix."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in ANIMATION_SUFFIXES:
        return is_animation(path, damaged=suffix != ".png")
    return suffix in CONTAINER_SUFFIXES or (suffix == "" and looks_like_video(path))


def is_animation(path: str, damaged: bool = False) -> bool:
    """Returns whether a GIF, PNG or WebP file contains several pictures; returns `damaged` if it cannot be opened."""
    if not os.path.isfile(path):  # opening a pipe would block
        return damaged
    try:
        with Image.open(path, formats=("GIF", "PNG", "WEBP")) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # Pillow raises many kinds of errors for damaged bytes; reading the file reports them
        return damaged


def looks_like_video(path: str) -> bool:
    """Returns whether the first bytes of a file are those of a video, regardless of its name."""
    content = _first_bytes(path)
    if content[4:8] == b"ftyp":
        return not content[8:].startswith(SOUND_AND_IMAGE_BRANDS)
    if content[:4] == b"OggS":
        return b"theora" in content or b"OVP80" in content
    is_quicktime = content[4:8] in (b"moov", b"mdat", b"wide", b"pnot")
    is_riff_video = content[:4] == b"RIFF" and (content[8:12] == b"AVI " or _is_animated_webp(content))
    is_transport_stream = any(map(partial(_has_sync_bytes, content), (0, 4)))
    return content.startswith(BEGINNINGS) or is_quicktime or is_riff_video or is_transport_stream


def is_webp_animation(path: str | Path) -> bool:
    """Returns whether a file is a WebP animation, regardless of its name."""
    return _is_animated_webp(_first_bytes(path))


def _first_bytes(path: str | Path) -> bytes:
    """Returns the beginning of a regular file, b"" for anything else: a pipe would block."""
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read(FIRST_BYTES)
    except OSError:
        return b""


def _is_animated_webp(content: bytes) -> bool:
    """Returns whether the first bytes of a file are those of a WebP animation."""
    is_extended_webp = content[:4] == b"RIFF" and content[8:16] == b"WEBPVP8X"
    return is_extended_webp and len(content) > 20 and bool(content[20] & 2)


def _has_sync_bytes(content: bytes, before: int) -> bool:
    """Returns whether three packets follow one another, each after `before` other bytes."""
    starts = range(before, len(content), before + PACKET)[:3]
    return len(starts) == 3 and all(content[start] == 0x47 for start in starts)
