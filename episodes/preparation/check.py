"""A second look at prepared data, in seconds: is it still what its report says, or what the class list expects?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from episodes.packed import PACKED_SUFFIX, packed_videos
from episodes.preparation.report import find_report, report_sha256, table, verdict
from episodes.splits import SplitIndex

DIFFERS = "DIFFERS from the report: prepare the data again"


def check_prepared(indexes: Mapping[str, SplitIndex], data_dir: Path) -> tuple[str, bool]:
    """Compare what is there with the report on it, or, where there is none, with the class list.

    Args:
        indexes: split -> its index, just read from the disk.
        data_dir: folder of the data.

    Returns:
        text for a person, and whether all is well.
    """
    saved = find_report(data_dir)
    # The numbers of an edited report say nothing.
    whole = saved is not None and saved.get("sha256") == report_sha256(saved["report"])
    report = saved["report"] if saved is not None and whole else None
    found = {split: _found(index, report) for split, index in indexes.items()}
    lines = table(found)
    lines += [f"{split}: split sha256 {index.digest()}" for split, index in indexes.items()]
    if saved is None:
        lacking = sum(row["missing"] for part in found.values() for row in part["per_class"])
        lines.append(f"no report.json in {data_dir} or above it: compared with `videos:` of the class list")
        lines.append(verdict(lacking, 0))
        return "\n".join(lines), lacking == 0
    if report is None:
        lines += ["report.json was edited: its hash is not that of its content", DIFFERS]
        return "\n".join(lines), False
    problems = _differences(indexes, data_dir, report)
    lacking, allowed = report["lacking"], saved["allowed_lacking"]
    judged = verdict(lacking, allowed, saved.get("layout", ""))  # reports had none at first
    lines += [f"report sha256 {saved['sha256']}", *problems, DIFFERS if problems else judged]
    return "\n".join(lines), not problems and lacking <= allowed


def _found(index: SplitIndex, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """Expected and found videos by class, as in a report; what a list wanted is known to the saved report alone."""
    rows_before = [] if report is None else report["splits"][index.split]["per_class"]
    expected_before = {row["class"]: row["expected"] for row in rows_before}
    counts = np.bincount(index.class_of_video, minlength=len(index.classes)).tolist()
    rows = []
    for entry, count in zip(index.classes, counts, strict=True):
        expected = expected_before.get(entry.folder, entry.expected_videos)
        lacking = max(0, expected - count)
        rows.append({"class": entry.folder, "expected": expected, "found": count, "missing": lacking, "broken": 0})
    return {"classes": len(rows), "per_class": rows}


def _differences(indexes: Mapping[str, SplitIndex], data_dir: Path, report: Mapping[str, Any]) -> list[str]:
    """A sentence for each way in which the data is not what the report says."""
    problems = []
    for split, index in indexes.items():
        recorded = report["splits"][split]
        if recorded["split_sha256"] != index.digest():
            problems.append(
                f"{split}: {len(index)} videos, {recorded['found']} in the report; videos, classes or prompts differ"
            )
            continue
        stored = _stored_frames(index, data_dir)
        if stored != recorded["stored_frames"]:
            problems.append(f"{split}: {stored} frames are stored, {recorded['stored_frames']} in the report")
    return problems


def _stored_frames(index: SplitIndex, data_dir: Path) -> int:
    """Frames of a split, counted without opening any."""
    store = data_dir / f"{index.split}{PACKED_SUFFIX}"
    if store.is_file():
        return sum(packed_videos(store).values())
    return sum(_images(index.path(video)) for video in range(len(index)))


def _images(folder: Path) -> int:
    """Images with content in a folder; 0 for a file, which is no video that was prepared."""
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(entry.name.endswith(".jpg") and entry.stat().st_size > 0 for entry in entries)
