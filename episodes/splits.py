"""Builds and checks the index of each split's videos from class lists and video lists.

A split folder contains `classes.yaml`: for train, val and test the folder of each class, its prompt name and the
expected number of videos. If the benchmark uses selected videos, `trainlist03.txt`, `vallist03.txt` and
`testlist03.txt` name them, one `class/video` per line. The data root contains class folders, with a file or a folder of
frames for each video, or packed stores, one per split.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from episodes.search import SPLITS, ClassFolders, PackedStores, composed, cut_number, find_videos, unsafe, video_name
from utils.errors import UserError, counted, first_of, seen_from
from utils.files import raise_if_lfs_pointer
from utils.yaml_text import read_yaml_file

CLASS_FILE = "classes.yaml"
MAX_PROBLEMS_SHOWN = 30
LONGEST_SHOWN = 200  # characters of a text from a file that is quoted in a message
# Split -> what to do if it has no class, or one.
TOO_FEW_CLASSES = {
    "train": "add classes, or set TRAIN.TRAIN_EPISODES=0 or TEST.ONLY_TEST=true to test without training",
    "val": "add classes, or set TRAIN.VAL_FREQ=0 to train without validation",
    "test": "add classes",
}
EXPECTS = "the class list expects"  # of the notes on classes with another number of videos
LARGEST_LIST = 32 * 1024**2  # bytes; the longest of the shipped lists has 500,000


@dataclass(frozen=True)
class ClassEntry:
    """One action class: its folder on disk, its prompt name, and its expected number of videos."""

    folder: str
    prompt: str
    expected_videos: int


@dataclass(frozen=True)
class ClassList:
    """The content of a class file; `listed`: whether lists name the videos, otherwise all of a class are used."""

    path: Path
    dataset: str
    listed: bool
    horizontal_flip: bool
    classes: dict[str, list[ClassEntry]]


@dataclass(frozen=True)
class SplitIndex:
    """The videos of one split, ordered by class and, within a class, by name.

    Attributes:
        root: folder of the videos.
        video_names: `class/video` without a suffix, the same for every layout on disk.
        video_paths: paths relative to `root`; in a packed store `<store>/<class>/<video>`.
        class_of_video: int64 [V], the position of its class in `classes`.
        notes: remarks on the videos found.
        videos_of_class: for each class, int64, the numbers of its videos.
    """

    dataset: str
    split: str
    root: Path
    classes: tuple[ClassEntry, ...]
    video_names: tuple[str, ...]
    video_paths: tuple[str, ...]
    class_of_video: np.ndarray
    horizontal_flip: bool
    notes: tuple[str, ...] = ()
    videos_of_class: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        groups = tuple(np.flatnonzero(self.class_of_video == c) for c in range(len(self.classes)))
        object.__setattr__(self, "videos_of_class", groups)

    def __len__(self) -> int:
        return len(self.video_names)

    @property
    def prompts(self) -> list[str]:
        """The prompt names of the C classes, in the order of the class ids."""
        return [entry.prompt for entry in self.classes]

    def path(self, video: int) -> Path:
        """Returns the path of video number `video`."""
        return self.root / self.video_paths[video]

    def digest(self) -> str:
        """Returns the SHA-256 of the classes and video names, equal only for the same split."""
        # JSON separates names unambiguously and can represent file names that are not UTF-8.
        content = [self.split, [[entry.folder, entry.prompt] for entry in self.classes], self.video_names]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass
class _Source:
    """The inputs of the search for one split's videos; all splits share the problems and notes."""

    split: str
    classes: list[ClassEntry]
    problems: list[str]
    notes: list[str]


