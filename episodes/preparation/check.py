"""Checks prepared data against its report, or against the class list.

The check takes seconds: it compares names, numbers, sizes, and the frames of some videos; with `full`, of all videos.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from episodes.data_report import find_report, report_sha256
from episodes.packed import PACKED_SUFFIX, packed_videos
from episodes.preparation.checksums import changed_videos, evenly_spaced, saved_checksums, size_of
from episodes.preparation.report import MAX_NAMED, table, verdict
from episodes.splits import SplitIndex
from utils.errors import UserError
from utils.jobs import progress

DIFFERS = "DIFFERS from the report: prepare the data again"
NOT_COMPARED = "no checksums in report.json: the frames are not compared; prepare the data again to record them"
QUICK_BYTES = 64 * 2**20  # of frames that are compared in each split without `full`


def check_prepared(indexes: Mapping[str, SplitIndex], data_dir: Path, full: bool = False) -> tuple[str, bool]:
    """Compares the data with its report, or without a report with the class list.

    Args:
        indexes: split -> its index, just read from the disk.
        data_dir: folder of the data.
        full: compare the frames of every video with their checksums, which reads all of the data; otherwise of some.

    Returns:
        the text to print, and whether the data is complete and unchanged.
    """
    saved = find_report(data_dir)
    is_unedited = saved is not None and saved.get("sha256") == report_sha256(saved["report"])
    report = saved["report"] if saved is not None and is_unedited else None
    counts = {split: _counts(index, report) for split, index in indexes.items()}
    lines = table(counts)
    lines += [f"{split}: split sha256 {index.digest()}" for split, index in indexes.items()]
    if saved is None:
        missing = sum(row["missing"] for part in counts.values() for row in part["per_class"])
        lines.append(f"no report.json in {data_dir} or above it: compared with `videos:` of the class list")
        lines += [NOT_COMPARED] if full else []
        lines.append(verdict(missing, 0))
        return "\n".join(lines), missing == 0 and not full
    if report is None:
        lines += ["report.json was edited: its hash does not match its content", DIFFERS]
        return "\n".join(lines), False
    problems = _differences(indexes, data_dir, report)
    changed, notes = _compare_frames(indexes, data_dir, saved, full)
    problems, lines = [*problems, *changed], [*lines, *notes]
    missing = report["missing_videos"] if "missing_videos" in report else report["lacking"]  # its name in older reports
    allowed = saved["allowed_missing"] if "allowed_missing" in saved else saved["allowed_lacking"]
    left_out = saved.get("left_out", {}).get("may_be_videos", 0)  # reports had neither this nor the layout at first
    judged = verdict(missing, allowed, saved.get("layout", ""), left_out)
    lines += [f"report sha256 {saved['sha256']}", *problems, DIFFERS if problems else judged]
    return "\n".join(lines), not problems and missing + left_out <= allowed and not (full and NOT_COMPARED in lines)


def _counts(index: SplitIndex, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """Counts expected and found videos by class, as in a report; the expected numbers come from the saved report."""
    rows_before = [] if report is None else report["splits"][index.split]["per_class"]
    expected_before = {row["class"]: row["expected"] for row in rows_before}
    counts = np.bincount(index.class_of_video, minlength=len(index.classes)).tolist()
    rows = []
    for entry, count in zip(index.classes, counts, strict=True):
        expected = expected_before.get(entry.folder, entry.expected_videos)
        missing = max(0, expected - count)
        rows.append({"class": entry.folder, "expected": expected, "found": count, "missing": missing, "broken": 0})
    return {"classes": len(rows), "per_class": rows}


def _differences(indexes: Mapping[str, SplitIndex], data_dir: Path, report: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each difference between the data and the report."""
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


def _compare_frames(
    indexes: Mapping[str, SplitIndex], data_dir: Path, saved: Mapping[str, Any], full: bool
) -> tuple[list[str], list[str]]:
    """Returns a sentence for each video whose frames have changed, and notes on what was compared."""
    try:
        recorded = saved_checksums(saved)
    except UserError as error:
        return [str(error)], []
    if recorded is None:
        return [], [NOT_COMPARED]
    checksums, store_sizes = recorded
    problems, notes = [], []
    for split, index in indexes.items():
        if index.digest() != saved["report"]["splits"][split]["split_sha256"]:
            continue  # the videos differ, which `_differences` reports
        store = data_dir / f"{split}{PACKED_SUFFIX}"
        if store.is_file() and store.stat().st_size != store_sizes[split]:
            problems.append(f"{store}: {store.stat().st_size} bytes, {store_sizes[split]} in the report")
        chosen = index.video_names if full else evenly_spaced(index.video_names, checksums, QUICK_BYTES)
        changed = _changed(index, chosen, checksums)
        problems += [
            f"{split}: {name}: its frames differ from those that were prepared" for name in changed[:MAX_NAMED]
        ]
        if len(changed) > MAX_NAMED:
            problems.append(f"{split}: ... and {len(changed) - MAX_NAMED} more videos")
        rest = "" if len(chosen) == len(index) else "; --full compares all"
        notes.append(f"{split}: frames of {len(chosen)} of {len(index)} videos compared with their checksums{rest}")
    return problems, notes


def _changed(index: SplitIndex, chosen: Sequence[str], checksums: Mapping[str, str]) -> list[str]:
    """Returns the videos of a split whose frames changed in size, and the chosen ones that changed in any byte."""
    paths = {name: index.path(number) for number, name in enumerate(index.video_names)}
    folders = [name for name, path in paths.items() if path.is_dir()]
    resized = [name for name in folders if sum(_sizes_of_images(paths[name])) != size_of(checksums[name])]
    named = ((name, paths[name]) for name in chosen)
    steps = progress(named, len(chosen), f"comparing {index.split}", "video", in_lines=True)
    return list(dict.fromkeys([*resized, *changed_videos(steps, checksums)]))


def _stored_frames(index: SplitIndex, data_dir: Path) -> int:
    """Returns the number of stored frames of a split; opens no frame."""
    store = data_dir / f"{index.split}{PACKED_SUFFIX}"
    if store.is_file():
        return sum(packed_videos(store).values())
    return sum(_images(index.path(video)) for video in range(len(index)))


def _images(folder: Path) -> int:
    """Returns the number of nonempty images in a folder; 0 for a file."""
    return sum(size > 0 for size in _sizes_of_images(folder))


def _sizes_of_images(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry.stat().st_size for entry in entries if entry.name.endswith(".jpg")]
