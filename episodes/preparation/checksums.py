"""Checksums of prepared videos: one per video over its JPEG files, in a folder or a packed store.

They are stored next to the report, not in it: the report is the same on every machine, while another release of the
JPEG encoder may write other bytes for the same frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from episodes.images import list_images
from episodes.packed import in_packed, packed_jpegs
from utils.errors import UserError


def checksum(video: Path) -> str:
    """Returns "<SHA-256> <bytes>" of the frames of a video.

    Args:
        video: a folder of JPEG files, or `<store>/<class>/<video>`.

    Raises:
        UserError: the frames cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    for jpeg in _jpegs(video):
        digest.update(len(jpeg).to_bytes(8, "little") + jpeg)
        size += len(jpeg)
    return f"{digest.hexdigest()} {size}"


def size_of(recorded: str) -> int:
    """Returns the number of bytes that a checksum covers."""
    return int(recorded.split()[1])


def _jpegs(video: Path) -> Iterator[bytes]:
    stored = in_packed(video)
    if stored is not None:
        yield from packed_jpegs(*stored)
        return
    for file in list_images(video):
        try:
            yield file.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read the frame {file} ({error.strerror}).") from error


def changed_videos(paths: Iterable[tuple[str, Path]], recorded: Mapping[str, str]) -> list[str]:
    """Returns the names of the videos whose frames differ from the recorded ones or are unreadable.

    Args:
        paths: the name `class/video` and the path of each video, see `checksum`.
        recorded: name -> checksum of the prepared video.
    """
    return [name for name, path in paths if _checksum_or_none(path) != recorded[name]]


def _checksum_or_none(path: Path) -> str | None:
    try:
        return checksum(path)
    except UserError:
        return None


def evenly_spaced(names: Sequence[str], recorded: Mapping[str, str], max_bytes: int) -> list[str]:
    """Returns every n-th name, for the smallest n with which the videos have about `max_bytes` or less together."""
    total = sum(size_of(recorded[name]) for name in names)
    return list(names[:: max(1, -(-total // max_bytes))])


# --- in report.json ---------------------------------------------------------------------------------------


def as_saved(checksums: Mapping[str, str], store_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the `checksums` entry of report.json, which `saved_checksums` reads.

    Args:
        checksums: class/video -> checksum.
        store_sizes: split -> bytes of its packed store.
    """
    content = {"store_bytes": dict(store_sizes), "videos": dict(sorted(checksums.items()))}
    return {**content, "sha256": _sha256(content)}


def saved_checksums(saved: Mapping[str, Any] | None) -> tuple[dict[str, str], dict[str, int]] | None:
    """Returns the arguments of `as_saved`; None if there is no report.json, or no checksums in it.

    Raises:
        UserError: they were edited.
    """
    checksums = None if saved is None else saved.get("checksums")
    if checksums is None:
        return None
    content = {**checksums} if isinstance(checksums, dict) else {}
    if content.pop("sha256", None) != _sha256(content):
        raise UserError("the checksums of report.json were edited")
    return content["videos"], content["store_bytes"]


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
