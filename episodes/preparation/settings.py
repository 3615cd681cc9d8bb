"""Settings for storing frames, and their record in the output folder, which prevents mixing two settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from utils.errors import UserError
from utils.files import write_atomically
from utils.yaml_text import read_yaml_file, yaml_lines

NOTE = "prepared.yaml"
FRAMES, PACKED, SPLIT_LISTS, PARTIAL = "frames", "packed", "splits", "partial"
FOLDERS = (FRAMES, PACKED, SPLIT_LISTS, PARTIAL)  # of the output folder
HEADER = "# Written by `python run/prepare.py`: how the frames of this folder were made.\n"


@dataclass(frozen=True)
class FrameSettings:
    """How the frames of a video are stored.

    Attributes:
        frames: number of frames, spread over the video by the rule for test clips; None: all of them.
        size: pixels of both sides (shape "square") or of the shorter side (shape "short").
        shape: "square" does not keep the proportions, as in the published frames; "short" keeps them.
        quality: ffmpeg's -q:v, from 1 (best) to 31.
        layout: folders below frames/: "class" is <class>/<video>, "split" is <split>/<class>/<video>.
    """

    frames: int | None = 8
    size: int = 256
    shape: Literal["square", "short"] = "square"
    quality: int = 5
    layout: Literal["class", "split"] = "class"

    @property
    def name(self) -> str:
        """The usual name of a folder of such frames: _256x256q5_l8."""
        size = f"{self.size}x{self.size}" if self.shape == "square" else f"short{self.size}"
        return f"_{size}q{self.quality}_l{'all' if self.frames is None else self.frames}"

    def check(self) -> None:
        """Raises UserError for a number out of range."""
        for option, value, minimum, maximum in [
            ("--frames", 1 if self.frames is None else self.frames, 1, 100_000),
            ("--size", self.size, 16, 4096),
            ("--quality", self.quality, 1, 31),
        ]:
            if not minimum <= value <= maximum:
                raise UserError(f"{option} is {value}; expected {minimum} to {maximum}")


# The published frames, and all frames with the proportions of the video, from which training clips can be drawn.
PRESETS = {settings.name: settings for settings in (FrameSettings(), FrameSettings(frames=None, shape="short"))}
PUBLISHED = FrameSettings().name


def check_apart(out: Path, videos: Path) -> None:
    """Raises UserError if something would be written among the raw videos, links followed."""
    raw = Path(os.path.realpath(videos))
    written = [Path(os.path.realpath(out / name)) for name in FOLDERS]
    if any(folder.is_relative_to(raw) for folder in (Path(os.path.realpath(out)), *written)):
        raise UserError(
            f"--out {out} is in --videos {videos}, in which nothing is ever written; give a folder outside it"
        )
    if any(raw.is_relative_to(folder) for folder in written):
        raise UserError(
            f"--videos {videos} is in a folder that --out {out} writes ({', '.join(FOLDERS)}); give another --out, or "
            "move the raw videos elsewhere"
        )


def claim_folder(out: Path, dataset: str, settings: FrameSettings, more: dict[str, Any] | None = None) -> None:
    """Creates the output folder and records its settings, or checks the recorded ones.

    Args:
        out: the folder.
        dataset: name of the data set.
        settings: settings of the frames.
        more: further values on which the content depends (seed and ratios of a split).

    Raises:
        UserError: it was prepared with other settings, or has files of these names that this command did not write.
    """
    wanted = {"dataset": dataset, **asdict(settings), **(more or {})}
    note = out / NOTE
    if note.is_file():
        recorded = read_yaml_file(note, str(note), "settings record")
        differ = [key for key in wanted if recorded.get(key) != wanted[key]]
        if differ:
            differences = ", ".join(
                f"{key} {_shown(key, recorded)} (requested: {_shown(key, wanted)})" for key in differ
            )
            raise UserError(
                f"{out} was prepared with {differences}; use the same settings, or give another folder with --out"
            )
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder")
    for name in FOLDERS:
        if (out / name).exists():
            raise UserError(
                f"{out / name} exists and was not written by this command, which never overwrites it; give another "
                f"folder with --out, or move {name} elsewhere"
            )
    write_atomically(note, (HEADER + "".join(f"{line}\n" for _, line in yaml_lines(wanted))).encode())


def _shown(key: str, settings: Mapping[str, Any]) -> object:
    """Returns a setting as on the command line."""
    value = settings.get(key, "not recorded")
    return "all" if key == "frames" and value is None else value
