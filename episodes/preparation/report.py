"""Writes the report on a prepared data set: expected, found, missing and broken videos, and one hash of them.

`episodes.data_report` reads it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from episodes.data_report import FORMAT, REPORT, report_sha256
from episodes.preparation.extract import Record
from episodes.preparation.plan import CUSTOM, Plan, WantedVideo
from episodes.preparation.raw_layouts import LeftOut
from episodes.preparation.settings import SPLIT_LISTS, FrameSettings
from episodes.preparation.several_files import choices
from episodes.search import SPLITS
from episodes.splits import CLASS_FILE, ClassList, SplitIndex
from utils.errors import counted
from utils.files import write_atomically
from utils.yaml_text import printable

TEXT = "report.txt"
MAX_NAMED = 20  # missing, broken or cut off videos named in the text; the JSON file has all

# Only for custom data: the numbers of a benchmark are fixed.
EXPECT_FEWER = (
    f"; to expect fewer, lower `videos:` of their classes in {SPLIT_LISTS}/{CLASS_FILE}, remove them from --lists if "
    "it is given, and prepare again"
)


def split_index(class_list: ClassList, split: str, root: Path, names: Sequence[str]) -> SplitIndex:
    """Returns the index of a split's prepared videos, for its digest; `names` are `class/video`, in order."""
    position = {entry.folder: number for number, entry in enumerate(class_list.classes[split])}
    return SplitIndex(
        dataset=class_list.dataset,
        split=split,
        root=root,
        classes=tuple(class_list.classes[split]),
        video_names=tuple(names),
        video_paths=tuple(names),
        class_of_video=np.array([position[name.split("/")[0]] for name in names], dtype=np.int64),
        horizontal_flip=class_list.horizontal_flip,
    )


