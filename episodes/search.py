"""Finds the videos of a class, in class folders or in the packed stores of the splits."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from episodes.images import contains_frames, why_no_frames
from episodes.packed import PACKED_SUFFIX, packed_videos
from episodes.side_by_side import OTHER_FORM, other_forms, side_by_side
from episodes.video_files import CONTAINER_SUFFIXES, VIDEO_SUFFIXES, is_video_file, looks_like_video
from utils.errors import UserError

SPLITS = ("train", "val", "test")
OPTIONAL_SPLITS = ("train", "val")  # optional: a data set without them can be used for testing
# Folders that network storage, Windows, macOS and file systems create.
SYSTEM_FOLDERS = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot", "$recycle.bin",
    "recycler", "system volume information", "__macosx", "lost+found",
})  # fmt: skip
LOOKS_LIKE_VIDEO = "it is a video with an unknown suffix; rename or convert it"


class ClassFolders:
    """Classes that are folders below the data root or below `<root>/<split>`; a video is a file or folder in one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []  # on the choice among alternative folders
        self.outward: list[Path] = []  # links to places outside the root
        self.base = self._chosen(root)
        self.of_split = {split: self._chosen(self.base / split) for split in SPLITS}

    def _chosen(self, folder: Path) -> Path:
        """Returns the folder to use among alternatives in a folder (`rgb` and `flow`), or the folder itself."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError:  # `videos` reports it
            return folder
        if any(os.path.splitext(name)[1].lower() in CONTAINER_SUFFIXES for name in names):
            return folder
        choice = side_by_side(folder, [name for name in names if not is_system_folder(name)])
        if choice is None or choice.is_video:
            return folder
        if choice.note:
            self.notes.append(f"{folder}: {choice.note}")
        return folder / choice.used

    def place(self, split: str, folder: str) -> Path | None:
        """Returns `<root>/<split>/<class>`, `<root>/<class>`, or the class in the folder of another split."""
        parents = [self.of_split[split], self.base, *self.of_split.values()]
        spellings = dict.fromkeys([folder, *(unicodedata.normalize(form, folder) for form in ("NFC", "NFD"))])
        places = (parent / spelling for spelling in spellings for parent in parents)
        return next((place for place in places if os.path.isdir(place)), None)

    def videos(self, split: str, folder: str, problems: list[str], notes: list[str]) -> dict[str, str] | None:
        """Returns name -> path relative to the root of every video of a class, or None if the class is missing."""
        class_folder = self.place(split, folder)
        if class_folder is None:
            problems.append(
                f"class {folder!r} of {split} has no folder: expected {self.base / folder} "
                f"or {self.of_split[split] / folder}"
            )
            return None
        if _is_outside(class_folder, self.root):
            self.outward.append(class_folder)
            return None
        class_folder = self._chosen(class_folder)
        videos: dict[str, str] = {}
        try:
            with os.scandir(class_folder) as listing:
                entries = sorted((entry for entry in listing if not _is_foreign(entry.name)), key=lambda e: e.name)
            left_out = self._left_out(class_folder, entries, notes)
        except OSError as error:
            problems.append(f"{class_folder}: cannot be listed: {error.strerror}; check its permissions")
            return None
        for entry in entries:
            path, name = entry.path, video_name(entry.name)
            is_folder = os.path.isdir(path)  # entry.is_dir raises for circular links
            if entry.name in left_out:
                continue
            if not is_folder and not is_video_file(path):
                if looks_like_video(path):
                    notes.append(f"left out {path}: {LOOKS_LIKE_VIDEO}")
                continue
            if entry.is_symlink() and _is_outside(path, self.root):
                self.outward.append(Path(path))
            elif not os.path.exists(path):
                problems.append(f"{path}: a link to a file that does not exist; download it again or remove it")
            elif not is_folder and not os.path.isfile(path):
                problems.append(f"{path}: a pipe or a device, not a video file; remove it")
            elif not is_folder and os.path.getsize(path) == 0:
                problems.append(f"{path}: the video file is empty; download or prepare it again")
            elif name in videos:
                problems.append(f"{path}: {self.root / videos[name]} has the same video name; keep one of them")
            # A broken video is added too, so that it is not also reported as missing.
            videos.setdefault(name, os.path.relpath(path, self.root))
        return videos

    def _left_out(self, class_folder: Path, entries: Sequence[os.DirEntry[str]], notes: list[str]) -> set[str]:
        """Returns the folders and video files of a class that are not separate videos, and adds a note on each.

        A folder outside the root is not opened.
        """
        folders = [entry.name for entry in entries if os.path.isdir(entry.path)]
        links = {entry.name for entry in entries if entry.is_symlink()}
        inside = [name for name in folders if name not in links or not _is_outside(class_folder / name, self.root)]
        files = {e.name: video_name(e.name) for e in entries if not os.path.isdir(e.path) and is_video_file(e.path)}
        forms = other_forms(class_folder, inside, set(files.values()))
        reasons = {name: OTHER_FORM for name in inside if name in forms}
        reasons |= {name: OTHER_FORM for name, video in files.items() if video in forms}
        for name in inside:
            if name not in forms and not _may_contain_frames(class_folder / name):
                reasons[name] = why_no_frames(class_folder / name)
        notes += [f"left out {class_folder / name}: {reason}" for name, reason in reasons.items()]
        return set(reasons)

    def link_problem(self) -> list[str]:
        """Returns a list with a message about links out of the data root; empty if there are none."""
        if not self.outward:
            return []
        number = len(self.outward)
        what = "a link out of" if number == 1 else f"the first of {number} links out of"
        target = os.path.realpath(self.outward[0])
        return [
            f"{self.outward[0]}: {what} the data root {self.root}, to {target}; set DATA.DATA_DIR to the folder where "
            "the class folders are, copy the files (cp -rL), or use run/prepare.py, which follows links"
        ]


class PackedStores:
    """Classes in the packed stores `<root>/<split>.sqlite`."""

    def __init__(self, root: Path) -> None:
        self.stores = {split: _store(root, split) for split in SPLITS if _store(root, split).is_file()}
        self.notes: list[str] = []
        self.classes: dict[str, dict[str, dict[str, str]]] = {}  # of the stores opened so far

    def place(self, split: str, folder: str) -> Path | None:
        """Returns the store of the split or, if the class is not in it, a store that has the class."""
        return self._find(split, folder, [])[0]

    def link_problem(self) -> list[str]:
        """Returns an empty list, since a store contains no links."""
        return []

    def videos(self, split: str, folder: str, problems: list[str], notes: list[str]) -> dict[str, str] | None:
        """Returns name -> `<store>/<class>/<video>` of every video of a class, or None if the class is missing."""
        store, videos = self._find(split, folder, problems)
        if store is None:
            found = ", ".join(str(path) for path in self.stores.values())
            problems.append(f"class {folder!r} of {split} is in no packed store (found: {found}); prepare them again")
            return None
        return videos

    def _find(self, split: str, folder: str, problems: list[str]) -> tuple[Path | None, dict[str, str] | None]:
        for name in (split, *SPLITS):
            if name in self.stores and name not in self.classes:
                self.classes[name] = _by_class(self.stores[name], problems)
            if folder in self.classes.get(name, {}):
                return self.stores[name], self.classes[name][folder]
        return None, None


def find_videos(root: Path) -> ClassFolders | PackedStores:
    """Returns the packed stores if the data root contains any, else its class folders."""
    if any(_store(root, split).is_file() for split in SPLITS):
        return PackedStores(root)
    return ClassFolders(root)


def _store(root: Path, split: str) -> Path:
    return root / f"{split}{PACKED_SUFFIX}"


def _by_class(store: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    """Returns class -> video name -> path below the data root, for all videos of a store."""
    classes: dict[str, dict[str, str]] = {}
    try:
        names = packed_videos(store)
    except UserError as error:
        problems.append(str(error))
        return {}
    for name in names:
        if reason := unsafe(name, parts=2):
            problems.append(f"{store}: video {name!r} {reason}")
            continue
        folder, file_name = name.split("/")
        videos, video = classes.setdefault(folder, {}), video_name(file_name)
        if video in videos:
            problems.append(f"{store}: {name} and {videos[video]} have the same video name; prepare it again")
        videos.setdefault(video, f"{store.name}/{name}")
    return classes


# --- names ------------------------------------------------------------------------------------------------


def video_name(name: str) -> str:
    """Removes the suffix of a video file from a name, so that all layouts and lists use the same name."""
    stem, suffix = os.path.splitext(composed(name))
    return stem if suffix.lower() in VIDEO_SUFFIXES else stem + suffix


def cut_number(name: str) -> tuple[str, str]:
    """Splits off a number in the last column: `v1.mp4 0` -> `v1.mp4` and `0`; without one, both are ""."""
    rest = name.rstrip("0123456789")
    before = rest.rstrip(" ,\t")
    return (before, name[len(rest) :]) if before and len(before) < len(rest) < len(name) else ("", "")


def is_system_folder(name: str) -> bool:
    """Returns whether a system creates folders of this name, such as thumbnails or the recycle bin of a NAS."""
    return name.casefold() in SYSTEM_FOLDERS


def composed(name: str) -> str:
    """Returns a name in the Unicode form NFC; macOS writes names in the form NFD."""
    return unicodedata.normalize("NFC", name)


def unsafe(name: str, parts: int) -> str | None:
    """Returns why a name (`parts` 1) or `class/video` (2) cannot be joined to the data root; None if it can."""
    if any(character < " " or character == "\\" for character in name):
        return "contains a control character or a backslash"
    pieces = name.split("/")
    if name.startswith("/") or ".." in pieces:
        return "points outside the data root"
    if len(pieces) != parts or not all(piece and piece != "." for piece in pieces):
        return "is not of the form class/video" if parts == 2 else "is not the name of one folder"
    return None


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or is_system_folder(name)


def _may_contain_frames(folder: Path) -> bool:
    """Returns whether a folder contains images; true if it cannot be listed, since reading it reports the reason."""
    try:
        return contains_frames(folder)
    except UserError:
        return True


def _is_outside(path: str | Path, root: Path) -> bool:
    # realpath, since Path.resolve raises another error for circular links.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
