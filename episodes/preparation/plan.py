"""Makes the plan of a preparation: matches the videos of the class list and the lists with raw videos."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from episodes.images import note_summary, sequence_note
from episodes.preparation.annotations import check_classes, check_labels, templates
from episodes.preparation.list_files import unused_lists
from episodes.preparation.names import class_key, raw_video_name, why_not_storable
from episodes.preparation.raw_layouts import (
    KINETICS_NAME,
    FoundVideos,
    LeftOut,
    RawVideo,
    by_class,
    by_number,
    by_youtube_id,
    class_of_folder,
    folder_of_path,
    raw_videos,
    video_exists,
)
from episodes.preparation.raw_lists import Evidence, ListedVideo, read_lists
from episodes.preparation.variants import Lists, notes_of, variant_of
from episodes.search import OPTIONAL_SPLITS, SPLITS
from episodes.splits import ClassList
from utils.errors import UserError

CUSTOM = "custom"  # the layout of a user's own data: class folders
BY_CLASS = ("hmdb51", "ucf101", CUSTOM)  # their raw videos are in class folders
SourcesOf = Callable[[ListedVideo], "list[Path] | str"]


@dataclass(frozen=True)
class WantedVideo:
    """A video of the benchmark and its raw video.

    Attributes:
        source: the raw video; None if it is missing, with the cause in `reason`.
        others: further files of the same name, used in their order if `source` is broken.
    """

    split: str
    folder: str
    name: str
    source: Path | None
    reason: str = ""
    others: tuple[Path, ...] = ()

    @property
    def full_name(self) -> str:
        """Class/video."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """All videos of a benchmark.

    Attributes:
        layout: layout of its raw videos: the name of a benchmark, or CUSTOM.
        videos: in the order of the split index, by class and, within a class, by name.
        expected: (split, class folder) -> expected number of videos.
        variant: name of the list variant; "" if there is only one.
        notes: notes for the report.
        left_out: files below the folder of raw videos that are not read; `may_be_video` if they may belong to the data
            set.
    """

    layout: str
    class_list: ClassList
    videos: tuple[WantedVideo, ...]
    expected: dict[tuple[str, str], int]
    variant: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def make_plan(
    layout: str, class_list: ClassList, videos: Path, lists: Path | None, leave_out: Collection[Path]
) -> Plan:
    """Finds the raw video of every video of a benchmark.

    Args:
        layout: layout of the raw videos: the name of a benchmark, or CUSTOM.
        class_list: the classes.
        videos: folder of the raw videos.
        lists: folder of the video lists; None if the benchmark has all videos of its classes.
        leave_out: folders below `videos` that contain no raw videos.

    Raises:
        UserError: a benchmark with selected videos without lists, unreadable lists, or no raw video at all.
    """
    if lists is None and class_list.listed and layout != CUSTOM:
        raise UserError(
            f"{class_list.dataset} uses selected videos: give with --lists the folder with its train, val "
            "and test lists (trainlist03.txt, train_few_shot.txt or similar), from the code of a paper that uses it"
        )
    left_out: list[LeftOut] = []
    choices: list[str] = []
    raw = list(raw_videos(videos, leave_out, left_out, choices))
    found = by_class(raw, _folders(class_list), videos) if layout in BY_CLASS else {}
    read = None
    if lists is not None:
        places = [videos, lists]
        template_of = templates(places) if layout.startswith("ssv2") else {}
        evidence = _evidence(layout, class_list, raw, found, template_of, places)
        optional = OPTIONAL_SPLITS if layout == CUSTOM else ()
        read = read_lists(lists, class_list.classes, evidence, optional)
        check_classes(read, class_list.classes, template_of)
    if read is None:
        wanted = _all_videos(class_list, found)
    elif layout == "kinetics":
        sources_of = _kinetics_sources(by_youtube_id(raw, videos), folder_of_path(raw, _folders(class_list)))
        wanted = _chosen(read, sources_of, _kinetics_names(read))
    elif layout.startswith("ssv2"):
        wanted = _chosen(read, _numbered_sources(by_number(raw, videos)))
    else:
        wanted = _chosen(read, _class_sources(found))
    position = {(split, entry.folder): i for split in SPLITS for i, entry in enumerate(class_list.classes[split])}
    wanted.sort(key=lambda video: (SPLITS.index(video.split), position[video.split, video.folder], video.name))
    notes = notes_of(layout, read)
    if lists is not None and (unused := unused_lists(lists)):
        notes += (f"lists not used: {', '.join(unused)}",)
    notes += (*choices, *_sequence_notes(wanted))
    expected = _expected(class_list, read, layout)
    if read is None:
        left_out = list(_within_classes(left_out, raw, layout, _folders(class_list)))
    else:  # a missing listed video is reported anyway
        left_out = [replace(file, may_be_video=False) for file in left_out]
    return Plan(layout, class_list, tuple(wanted), expected, variant_of(layout, read), notes, tuple(left_out))


def _sequence_notes(videos: Sequence[WantedVideo]) -> list[str]:
    """Returns notes on the sequence used in folders that contain several."""
    notes: Counter[str] = Counter()
    for video in videos:
        if video.source is not None:
            with contextlib.suppress(UserError):  # reading its frames reports it
                notes[sequence_note(video.source)] += 1
    return note_summary(notes)


def _evidence(
    layout: str,
    class_list: ClassList,
    raw: Sequence[RawVideo],
    found: FoundVideos,
    template_of: Mapping[str, str],
    places: Sequence[Path],
) -> Evidence:
    """Returns the evidence beside the lists: annotations and labels.json, or the class folders of the raw videos."""
    if layout.startswith("ssv2"):
        by_key = {class_key(entry.prompt): entry.folder for split in SPLITS for entry in class_list.classes[split]}
        labels = check_labels(places, class_list.classes)
        return Evidence(lambda name: by_key.get(class_key(template_of.get(name, ""))), labels)
    class_of = class_of_folder(raw, _folders(class_list), _kinetics_id if layout == "kinetics" else str)
    return Evidence(class_of, exists=video_exists(found) if layout == CUSTOM else None)


# --- which videos -----------------------------------------------------------------------------------------


def _folders(class_list: ClassList) -> list[str]:
    return [entry.folder for split in SPLITS for entry in class_list.classes[split]]


def _all_videos(class_list: ClassList, found: FoundVideos) -> list[WantedVideo]:
    """Returns every raw video of every class."""
    wanted = []
    for split in SPLITS:
        for entry in class_list.classes[split]:
            for name, (path, *others) in found[entry.folder].items():
                reason = why_not_storable(name)
                source = None if reason else path
                wanted.append(WantedVideo(split, entry.folder, name, source, reason, () if reason else tuple(others)))
    return wanted


def _chosen(
    lists: Lists, sources_of: SourcesOf, name_of: Callable[[ListedVideo], str] | None = None
) -> list[WantedVideo]:
    """Returns the listed videos; `sources_of` gives their files or why they are missing, `name_of` the stored name.

    A raw video is used only once. Under two names, it could be its own support or occur in training and test.
    """
    wanted = []
    taken: dict[Path, str] = {}
    for split, listed in lists.items():
        for video in listed:
            sources, listed_name = sources_of(video), f"{video.folder}/{video.name}"
            if not isinstance(sources, str) and taken.setdefault(sources[0], listed_name) != listed_name:
                sources = f"{sources[0].name} is used for {taken[sources[0]]}"
            name = video.name if name_of is None else name_of(video)
            if isinstance(sources, str):
                wanted.append(WantedVideo(split, video.folder, name, None, sources))
            else:
                wanted.append(WantedVideo(split, video.folder, name, sources[0], others=tuple(sources[1:])))
    return [_without_used_files(video, taken) for video in wanted]


def _without_used_files(video: WantedVideo, taken: dict[Path, str]) -> WantedVideo:
    """Returns the video without files that another one uses, and marks the rest as used."""
    if not video.others:
        return video
    return replace(
        video, others=tuple(path for path in video.others if taken.setdefault(path, video.name) == video.name)
    )


def _expected(class_list: ClassList, lists: Lists | None, layout: str) -> dict[tuple[str, str], int]:
    """Returns the expected number of videos of each class, from the class file, a longer list or a known train list."""
    expected = {(split, entry.folder): entry.expected_videos for split in SPLITS for entry in class_list.classes[split]}
    if lists is None:
        return expected
    counts = Counter((split, video.folder) for split, listed in lists.items() for video in listed)
    known = layout == "ssv2_full" and variant_of(layout, lists)
    return {
        key: counts[key] if known and key[0] == "train" else max(number, counts[key])
        for key, number in expected.items()
    }


def _within_classes(
    left_out: Sequence[LeftOut], raw: Sequence[RawVideo], layout: str, folders: Sequence[str]
) -> Iterator[LeftOut]:
    """Yields the files that are not read; those outside the class folders are not videos of the data set."""
    keys = {class_key(folder) for folder in folders}
    for file in left_out:
        yield replace(file, may_be_video=file.may_be_video and not keys.isdisjoint(map(class_key, file.above)))
    for video in raw:
        if not video.above:
            yield LeftOut((), video.path, "it is in no class folder", may_be_video=layout == CUSTOM)


# --- which raw video --------------------------------------------------------------------------------------


def _class_sources(found: FoundVideos) -> SourcesOf:
    return lambda video: found[video.folder].get(video.name, "no such file")


def _numbered_sources(found: dict[str, list[Path]]) -> SourcesOf:
    return lambda video: found.get(video.name, "no such file")


def _kinetics_sources(found: dict[str, list[Path]], folder_of: Mapping[Path, str]) -> SourcesOf:
    """Finds files by YouTube id; files with other times, or in the folder of another class, are different clips."""

    def sources_of(video: ListedVideo) -> list[Path] | str:
        identity, times = _id_and_times(video)
        everywhere = found.get(identity, [])
        paths = [path for path in everywhere if folder_of.get(path, video.folder) == video.folder]
        if not paths:
            return f"only in the folder of {folder_of[everywhere[0]]}" if everywhere else "no such file"
        whole = [path for path in paths if _times(path) is None]
        if times is None:
            return whole + [path for path in paths if path not in whole]
        same = [path for path in paths if _times(path) == times]
        return same + whole or f"found only with other start and end times: {paths[0].name}"

    return sources_of


def _times(path: Path) -> str | None:
    match = KINETICS_NAME.fullmatch(raw_video_name(path.name))
    return match[2] if match else None


def _kinetics_id(name: str) -> str:
    match = KINETICS_NAME.fullmatch(name)
    return match[1] if match else name


def _id_and_times(video: ListedVideo) -> tuple[str, str | None]:
    match = KINETICS_NAME.fullmatch(video.name)
    if match is None:
        raise UserError(f"{video.where}: expected a YouTube id of 11 characters, found {video.name!r}")
    return match[1], match[2]


def _kinetics_names(lists: Lists) -> Callable[[ListedVideo], str]:
    """Names videos by id, so that lists with and without times give one split; by the whole name if two share an id."""
    counts = Counter(_id_and_times(video)[0] for listed in lists.values() for video in listed)

    def name_of(video: ListedVideo) -> str:
        identity = _id_and_times(video)[0]
        return identity if counts[identity] == 1 else video.name

    return name_of