def make_report(
    plan: Plan, settings: FrameSettings, records: Mapping[str, Record], broken: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the content of the report: plain values, the same for the same data on every machine.

    Args:
        plan: the requested videos.
        settings: settings of the frames.
        records: class/video -> record of its frames, for the prepared videos.
        broken: class/video -> why it could not be extracted.
    """
    splits = {split: _split_report(plan, split, records, broken) for split in SPLITS}
    return {
        "format": FORMAT,
        "dataset": plan.class_list.dataset,
        "variant": plan.variant,
        "frames": {"name": settings.name, **asdict(settings)},
        "missing_videos": sum(part["missing_videos"] for part in splits.values()),
        "notes": list(plan.notes),
        "splits": splits,
    }


def _split_report(plan: Plan, split: str, records: Mapping[str, Record], broken: Mapping[str, str]) -> dict[str, Any]:
    videos = [video for video in plan.videos if video.split == split]
    prepared = [video.full_name for video in videos if video.full_name in records]
    missing = [v for v in videos if v.source is None and v.full_name not in records and v.full_name not in broken]
    classes = [
        _class_report(entry.folder, plan.expected[split, entry.folder], videos, records, broken)
        for entry in plan.class_list.classes[split]
    ]
    several = choices(videos, records)
    return {
        "classes": len(classes),
        "expected": sum(row["expected"] for row in classes),
        "found": len(prepared),
        "missing_videos": sum(max(0, row["expected"] - row["found"]) for row in classes),
        "split_sha256": split_index(plan.class_list, split, Path(), prepared).digest(),
        "stored_frames": sum(records[name].kept for name in prepared),
        "frames_of_the_videos": distribution([records[name].frames for name in prepared]),
        "missing": [{"video": video.full_name, "reason": video.reason} for video in missing],
        "broken": [
            {"video": video.full_name, "reason": broken[video.full_name]}
            for video in videos
            if video.full_name in broken
        ],
        "cut off": [
            {"video": name, "reason": f"ends at {records[name].percent} % of the length in its header; used as is"}
            for name in prepared
            if records[name].percent < 100
        ],
        "per_class": classes,
        **({"several files": several} if several else {}),
    }


def _class_report(
    folder: str,
    expected: int,
    videos: Sequence[WantedVideo],
    records: Mapping[str, Record],
    broken: Mapping[str, str],
) -> dict[str, Any]:
    names = [video.full_name for video in videos if video.folder == folder]
    found, damaged = sum(name in records for name in names), sum(name in broken for name in names)
    return {
        "class": folder,
        "expected": expected,
        "found": found,
        "missing": max(0, expected - found - damaged),
        "broken": damaged,
    }


def distribution(counts: Sequence[int]) -> dict[str, int] | None:
    """Returns minimum, maximum and the 5th, 50th and 95th percentile; None if there are no numbers."""
    if not counts:
        return None
    low, middle, high = (int(value) for value in np.percentile(counts, [5, 50, 95], method="lower"))
    return {"min": min(counts), "5%": low, "median": middle, "95%": high, "max": max(counts)}


def save_report(
    out: Path,
    content: dict[str, Any],
    allowed: int,
    layout: str,
    checksums: dict[str, Any],
    left_out: Sequence[LeftOut] = (),
) -> str:
    """Writes report.json and report.txt into the output folder; returns the text.

    Args:
        out: the folder.
        content: from `make_report`.
        allowed: number of videos that may be missing.
        layout: layout of the plan, for the command in messages; not part of the content.
        checksums: checksums of the stored frames, from `as_saved`.
        left_out: files that are not read; not part of the content, as they do not affect results.
    """
    may_be_videos = sum(file.may_be_video for file in left_out)
    versions = {"python": platform.python_version(), "av": version("av"), "pillow": version("pillow")}
    saved = {
        "sha256": report_sha256(content),
        "allowed_missing": allowed,
        "layout": layout,
        "made_with": versions,
        "report": content,
        "checksums": checksums,
        "left_out": {
            "files": len(left_out),
            "may_be_videos": may_be_videos,
            "named": [{"video": f.name, "reason": f.reason, "may_be_video": f.may_be_video} for f in left_out],
        },
    }
    text = as_text(content, allowed, layout, left_out)
    write_atomically(out / REPORT, (json.dumps(saved, indent=1) + "\n").encode())
    write_atomically(out / TEXT, text.encode("utf-8", "backslashreplace"))
    return text


# --- as text ----------------------------------------------------------------------------------------------


def as_text(content: Mapping[str, Any], allowed: int, layout: str, left_out: Sequence[LeftOut] = ()) -> str:
    """Returns the report as text: the table, the missing, broken and cut-off videos, and the verdict."""
    lines = [f"{content['dataset']}, frames {content['frames']['name']}"]
    lines += [line for line in (content["variant"], *content["notes"]) if line]
    lines += [*table(content["splits"]), ""]
    for split, part in content["splits"].items():
        if counts := part["frames_of_the_videos"]:
            spread = ", ".join(f"{name} {number}" for name, number in counts.items())
            lines.append(f"{split}: frames of the videos: {spread}; stored: {part['stored_frames']}")
        lines.append(f"{split}: split sha256 {part['split_sha256']}")
    for kind in ("missing", "broken", "cut off", "several files"):
        lines += _named(kind, [entry for part in content["splits"].values() for entry in part.get(kind, [])])
    lines += _left_out_lines(left_out)
    lines.append(f"report sha256 {report_sha256(content)}")
    lines.append(verdict(content["missing_videos"], allowed, layout, sum(file.may_be_video for file in left_out)))
    return "".join(f"{line}\n" for line in lines)


def verdict(missing: int, allowed: int, layout: str = "", left_out: int = 0) -> str:
    """Returns the last line of a report.

    Args:
        missing: expected videos that are missing.
        allowed: number of videos that may be missing or skipped.
        layout: layout of the plan; "" if it is unknown.
        left_out: number of skipped files that may be videos.
    """
    expected = f"{counted(missing, 'expected video')} {'is' if missing == 1 else 'are'} missing"
    option = "--allow-missing of " + f"run/prepare.py {layout}".rstrip()
    if left_out:
        summary = expected if missing else "every expected video is there"
        files = "file that may be a video is" if left_out == 1 else "files that may be videos are"
        begin = "" if missing + left_out <= allowed else "INCOMPLETE: "
        return f"{begin}{summary}, {left_out} {files} left out, {allowed} allowed ({option})"
    if missing == 0:
        return "complete: every expected video is there"
    if missing <= allowed:
        return f"{expected}, {allowed} allowed ({option})"
    advice = EXPECT_FEWER if layout == CUSTOM else ""
    return f"INCOMPLETE: {expected}, {allowed} allowed ({option}){advice}"


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """Returns the number of skipped files and some names, possible videos first."""
    if not left_out:
        return []
    in_order = sorted(left_out, key=lambda file: not file.may_be_video)
    counts = f"{counted(len(left_out), 'file')}, {sum(file.may_be_video for file in left_out)} of them may be videos"
    return [f"left out: {counts}", *_named("left out", [{"video": f.name, "reason": f.reason} for f in in_order])]


def table(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each class and split, in columns."""
    rows = []
    for split, part in splits.items():
        rows += [(split, *row.values()) for row in part["per_class"]]
        sums = [sum(row[key] for row in part["per_class"]) for key in ("expected", "found", "missing", "broken")]
        rows.append((split, f"all {counted(part['classes'], 'class')}", *sums))
    width = max((len(row[1]) for row in rows), default=0)
    head = f"{'split':5}  {'class':{width}}  {'expected':>8}  {'found':>7}  {'missing':>7}  {'broken':>6}"
    return [head] + [f"{a:5}  {b:{width}}  {c:8}  {d:7}  {e:7}  {f:6}{_mark(c, d)}" for a, b, c, d, e, f in rows]


def _mark(expected: int, found: int) -> str:
    """Returns a mark for a line whose number of videos differs from the expected one."""
    return "" if expected == found else "  <-- fewer" if found < expected else "  <-- more"


def _named(kind: str, entries: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [f"{kind}: {printable(entry['video'])}: {printable(entry['reason'])}" for entry in entries[:MAX_NAMED]]
    more = len(entries) - MAX_NAMED
    return lines + ([f"{kind}: ... and {more} more, see {REPORT}"] if more > 0 else [])
