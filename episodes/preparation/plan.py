"""What a benchmark wants, and which raw video is meant: class list + video lists + raw videos -> a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.class_lists import ClassList
from episodes.preparation.annotations import check_classes, check_labels, templates
from episodes.preparation.names import raw_video_name, why_not_storable
from episodes.preparation.raw_layouts import KINETICS_NAME, by_class, by_number, by_youtube_id, raw_videos
from episodes.preparation.raw_lists import ListedVideo, read_lists
from episodes.search import SPLITS
from utils.errors import UserError

# Videos of the two train lists of Something-Something V2, full, that circulate -> who uses it.
SSV2_FULL_TRAIN_LISTS = {
    77500: "train list of 77,500 videos, as in CLIP-SPM and CLIP-MEI",
    67013: "train list of 67,013 videos, as in TRX, CLIP-FSAR and MoLo",
}
CUSTOM = "custom"  # the layout of a user's own data: class folders
Lists = Mapping[str, Sequence[ListedVideo]]


@dataclass(frozen=True)
class WantedVideo:
    """A video of the benchmark and its raw video; `source` is None, and `reason` says why, where there is none."""

    split: str
    folder: str
    name: str
    source: Path | None
    reason: str = ""

    @property
    def full_name(self) -> str:
        """class/video."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """All videos of a benchmark.

    layout: how its raw videos lie: the name of a benchmark, or CUSTOM.
    videos: in the order of the split index, by class and, within a class, by name.
    expected: (split, class folder) -> how many there should be.
    variant: which of several lists in use it is, "" where there is only one. notes: for the report.
    """

    layout: str
    class_list: ClassList
    videos: tuple[WantedVideo, ...]
    expected: dict[tuple[str, str], int]
    variant: str = ""
    notes: tuple[str, ...] = ()


def make_plan(
    layout: str, class_list: ClassList, videos: Path, lists: Path | None, leave_out: Collection[Path]
) -> Plan:
    """Decide for every video of a benchmark which raw video it is.

    Args:
        layout: how its raw videos lie: the name of a benchmark, or CUSTOM.
        class_list: its classes.
        videos: folder of the raw videos.
        lists: folder of the video lists; None where the benchmark is all videos of its classes.
        leave_out: folders below `videos` that hold no raw videos.

    Raises:
        UserError: a benchmark of chosen videos without lists, lists that cannot be read, no raw video at all.
    """
    if lists is None and class_list.listed and layout != CUSTOM:
        raise UserError(
            f"{class_list.dataset} is a list of chosen videos: name with --lists the folder that holds its train, val "
            "and test list (trainlist03.txt, train_few_shot.txt or the like), from the code of a paper that uses it"
        )
    read = None if lists is None else read_lists(lists, class_list.classes, labels=layout != CUSTOM)
    raw = raw_videos(videos, leave_out)
    if read is None:
        wanted = _all_videos(class_list, by_class(raw, _folders(class_list), videos))
    elif layout == "kinetics":
        names = _kinetics_names(read)
        wanted = _chosen(read, _kinetics_source(by_youtube_id(raw, videos)), names)
    elif layout.startswith("ssv2"):
        _check_annotations(read, class_list, [videos, lists] if lists else [videos])
        wanted = _chosen(read, _numbered_source(by_number(raw, videos)))
    else:
        wanted = _chosen(read, _class_source(by_class(raw, _folders(class_list), videos)))
    variant = _variant(layout, read)
    position = {(split, entry.folder): i for split in SPLITS for i, entry in enumerate(class_list.classes[split])}
    wanted.sort(key=lambda video: (SPLITS.index(video.split), position[video.split, video.folder], video.name))
    notes = _notes(layout, read) if not variant else ()
    return Plan(layout, class_list, tuple(wanted), _expected(class_list, read, variant), variant, notes)


# --- which videos -----------------------------------------------------------------------------------------


def _folders(class_list: ClassList) -> list[str]:
    return [entry.folder for split in SPLITS for entry in class_list.classes[split]]


def _all_videos(class_list: ClassList, found: dict[str, dict[str, Path]]) -> list[WantedVideo]:
    """Every raw video of every class."""
    wanted = []
    for split in SPLITS:
        for entry in class_list.classes[split]:
            for name, path in found[entry.folder].items():
                reason = why_not_storable(name)
                wanted.append(WantedVideo(split, entry.folder, name, None if reason else path, reason))
    return wanted


def _chosen(
    lists: Lists, source_of: Callable[[ListedVideo], Path | str], name_of: Callable[[ListedVideo], str] | None = None
) -> list[WantedVideo]:
    """The listed videos; `source_of` gives the raw video or says why there is none, `name_of` the name to store.

    A raw video is taken once: under two names it would be its own support, or train and test on the same.
    """
    wanted = []
    taken: dict[Path, str] = {}
    for split, listed in lists.items():
        for video in listed:
            source, listed_name = source_of(video), f"{video.folder}/{video.name}"
            if isinstance(source, Path) and taken.setdefault(source, listed_name) != listed_name:
                source = f"{source.name} is taken for {taken[source]}"
            path, reason = (source, "") if isinstance(source, Path) else (None, source)
            name = video.name if name_of is None else name_of(video)
            wanted.append(WantedVideo(split, video.folder, name, path, reason))
    return wanted


def _expected(class_list: ClassList, lists: Lists | None, variant: str) -> dict[tuple[str, str], int]:
    """How many videos each class should have: as the class file says, or more; in training as a known list says."""
    expected = {(split, entry.folder): entry.expected_videos for split in SPLITS for entry in class_list.classes[split]}
    if lists is None:
        return expected
    counts = Counter((split, video.folder) for split, listed in lists.items() for video in listed)
    return {
        key: counts[key] if variant and key[0] == "train" else max(number, counts[key])
        for key, number in expected.items()
    }


def _variant(layout: str, lists: Lists | None) -> str:
    """Which of several lists in use this one is, by its length; "" where only one is, or where it is none of them."""
    if layout != "ssv2_full" or lists is None:
        return ""
    return SSV2_FULL_TRAIN_LISTS.get(len(lists["train"]), "")


def _notes(layout: str, lists: Lists | None) -> tuple[str, ...]:
    """A sentence on a list that is not one of those in use."""
    if layout != "ssv2_full" or lists is None:
        return ()
    known = " nor ".join(f"{number:,}" for number in SSV2_FULL_TRAIN_LISTS)
    return (f"train list of {len(lists['train']):,} videos, which is neither {known}",)


# --- which raw video --------------------------------------------------------------------------------------


def _class_source(found: dict[str, dict[str, Path]]) -> Callable[[ListedVideo], Path | str]:
    return lambda video: found[video.folder].get(video.name, "not there")


def _numbered_source(found: dict[str, list[Path]]) -> Callable[[ListedVideo], Path | str]:
    return lambda video: found[video.name][0] if video.name in found else "not there"


def _kinetics_source(found: dict[str, list[Path]]) -> Callable[[ListedVideo], Path | str]:
    """By YouTube id; a file that was cut at other times than the list says is another clip."""

    def source_of(video: ListedVideo) -> Path | str:
        identity, times = _id_and_times(video)
        by_times: dict[str | None, Path] = {}
        for path in found.get(identity, ()):
            by_times.setdefault(_times(path), path)
        if not by_times:
            return "not there"
        if times is None:
            return by_times.get(None) or next(iter(by_times.values()))
        other = f"only cut at other times: {next(iter(by_times.values())).name}"
        return by_times.get(times) or by_times.get(None) or other

    return source_of


def _times(path: Path) -> str | None:
    match = KINETICS_NAME.fullmatch(raw_video_name(path.name))
    return match[2] if match else None


def _id_and_times(video: ListedVideo) -> tuple[str, str | None]:
    match = KINETICS_NAME.fullmatch(video.name)
    if match is None:
        raise UserError(f"{video.where}: expected a YouTube id of 11 characters, found {video.name!r}")
    return match[1], match[2]


def _kinetics_names(lists: Lists) -> Callable[[ListedVideo], str]:
    """The id alone, so that lists with and without times give the same split; the whole name of an id used twice."""
    counts = Counter(_id_and_times(video)[0] for listed in lists.values() for video in listed)

    def name_of(video: ListedVideo) -> str:
        identity = _id_and_times(video)[0]
        return identity if counts[identity] == 1 else video.name

    return name_of


def _check_annotations(lists: Lists, class_list: ClassList, folders: Sequence[Path]) -> None:
    check_labels(folders, class_list.classes)
    check_classes(lists, class_list.classes, templates(folders))