def load_splits(
    split_dir: Path, data_dir: Path, needed: Sequence[str] | None, shipped_dir: Path | None = None, prepare: str = ""
) -> dict[str, SplitIndex]:
    """Indexes the needed splits and checks everything that can be checked without opening a video.

    Args:
        split_dir: folder with the class file and the lists.
        data_dir: root of the videos.
        needed: which of train, val and test the run will read; the others are not checked. None: all with classes.
        shipped_dir: folder of the class file if `split_dir` contains only lists.
        prepare: the command that prepares this data, for messages on missing data.

    Returns:
        split name -> index.

    Raises:
        UserError: all problems found, a sentence each: no such folder or file, a line that cannot be read,
            a class twice or in two splits, a duplicate or unknown video, a path outside the root, ...
    """
    class_file = next((d / CLASS_FILE for d in (split_dir, shipped_dir) if d and (d / CLASS_FILE).is_file()), None)
    problems: list[str] = []
    make = f"prepare the data with `{prepare}`, or " if prepare else ""
    there = data_dir.is_dir() and any(data_dir.iterdir())
    if not there:
        missing = f"no such data folder: {data_dir}{seen_from(data_dir)}"
        state = f"the data folder is empty: {data_dir}" if data_dir.is_dir() else missing
        problems.append(f"{state}; {make}set DATA.DATA_DIR to the folder with the class folders or packed stores")
    if class_file is None:
        problems.append(
            f"no class list: expected {split_dir / CLASS_FILE}; {make}set DATA.SPLIT_DIR to a folder that has one"
        )
        raise UserError("\n".join(problems))
    class_list = read_class_list(class_file, problems, SPLITS if needed is None else needed)
    if needed is None:
        needed = [split for split in SPLITS if class_list.classes[split]]

    on_disk = find_videos(data_dir)
    indexes = {}
    for split in needed:
        source = _Source(split, class_list.classes[split], problems, [])
        if not source.classes:
            problems.append(
                f"{class_file}: no classes under '{split}:', which this run needs; {TOO_FEW_CLASSES[split]}"
            )
            continue
        list_file = next((d for d in (split_dir, shipped_dir) if d and (d / f"{split}list03.txt").is_file()), None)
        if list_file is not None:
            wanted = _read_list(list_file / f"{split}list03.txt", source)
        elif class_list.listed:
            problems.append(
                f"{split_dir / f'{split}list03.txt'} is missing: {class_list.dataset} uses selected videos; "
                f"{make}put its {split}list03.txt (class/video lines) into DATA.SPLIT_DIR"
            )
            continue
        else:
            wanted = None
        if there:
            indexes[split] = _index(source, class_list, on_disk, data_dir, wanted)
    problems += on_disk.link_problem()
    raise_problems(problems)
    return indexes


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one UserError with all problems, a line each, if there are any."""
    if problems:
        raise UserError("\n".join(first_of(list(dict.fromkeys(problems)), MAX_PROBLEMS_SHOWN, " problems")))


def quoted(value: object) -> str:
    """Returns a value quoted for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


# --- the class file -----------------------------------------------------------------------------------------


def read_class_list(path: Path, problems: list[str], needed: Sequence[str] = SPLITS) -> ClassList:
    """Reads a class file; problems with single classes of the needed splits are added to `problems`.

    A split without classes, or without its key, has an empty list.

    Raises:
        UserError: the file is unreadable or has another form.
    """
    data = _read_class_file(path, needed)
    classes = {split: _classes(data, split, path, problems if split in needed else []) for split in SPLITS}
    _check_disjoint(classes, path, problems)
    return ClassList(path, data["dataset"], data["videos"] == "listed", data["horizontal_flip"], classes)


