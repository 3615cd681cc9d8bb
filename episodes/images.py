"""Reads frames stored as images: finds the image files of a folder, orders them and decodes their pixels.

Also WebP animations, which FFmpeg does not read; their frames are composed as in a browser.
"""

import contextlib
import functools
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from episodes.frame_names import FrameGroup, candidates, folder_group, group_names
from episodes.limits import LARGEST_IMAGE_FILE, check_file, check_frame_count, check_frame_size, check_scans
from episodes.pixels import DEEP_MODES, Levels, deep_values, levels_of, to_rgb
from utils.errors import UserError, counted, first_of, reason_of
from videotransforms.volume_transforms import FrameChooser

# Formats that Pillow decodes itself -> suffixes. Excluded: formats that need another program (EPS) or the operating
# system (WMF), icons and game textures, and formats that it only recognises (HDF5, GRIB).
SUFFIXES_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "PNG": (".png",), "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"), "WEBP": (".webp",), "GIF": (".gif",), "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "AVIF": (".avif",), "TGA": (".tga",),
    "QOI": (".qoi",), "SGI": (".sgi", ".rgb", ".rgba", ".bw"), "PCX": (".pcx",), "SUN": (".ras",),
}  # fmt: skip
IMAGE_FORMATS = tuple(SUFFIXES_OF_FORMAT)  # regardless of the suffix
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES_OF_FORMAT.values() for suffix in suffixes)
MAX_NOTES = 10
LEVEL_FRAMES = 8  # of a video, from which the levels of its deep images come

Decoded = TypeVar("Decoded")

# Pillow warns from half its limit on; such an image would take gigabytes.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class FrameFolder:
    """The ordered frames of a folder of images, and the name patterns of used and unused sequences."""

    images: list[Path]
    used: str
    unused: tuple[str, ...]

    @property
    def note(self) -> str:
        """A note on the sequence used as frames; "" if the folder contains only one."""
        return f"frames are {self.used}, not {', '.join(self.unused)}" if self.unused else ""


def list_images(folder: Path) -> list[Path]:
    """Lists the frames of a folder of images in order; see `find_frames`."""
    return find_frames(folder).images


def find_frames(folder: Path, search_subfolders: bool = True) -> FrameFolder:
    """Finds the frames of a video among the images of its folder, or of a folder in it, such as `rgb` beside `flow`.

    They are ordered by the numbers in their names: 2.jpg before 10.jpg, 0.25s before 0.5s.

    Args:
        folder: the folder of the video.
        search_subfolders: whether the frames may be in a subfolder.

    Raises:
        UserError: the folder cannot be listed, contains no image, or several sequences that may be the frames.
    """
    names = _names(folder)
    images = [name for name in names if is_image_name(name)]
    others = [name for name in names if not is_image_name(name)]
    groups = group_names(images)
    if search_subfolders:
        groups += [folder_group(name) for name in others if contains_images(folder / name)]
    best = candidates(groups)
    if len(best) > 1:
        best = _colour_groups(folder, best)
    if not best:
        raise _no_image(folder, others)
    if len(best) > 1:
        sequences = [f"{group.pattern} ({group.names[0]}, {len(group.names)} in all)" for group in best]
        found = ", ".join(first_of(sequences, MAX_NOTES))
        raise UserError(
            f"The folder {folder} contains several sequences of images, and no single one has a usual name for frames "
            f"(img_*, frame_*, rgb/, plain numbers): {found}. Keep one of them in the folder."
        )
    unused = tuple(sorted(group.pattern for group in groups if group is not best[0]))
    if not best[0].pattern.endswith("/"):
        return FrameFolder([folder / name for name in best[0].names], best[0].pattern, unused)
    below = find_frames(folder / best[0].names[0], search_subfolders=False)
    return FrameFolder(below.images, f"{best[0].pattern}{below.used}", (*unused, *below.unused))


def sequence_note(video: Path) -> str:
    """Returns a note on the sequence used as frames; "" for a single sequence and for a video file.

    The note omits the folder's name, so that videos of one kind share a note.
    """
    return find_frames(video).note.replace(video.name, "<video>") if os.path.isdir(video) else ""


