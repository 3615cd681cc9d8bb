"""Reads the report of `run/prepare.py`, which identifies the prepared videos by one hash.

report.json contains the report and its SHA-256. The hash covers everything that affects a result (the videos of each
split, how their frames are stored) and nothing that differs between machines with the same data.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT = "report.json"
FORMAT = "prepared data, report 1"


def data_report_sha256(data_dir: Path) -> str | None:
    """Returns the hash of the report on the data in a folder; None if there is no report."""
    saved = find_report(data_dir)
    return None if saved is None else report_sha256(saved["report"])


def find_report(data_dir: Path) -> dict[str, Any] | None:
    """Returns the saved report on the data in a folder, from it or from its parent; None if there is no report."""
    return read_report(data_dir) or read_report(data_dir.absolute().parent)


def read_report(folder: Path) -> dict[str, Any] | None:
    """Returns the saved report of a folder, or None."""
    try:
        saved = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_report = isinstance(saved, dict) and isinstance(saved.get("report"), dict)
    return saved if is_report and saved["report"].get("format") == FORMAT else None


def report_sha256(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a report's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