def _read_class_file(path: Path, needed: Sequence[str]) -> dict:
    """Returns the content of a class file, with its keys checked but not its classes."""
    data = read_yaml_file(path, str(path), "class list")
    required = {"dataset", "videos", "horizontal_flip"}
    if not required <= set(data) <= {*required, *SPLITS}:
        keys = quoted(sorted(map(str, data)))
        expected = ", ".join(sorted({*required, *SPLITS}))
        raise UserError(f"{path}: expected the keys {expected} (unused splits may be omitted), found {keys}")
    data = dict.fromkeys(SPLITS) | data
    problems = []
    if not isinstance(data["dataset"], str) or not data["dataset"].isprintable():
        problems.append(f"{path}: expected a name after 'dataset:', found {quoted(data['dataset'])}")
    if data["videos"] not in ("all", "listed"):
        problems.append(f"{path}: expected 'videos: all' or 'videos: listed', found {quoted(data['videos'])}")
    if not isinstance(data["horizontal_flip"], bool):
        problems.append(
            f"{path}: expected 'horizontal_flip: true' or 'horizontal_flip: false', "
            f"found {quoted(data['horizontal_flip'])}"
        )
    for split in SPLITS:
        if split not in needed:
            data[split] = data[split] if isinstance(data[split], list) else None
        elif not isinstance(data[split], list | None):
            problems.append(f"{path}: expected a list of classes after '{split}:', found {quoted(data[split])}")
    raise_problems(problems)
    return data


def _classes(data: dict, split: str, path: Path, problems: list[str]) -> list[ClassEntry]:
    """Returns the valid classes of one split; appends a message to `problems` for each other one."""
    entries = []
    for number, item in enumerate(data[split] or [], start=1):
        is_valid = (
            isinstance(item, dict)
            and set(item) == {"folder", "prompt", "videos"}
            and isinstance(item["folder"], str)
            and isinstance(item["prompt"], str)
            and type(item["videos"]) is int  # YAML's true is an int to isinstance
        )
        if not is_valid:
            problems.append(
                f"{path}: class {number} of {split}: expected {{folder: name, prompt: text, videos: count}}, "
                f"found {quoted(item)}"
            )
        elif reason := unsafe(item["folder"], parts=1):
            problems.append(f"{path}: class {number} of {split}: folder {quoted(item['folder'])} {reason}")
        else:
            entries.append(ClassEntry(item["folder"], item["prompt"], item["videos"]))
    return entries


def _check_disjoint(classes: dict[str, list[ClassEntry]], path: Path, problems: list[str]) -> None:
    """Adds a problem for every class that is listed a second time, in one split or in two."""
    seen: dict[str, str] = {}
    for split, entries in classes.items():
        for entry in entries:
            name = composed(entry.folder).casefold()  # some file systems ignore case
            if name in seen:
                where = f"twice in {split}" if seen[name] == split else f"in {seen[name]} and in {split}"
                problems.append(
                    f"{path}: class {quoted(entry.folder)} is {where}; each class belongs to one split, once"
                )
            seen.setdefault(name, split)


# --- the video lists ----------------------------------------------------------------------------------------