def note_summary(notes: Mapping[str, int]) -> list[str]:
    """Returns one line per `sequence_note` with its number of videos, the most common first."""
    common = sorted((note for note in notes if note), key=lambda note: (-notes[note], note))
    lines = [f"{counted(notes[note], 'folder')} with several sequences: {note}" for note in common[:MAX_NOTES]]
    more = len(common) - MAX_NOTES
    return [*lines, f"... and {more} more kinds of folders with several sequences"] if more > 0 else lines


def is_image_name(name: str) -> bool:
    """Returns whether a file name is that of an image; a hidden file is not an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def contains_images(folder: Path) -> bool:
    """Returns whether a path is a folder with images in it."""
    return os.path.isdir(folder) and any(is_image_name(name) for name in _names(folder))


def contains_frames(folder: Path) -> bool:
    """Returns whether a path is a folder with images, or with a subfolder of images such as `rgb`."""
    return contains_images(folder) or (
        os.path.isdir(folder) and any(contains_images(folder / name) for name in _names(folder))
    )


def why_no_frames(folder: Path) -> str:
    """Returns why a folder without images is not a video."""
    return f"it contains no supported image, {_describe_contents(_names(folder))}"


def _names(folder: Path) -> list[str]:
    """Returns the sorted names in a folder, without hidden files."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot list the frame folder {folder}: {error.strerror}; check its permissions.") from error


def _colour_groups(folder: Path, groups: list[FrameGroup]) -> list[FrameGroup]:
    """Selects, among groups that differ only in the suffix, those with the most colours: masks have few."""
    if len({os.path.splitext(group.pattern)[0] for group in groups}) > 1 or groups[0].pattern.endswith("/"):
        return groups
    colours = [_colours(folder / group.names[0]) for group in groups]
    return [group for group, number in zip(groups, colours, strict=True) if number == max(colours)]


