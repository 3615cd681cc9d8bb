"""Finds the frames among the images of a folder: names are grouped by the text around the frame number.

A folder may contain several sequences: colour and optical flow, masks, depth, thumbnails, a second camera. Two images
belong together if their names differ only in the frame number. If one group has a known name for colour frames
(`img_*.jpg`, `frame_*.png`, plain numbers), it is used; otherwise the only group with an unknown name.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import IntEnum

# A date and time as recorders write it (2024-01-31_12-59-58.123, 20240131_125958_123), or a number, which may have a
# sign, decimals and an exponent: frame_0.25s, t_-3, 5e-05. A hyphen after a letter or digit is not a sign.
DATE = r"(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d"
NUMBER = re.compile(
    rf"{DATE}[-_T .]{{0,3}}[0-2]\d[-_:.h]?[0-5]\d[-_:.m]?[0-5]\d(?:[-_.,s]\d{{1,9}})?(?!\d)"
    r"|(?<!\d)[0-2]\d([-:.])[0-5]\d\1[0-5]\d(?:[.,]\d{1,9})?(?!\d)"
    r"|(?:(?<![A-Za-z0-9])-)?\d+(?:[.,]\d+)?(?:e[-+]\d+)?",
    re.ASCII,
)
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
SIZE = re.compile(r"(?<=[sb])[-_]\d{3,4}(x\d{3,4}|p)?$")  # jpegs_256, rgb_320x240, videos_240p
LAST_WORD = re.compile(r"[-_. ]([A-Za-z]+)$")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")

COLOUR_WORDS = re.compile(
    r"im(g|age)?s?|(raw)?frames?|rawimages|fr|(rgb|bgr)s?|colou?rs?|pic(ture)?s?|photos?|jpe?gs?|pngs?|bmp|stills?|raw|"
    r"snapshot|screenshot|vlcsnap|orig(inal)?|vid(eo)?s?|clips?|mp|avi|extracted|webcam|ezgif|out(put)?|"
    r"s|secs?|seconds?|ms|t|time|no"  # units: frame_0.25s
)
FRAME_FOLDERS = frozenset({
    "rgb", "frames", "rgb_frames", "rawframes", "images", "imgs", "img", "color", "colour", "jpegs", "jpgs", "pngs",
})  # fmt: skip
VIDEO_WORDS = frozenset({"video", "videos", "vid", "clip", "clips", "mp", "avi"})
OTHER_WORDS = re.compile(
    r"(opt(ical)?|of|tvl)?flows?[xyuv]?|optical|farneback|raft|rgbdiff|diff(erence)?|residuals?|motion|mv|warp(ed)?|"
    r"mask(s|ed)?|seg(m|ments?|mentations?|masks?)?|semantic|instances?|panoptic|labels?|gt|groundtruth|ann(o|otated|"
    r"otations?)?|depths?|depthmaps?|disp(arity|arities)?|normals?|ir|nir|infrared|thermal|flir|poses?|skel(eton)?s?|"
    r"keypoints?|kps?|joints?|heatmaps?|saliency|attention|edges?|canny|sobel|hog|contours?|matte|mattes|alpha|"
    r"trimap|foreground|background|confidence|conf|events?|spec|spectrograms?|mel|audio|thumb(nail)?s?|preview|previews|"
    r"icon|small|lowres|poster|cover|overlay|vis|viz|bbox(es)?|boxes|detections?|crops?|faces?|pred(iction)?s?|"
    r"lists?|splits?|meta(data)?|docs?|scripts?|features?|checkpoints?|logs?"
)
FLOW_AXES = frozenset("xyuv")
# Words next to a number: a camera, each with its sequence; a time or a part of the video, within one sequence.
CAMERA_WORDS = frozenset({"cam", "camera", "webcam", "view", "kinect", "device", "lens"})
PART_WORDS = frozenset({
    "h", "hr", "hour", "m", "min", "minute", "s", "sec", "second", "seconds", "ms", "t", "ts", "time", "timestamp",
    "shot", "scene", "part", "seg", "segment", "chunk", "block", "batch", "gop", "key", "keyframe",
})  # fmt: skip
LONG_NUMBER = 8  # digits; such a number is a date or a time stamp


class Kind(IntEnum):
    """The kind of a group of images, by its words; the smallest kind in a folder is used."""

    COLOUR = 0
    UNKNOWN = 1
    OTHER = 2  # flow, masks, depth, thumbnails, ...


@dataclass(frozen=True)
class FrameGroup:
    """Images of a folder whose names differ only in the frame number.

    Attributes:
        pattern: their common name, `img_*.jpg`.
        names: file names in the order of their numbers; for a folder, its name.
        words: the words around the number, in lower case.
        kind: the kind of the group, by its words.
    """

    pattern: str
    names: tuple[str, ...]
    words: frozenset[str]
    kind: Kind = Kind.UNKNOWN


@dataclass(frozen=True)
class _Name:
    """A file name cut at its numbers: texts[0] numbers[0] texts[1] ... suffix."""

    name: str
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    suffix: str

    def pattern(self, open_columns: Iterable[int]) -> str:
        """Returns the name with `*` for the numbers in these positions."""
        wildcards = set(open_columns)
        numbers = ["*" if position in wildcards else number for position, number in enumerate(self.numbers)]
        return "".join(text + number for text, number in zip(self.texts, [*numbers, ""], strict=True)) + self.suffix


def group_names(names: Iterable[str]) -> list[FrameGroup]:
    """Groups the names of the images of one folder, and classifies each group by its words."""
    cut = [_cut(name) for name in names]
    numbered = [name for name in cut if name.numbers]
    groups = _one_by_leading_number(numbered) or _by_surrounding_text(numbered)
    groups = _classify(groups + _without_number([name for name in cut if not name.numbers]))
    if not numbered:
        return groups
    return [group if _is_numbered(group) else replace(group, kind=Kind.OTHER) for group in groups]


def candidates(groups: Sequence[FrameGroup]) -> list[FrameGroup]:
    """Returns the groups that may be the frames: those with a colour name, else an unknown name, else all."""
    best = min((group.kind for group in groups), default=Kind.OTHER)
    return [group for group in groups if group.kind == best]


def folder_group(name: str) -> FrameGroup:
    """Returns a folder as a group, such as `rgb/` or `flow_x/`; one with other words or a number is of unknown kind.

    `clip_1` is a video; `jpegs_256` contains frames of that size.
    """
    plain = SIZE.sub("", name)
    words = _words([plain])
    kind = _kind(words) if words else Kind.UNKNOWN
    if kind is Kind.COLOUR and re.search(r"\d", plain):
        kind = Kind.UNKNOWN
    return FrameGroup(f"{name}/", (name,), words, kind)


def is_other_form(name: str) -> bool:
    """Returns whether a folder is another form of the videos beside it: `thumbs/`, `flow_x/`, but not `face_1/`."""
    if SIZE.sub("", name.lower()) in FRAME_FOLDERS:
        return True
    plain = re.fullmatch(r"[A-Za-z]+([-_ ][A-Za-z]+)*", SIZE.sub("", name)) is not None
    known = all(
        OTHER_WORDS.fullmatch(word) or COLOUR_WORDS.fullmatch(word) or word in FLOW_AXES
        for word in folder_group(name).words
    )
    return plain and known and folder_group(name).kind is Kind.OTHER


def other_forms_by_name(names: Iterable[str]) -> dict[str, set[str]]:
    """Returns name -> names of which it may be another form: `a_flow` of `a` and `a_rgb`, `a_rgb` of `a`.

    Args:
        names: the names of the videos and folders in one folder, without suffixes.
    """
    beside = set(names)
    cuts = {name: cuts for name in beside if (cuts := _cuts(name))}
    colour: dict[str, set[str]] = defaultdict(set)
    for name, cut in cuts.items():
        for stem, kind in cut.items():
            if kind is Kind.COLOUR:
                colour[stem].add(name)
    forms = {}
    for name, cut in cuts.items():
        originals = {stem for stem in cut if stem in beside}
        originals |= {other for stem, kind in cut.items() if kind is Kind.OTHER for other in colour[stem]}
        if originals:
            forms[name] = originals
    return forms


def _cuts(name: str) -> dict[str, Kind]:
    """Returns the name without known words at its end -> the kind of these words, for each number of words."""
    cuts, rest, words = {}, SIZE.sub("", name), frozenset[str]()
    while match := LAST_WORD.search(rest):
        rest, word = rest[: match.start()], match[1].lower()
        words |= {word}
        if not (OTHER_WORDS.fullmatch(word) or word in FRAME_FOLDERS | FLOW_AXES):
            break
        if any(map(OTHER_WORDS.fullmatch, words)):
            cuts[rest] = Kind.OTHER
        elif words <= FRAME_FOLDERS:
            cuts[rest] = Kind.COLOUR
    return cuts


def colour_folders(names: Sequence[str]) -> list[str]:
    """Returns the folders with a known name for videos or, if there are none, for colour frames."""
    colour = [group for group in map(folder_group, names) if group.kind is Kind.COLOUR]
    videos = [group for group in colour if group.words & VIDEO_WORDS]
    return [group.names[0] for group in videos or colour]


# --- numbers ----------------------------------------------------------------------------------------------


def _cut(name: str) -> _Name:
    stem, suffix = os.path.splitext(unicodedata.normalize("NFKC", name))  # full-width digits are digits
    texts, numbers, end = [], [], 0
    for match in NUMBER.finditer(stem):
        texts.append(stem[end : match.start()])
        numbers.append(match[0])
        end = match.end()
    return _Name(name, (*texts, stem[end:]), tuple(numbers), suffix)


def _values(numbers: Sequence[str]) -> list[Hashable]:
    """Returns sort keys for the numbers in one position of several names."""
    parts = [re.findall(r"\d+", number) for number in numbers]
    simple = all(re.fullmatch(r"-?\d+([.,]\d+)?(e[-+]\d+)?", number) for number in numbers)
    fractions = [number.split(mark)[1] for number in numbers for mark in ".," if mark in number]
    # 1.9, 1.10, 1.11 are versions; decimals have one width, or no zeros at the end.
    counts = len({len(part) for part in fractions}) > 1 and any(re.fullmatch(r"\d+0", part) for part in fractions)
    if not simple or counts:
        return [tuple(map(int, part)) for part in parts]
    values = [Decimal(number.replace(",", ".")) for number in numbers]
    # A hyphen in front of every number is not a sign: abcdefghij_-000001.jpg
    return [abs(value) for value in values] if all(number.startswith("-") for number in numbers) else list(values)


def _ordered(group: Sequence[_Name]) -> list[_Name]:
    """Sorts names of one shape by their numbers, the first number first."""
    columns = [_values([name.numbers[position] for name in group]) for position in range(len(group[0].numbers))]
    keys = zip(*columns, [name.name for name in group], strict=True)
    return [name for _, name in sorted(zip(keys, group, strict=True), key=lambda pair: pair[0])]


# --- groups -----------------------------------------------------------------------------------------------


def _by_surrounding_text(names: Sequence[_Name]) -> list[FrameGroup]:
    """Groups names by their texts, by numbers that are labels (cam1_0001, cam2_0001), and by the suffix."""
    shapes: dict[tuple[str, ...], list[_Name]] = defaultdict(list)
    for name in names:
        shapes[name.texts].append(name)
    return [group for shape in shapes.values() for group in _of_one_shape(shape)]


def _of_one_shape(names: Sequence[_Name]) -> list[FrameGroup]:
    """Groups names that differ in numbers and suffixes."""
    columns = [_values([name.numbers[position] for name in names]) for position in range(len(names[0].numbers))]
    varying = [position for position, column in enumerate(columns) if len(set(column)) > 1]
    # The frame number has the most values; in a tie, it is the last one.
    frame = max(varying, key=lambda position: (len(set(columns[position])), position), default=len(columns) - 1)
    labels = [p for p in varying if p != frame and not _belongs_to_frame(names, p, columns[p], columns[frame])]
    groups: dict[Hashable, list[tuple[Hashable, _Name]]] = defaultdict(list)
    for row, name in enumerate(names):
        groups[tuple(columns[p][row] for p in labels)].append((columns[frame][row], name))
    shown = {frame, *varying} - set(labels)
    return [FrameGroup(_pattern(g, shown), tuple(name.name for name in _ordered(g)), _words(g[0].texts))
            for members in groups.values() for g in _without_duplicates(members)]  # fmt: skip


def _belongs_to_frame(
    names: Sequence[_Name], position: int, column: Sequence[Hashable], frame: Sequence[Hashable]
) -> bool:
    """Returns whether a number belongs to the frame, such as a time stamp or a shot number, and is not a label.

    Each frame must have only one value of the number. This is not enough, since two cameras may have no frame number in
    common (cam1_0001, cam2_0002): the number must also be long, differ in most images, or follow a word for a time or a
    part of the video.
    """
    value_of_frame: dict[Hashable, Hashable] = {}
    if not all(value_of_frame.setdefault(number, value) == value for number, value in zip(frame, column, strict=True)):
        return False
    before, after = names[0].texts[position : position + 2]
    words = {word.lower() for word in [*WORD.findall(before)[-1:], *re.findall(r"^[A-Za-z]+", after)]}
    if words & CAMERA_WORDS:
        return False
    is_long = all(sum(map(str.isdigit, name.numbers[position])) >= LONG_NUMBER for name in names)
    return bool(words & PART_WORDS) or is_long or 2 * len(set(column)) > len(column)


def _without_duplicates(members: Sequence[tuple[Hashable, _Name]]) -> list[list[_Name]]:
    """Returns one group if each frame number occurs once; else splits by suffix, and by leading zeros of the number."""
    for part in (lambda name: None, _family, _spelling):
        groups: dict[Hashable, list[tuple[Hashable, _Name]]] = defaultdict(list)
        for number, name in members:
            groups[part(name)].append((number, name))
        if all(len({number for number, _ in group}) == len(group) for group in groups.values()):
            return [[name for _, name in group] for group in groups.values()]
    return [[name] for _, name in members]


def _family(name: _Name) -> str:
    """Returns the suffix in lower case, the same for all JPEG suffixes."""
    suffix = name.suffix.lower()
    return ".jpg" if suffix in JPEG_SUFFIXES else suffix


def _spelling(name: _Name) -> Hashable:
    """Returns the suffix as written, and the lengths of the numbers that begin with zeros."""
    return name.suffix, tuple(len(number) for number in name.numbers if re.match("0.", number))


def _pattern(group: Sequence[_Name], shown: Iterable[int]) -> str:
    suffixes = sorted({name.suffix for name in group})
    return ", ".join(dict.fromkeys(replace(group[0], suffix=suffix).pattern(shown) for suffix in suffixes))


def _one_by_leading_number(names: Sequence[_Name]) -> list[FrameGroup]:
    """Returns one group if the text behind (or before) the frame number, such as a hash, differs in each image.

    frame_0001_jpg.rf.3fa9c1.jpg, frame_0002_jpg.rf.b07e55.jpg
    """
    if len(names) < 3 or 2 * len({name.texts for name in names}) <= len(names):
        return []
    for end in (0, -1):
        numbers = _values([name.numbers[end] for name in names])
        if len({name.texts[end] for name in names}) == 1 and len(set(numbers)) == len(names):
            ordered = sorted(zip(numbers, names, strict=True), key=lambda pair: (pair[0], pair[1].name))
            pattern = f"{names[0].texts[0]}*" if end == 0 else f"*{names[0].texts[-1]}{names[0].suffix}"
            return [FrameGroup(pattern, tuple(name.name for _, name in ordered), _words([names[0].texts[end]]))]
    return []


def _without_number(names: Sequence[_Name]) -> list[FrameGroup]:
    """Groups images without a number by suffix, in alphabetical order; each one of kind OTHER is a separate group."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: name.name):
        separate = name.name if _kind(_words(name.texts)) is Kind.OTHER else ""
        groups[separate, _family(name)].append(name.name)
    result = []
    for members in groups.values():
        pattern = members[0] if len(members) == 1 else f"{members[0]}, ..."
        words = _words([os.path.splitext(members[0])[0]] if len(members) == 1 else [])
        result.append(FrameGroup(pattern, tuple(members), words))
    return result


def _is_numbered(group: FrameGroup) -> bool:
    return bool(_cut(group.names[0]).numbers)


# --- words ------------------------------------------------------------------------------------------------


def _words(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(word.lower() for text in texts for word in WORD.findall(text))


def _classify(groups: Sequence[FrameGroup]) -> list[FrameGroup]:
    """Sets the kind of each group; words that all groups have, such as the video's name, do not count."""
    common = frozenset.intersection(*(group.words for group in groups)) if len(groups) > 1 else frozenset()
    return [replace(group, kind=_kind(group.words - common)) for group in groups]


def _kind(words: frozenset[str]) -> Kind:
    if any(OTHER_WORDS.fullmatch(word) for word in words) or (words and words <= FLOW_AXES):
        return Kind.OTHER
    return Kind.COLOUR if all(COLOUR_WORDS.fullmatch(word) for word in words) else Kind.UNKNOWN