def _read_list(path: Path, source: _Source) -> dict[str, dict[str, str]]:
    """Reads `class/video` lines: class folder -> video -> its file and line; adds problems instead of raising them."""
    wanted: dict[str, dict[str, str]] = {entry.folder: {} for entry in source.classes}
    folder_of = {composed(folder): folder for folder in wanted}
    try:
        raise_if_lfs_pointer(path)
        # utf-8-sig: some editors write a byte order mark. split: splitlines counts more lines than editors do.
        with path.open("rb") as file:
            content = file.read(LARGEST_LIST + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        source.problems.append(f"{path}: not UTF-8 text; save it as UTF-8")
        return wanted
    except UserError as error:
        source.problems.append(str(error))
        return wanted
    except OSError as error:
        source.problems.append(f"{path}: cannot be read: {error.strerror}")
        return wanted
    if len(content) > LARGEST_LIST:
        source.problems.append(
            f"{path}: has more than {LARGEST_LIST:,} bytes, the limit for a list of videos; "
            "check that it is the right file"
        )
        return wanted
    for number, line in enumerate(lines, start=1):
        first, *columns = line.strip().split("\t")
        labels = all(column.strip().isdecimal() for column in columns)  # a tab may precede these
        name, where = (" " if labels else "\t").join([first, *columns]), f"{path} line {number}"
        if not name:
            continue
        if reason := unsafe(name, parts=2):
            source.problems.append(f"{where}: {quoted(name)} {reason}")
            continue
        folder, video = name.split("/")
        folder, video = folder_of.get(composed(folder), folder), video_name(video)
        if folder not in wanted:
            source.problems.append(
                f"{where}: class {quoted(folder)} is not among the {source.split} classes of {CLASS_FILE}"
            )
        elif video in wanted[folder]:
            source.problems.append(
                f"{where}: {quoted(name)} is already in {wanted[folder][video]}; remove one of the two"
            )
        else:
            wanted[folder][video] = where
    return wanted


def _without_labels(listed: dict[str, str], found: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Removes labels after names (`v1.mp4 0`) where only the name without the label is on disk."""
    plain: dict[str, str] = {}
    for video, where in listed.items():
        name = video
        while name not in found and (rest := cut_number(name)[0]):
            name = rest if rest in found else video_name(rest)
        name = name if name in found else video
        if name in plain:
            problems.append(f"{where}: {quoted(name)} is already in {plain[name]}; remove one of the two")
        plain.setdefault(name, where)
    return plain


# --- the index --------------------------------------------------------------------------------------------


def _index(
    source: _Source,
    class_list: ClassList,
    on_disk: ClassFolders | PackedStores,
    root: Path,
    wanted: dict[str, dict[str, str]] | None,
) -> SplitIndex:
    """Finds the videos of one split on disk; `wanted` None takes all of them."""
    names: list[str] = []
    paths: list[str] = []
    class_ids: list[int] = []
    before = len(source.problems)
    missing = 0
    for class_id, entry in enumerate(source.classes):
        videos = on_disk.videos(source.split, entry.folder, source.problems, source.notes)
        if videos is None:
            missing += on_disk.place(source.split, entry.folder) is None
            continue
        listed = (
            dict.fromkeys(videos, "")
            if wanted is None
            else _without_labels(wanted[entry.folder], videos, source.problems)
        )
        for video in sorted(listed):
            path = videos.get(video)
            if path is None:
                place = on_disk.place(source.split, entry.folder)
                similar = next((f"; there is {name!r}" for name in videos if name.casefold() == video.casefold()), "")
                source.problems.append(f"{listed[video]}: no video {quoted(video)} in {place}{similar}")
                continue
            names.append(f"{entry.folder}/{video}")
            paths.append(path)
            class_ids.append(class_id)
        _compare_counts(source, entry, len(listed))
    if missing == len(source.classes) > 1:  # these are probably not the videos of this split
        source.problems[before + 1 :] = [
            f"the other {missing - 1} classes of {source.split} are not in {root} either: set DATA.DATA_DIR to the "
            f"videos of {class_list.dataset}, or DATA.DATASET or DATA.SPLIT_DIR to the split of these videos"
        ]
    source.notes.extend(on_disk.notes)
    on_disk.notes.clear()
    return SplitIndex(
        dataset=class_list.dataset,
        split=source.split,
        root=root,
        classes=tuple(source.classes),
        video_names=tuple(names),
        video_paths=tuple(paths),
        class_of_video=np.array(class_ids, dtype=np.int64),
        horizontal_flip=class_list.horizontal_flip,
        notes=tuple(source.notes),
    )


def _compare_counts(source: _Source, entry: ClassEntry, count: int) -> None:
    if count == 0:
        source.problems.append(
            f"{source.split}: class {entry.folder!r} has no video; add videos to its folder or list, or remove the "
            f"class from {CLASS_FILE}"
        )
    elif count != entry.expected_videos:
        source.notes.append(f"{entry.folder} has {counted(count, 'video')}, {EXPECTS} {entry.expected_videos}")