def _colours(path: Path) -> int:
    """Returns 2 for a colour image, 1 for 8 bits of grey, 0 for a palette, depth, black and white or damaged image."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return {"L": 1, "LA": 1, "P": 0, "PA": 0, "1": 0}.get(image.mode, 0 if image.mode in DEEP_MODES else 2)
    except Exception:  # Pillow raises many kinds of errors for damaged bytes; reading the image reports them
        return 0


def _no_image(folder: Path, names: list[str]) -> UserError:
    return UserError(
        f"The frame folder {folder} contains no supported image (.jpg, .png, .bmp, .tif, .webp and others), "
        f"{_describe_contents(names)}: extract or convert its frames again, or remove the video."
    )


def _describe_contents(names: list[str]) -> str:
    suffixes = Counter(os.path.splitext(name)[1].lower() or "names without a suffix" for name in names)
    contents = ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common(3))
    return f"only {contents}" if contents else "it is empty"


def read_frame_folder(folder: Path, choose: FrameChooser) -> np.ndarray:
    """Reads the chosen images of a folder: uint8 [T, H, W, 3]; others only to compute the levels of deep images."""
    images = list_images(folder)
    indices = wanted_indices(choose, len(images), folder)
    levels = functools.cache(lambda: _levels(images))
    frames = {index: read_image(images[index], levels) for index in sorted(set(indices))}
    return stack_frames(frames, indices, folder)


def read_image(path: Path, levels: Callable[[], Levels | None] = lambda: None) -> np.ndarray:
    """Reads one image as uint8 [H, W, 3], RGB; see `to_rgb` for `levels`.

    Raises:
        UserError: it cannot be read or decoded.
    """
    return decode_image(_content(path), f"the image {path}", levels)


def decode_image(content: bytes, name: str, levels: Callable[[], Levels | None] = lambda: None) -> np.ndarray:
    """Decodes the content of an image file to uint8 [H, W, 3], RGB.

    Args:
        content: the bytes of the file.
        name: name of the image in messages.
        levels: see `to_rgb`.

    Raises:
        UserError: it cannot be decoded.
    """
    return _decode(content, name, lambda image: to_rgb(image, content, levels))


def _content(path: Path) -> bytes:
    try:
        check_file(path, LARGEST_IMAGE_FILE)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the image {path} ({error.strerror}): replace it or extract it again.") from error


def _decode(content: bytes, name: str, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    """Opens an image and converts it while it is open."""
    check_scans(name, content)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            check_frame_size(name, *image.size)
            # The second picture of an MPO file is a preview, a depth map or the view of the other eye.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise UserError(
                    f"Cannot use {name} as a frame: it contains several pictures. Store each in a separate file."
                )
            return convert(image)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged bytes
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else reason_of(error)
        raise UserError(f"Cannot decode {name} ({reason}): replace it or extract it again.") from error


def _levels(images: list[Path]) -> Levels | None:
    """Computes the levels of a video of deep images from evenly spaced ones; returns None if none is deep."""
    sample = np.linspace(0, len(images) - 1, LEVEL_FRAMES).round().astype(int)
    decoded = []
    for index in np.unique(sample):
        with contextlib.suppress(UserError):  # reading the image as a frame reports it
            content = _content(images[index])
            deep = functools.partial(deep_values, content=content)
            decoded.append(_decode(content, f"the image {images[index]}", deep))
    values = [value for value in decoded if value is not None]
    return levels_of(values) if values else None


# --- WebP animations --------------------------------------------------------------------------------------


def read_webp(path: Path, choose: FrameChooser) -> np.ndarray:
    """Reads the chosen frames of an animation: uint8 [T, H, W, 3], RGB, on a black background.

    Raises:
        UserError: it is damaged or too large.
        IndexError: `choose` returns a frame that does not exist.
    """
    with _opened_webp(path) as image:
        indices = wanted_indices(choose, image.n_frames, path)
        frames = {index: _webp_frame(image, index) for index in sorted(set(indices))}
    return stack_frames(frames, indices, path)


def probe_webp(path: Path) -> int:
    """Decodes the first frame and returns the number of frames; errors as in `read_webp`."""
    with _opened_webp(path) as image:
        _webp_frame(image, 0)
        return int(image.n_frames)


@contextmanager
def _opened_webp(path: Path) -> Iterator[WebPImageFile]:
    try:
        check_file(path, LARGEST_IMAGE_FILE)
        with Image.open(path, formats=("WEBP",)) as image:
            assert isinstance(image, WebPImageFile)
            check_frame_size(path, *image.size)
            check_frame_count(path, image.n_frames)
            yield image
    except (UserError, IndexError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged bytes
        raise UserError(
            f"Cannot decode the animation {path} ({reason_of(error)}): download it again, or remove it."
        ) from error


def _webp_frame(image: Image.Image, index: int) -> np.ndarray:
    """Returns one frame, uint8 [H, W, 3]."""
    image.seek(index)
    image.load()
    return to_rgb(image, b"", lambda: None)  # the content is used only for images of more than 8 bits


# --- the frames of any video ------------------------------------------------------------------------------


def wanted_indices(choose: FrameChooser, count: int, video: Path | str) -> list[int]:
    """Returns the indices that `choose` selects; raises IndexError if one is not in 0 .. count - 1."""
    indices = [int(index) for index in choose(count)]
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise IndexError(f"frames {indices} were chosen from {video}, which has {count}")
    return indices


def stack_frames(frames: dict[int, np.ndarray], indices: Sequence[int], video: Path | str) -> np.ndarray:
    """Stacks frames in the order of `indices`: uint8 [T, H, W, 3]; raises UserError if their sizes differ."""
    first = frames[indices[0]]
    for frame in frames.values():
        if frame.shape != first.shape:
            raise sizes_differ(video, first.shape[:2], frame.shape[:2])
    return np.stack([frames[index] for index in indices])


def sizes_differ(video: Path | str, one: tuple[int, ...], other: tuple[int, ...]) -> UserError:
    """Returns the error for a video with frames of two sizes, (height, width) in pixels each."""
    return UserError(
        f"The frames of {video} differ in size ({one[1]} x {one[0]} and {other[1]} x {other[0]} pixels): convert "
        "the video to one size, or remove it."
    )
