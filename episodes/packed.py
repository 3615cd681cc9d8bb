"""The packed store: the JPEG frames of all videos of a split in one file, read by random access.

The file is an SQLite database, `<split>.sqlite`. Table `frames` contains the content of the JPEG files, video by video;
table `videos` assigns frames to videos. Any number of processes may read it at once.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from episodes.images import decode_image, stack_frames, wanted_indices
from utils.errors import UserError, counted
from utils.files import raise_if_lfs_pointer
from videotransforms.volume_transforms import FrameChooser

PACKED_SUFFIX = ".sqlite"

# SQLite's header fields for the application: the kind of file and its version.
APPLICATION_ID = 0x46534152
VERSION = 1

JPEG_START = b"\xff\xd8"

TABLES = """
CREATE TABLE frames (id INTEGER PRIMARY KEY, jpeg BLOB NOT NULL);
CREATE TABLE videos (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE, -- class/video
    first INTEGER NOT NULL,    -- id of its first frame
    frames INTEGER NOT NULL    -- how many it has
);
"""

# Counts the tables: a view in their place could have any number of rows.
COUNT_TABLES = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('frames', 'videos')"
# Counts the videos whose frames do not follow those of the previous video, so that a damaged number cannot silently
# give a video other frames.
COUNT_MISPLACED = """
SELECT count(*) FROM (
    SELECT
        typeof(name) = 'text' AND typeof(frames) = 'integer' AND frames > 0 AND first IS
        1 + coalesce(sum(frames) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS in_place
    FROM videos
) WHERE NOT in_place
"""


# --- writing ----------------------------------------------------------------------------------------------


def write_packed(path: Path, videos: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Writes a packed store; the same videos give the same bytes with the same release of SQLite.

    Args:
        path: the store; an existing one is replaced once the new one is complete.
        videos: the name `class/video` and the JPEG files in order, for each video.

    Raises:
        UserError: a file is unreadable or not JPEG, a video has no frame, a name occurs twice, or the store cannot be
            written, for example because the disk is full; an incomplete store is deleted.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed run
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            _fill(connection, videos)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, sqlite3.Error)):
            raise UserError(
                f"Cannot write the packed store {path} ({error}): check its folder and the disk."
            ) from error
        raise


def _fill(connection: sqlite3.Connection, videos: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Writes the tables into an empty database."""
    connection.execute("PRAGMA journal_mode = OFF")  # an incomplete file is not kept anyway
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA secure_delete = ON")  # else unused bytes may contain earlier memory contents
    connection.executescript(TABLES)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("BEGIN")
    rows: dict[str, tuple[int, int]] = {}  # written last, so that all names lie together on the disk
    first = 1
    for name, files in videos:
        _check_video(name, files, rows)
        frames = ((first + number, _read_jpeg(file)) for number, file in enumerate(files))
        connection.executemany("INSERT INTO frames VALUES (?, ?)", frames)
        rows[name] = (first, len(files))
        first += len(files)
    names = ((number, name, *place) for number, (name, place) in enumerate(rows.items(), start=1))
    connection.executemany("INSERT INTO videos VALUES (?, ?, ?, ?)", names)
    connection.execute("COMMIT")
    connection.execute(f"PRAGMA user_version = {VERSION}")  # from now on it counts as a store


def _check_video(name: str, files: Sequence[Path], rows: dict[str, tuple[int, int]]) -> None:
    """Raises UserError for a video that cannot be stored."""
    if not files:
        raise UserError(f"The video {name!r} has no frame: extract its frames again, or remove it.")
    if name in rows:
        raise UserError(f"The video {name!r} occurs twice, but a packed store contains each video once: rename one.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The video name {name!r} is not UTF-8, which a packed store needs: rename it.") from error


def _read_jpeg(file: Path) -> bytes:
    """Returns the content of a JPEG file; raises UserError if it is unreadable or not a JPEG file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the frame {file} ({error.strerror}): extract it again.") from error
    if not content.startswith(JPEG_START):
        raise UserError(f"The frame {file} is not a JPEG file, which a packed store needs: extract it again.")
    return content


# --- reading ----------------------------------------------------------------------------------------------


def packed_videos(path: Path) -> dict[str, int]:
    """Returns the name and the number of frames of every video of a store, in the order in which they were written.

    Raises:
        UserError: the file is missing, damaged, or not a packed store.
    """
    with _damage_as_user_error(path):
        return dict(_connection(path).execute("SELECT name, frames FROM videos ORDER BY id"))


def read_packed(path: Path, name: str, choose: FrameChooser) -> np.ndarray:
    """Reads and decodes only the chosen frames of one video.

    Args:
        path: the store.
        name: name of the video, `class/video`.
        choose: maps the number of frames of the video to the wanted indices, in any order, repeats allowed.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        UserError: the store or the video is missing, a frame cannot be decoded, or the frames differ in size.
        IndexError: `choose` returns a frame that does not exist.
    """
    video = f"{name} in {path}"
    with _damage_as_user_error(path):
        connection = _connection(path)
        first, count = _place(connection, path, name)
        indices = wanted_indices(choose, count, video)
        frames = {
            index: decode_image(_jpeg(connection, first + index), f"frame {index} of {video}")
            for index in sorted(set(indices))
        }
    return stack_frames(frames, indices, video)


def probe_packed(path: Path, name: str) -> int:
    """Decodes the first frame of a video and returns its number of frames; errors as in `read_packed`."""
    with _damage_as_user_error(path):
        connection = _connection(path)
        first, count = _place(connection, path, name)
        decode_image(_jpeg(connection, first), f"frame 0 of {name} in {path}")
    return count


def packed_jpegs(path: Path, name: str) -> Iterator[bytes]:
    """Yields the content of the JPEG files of a video, in order; errors as in `read_packed`."""
    with _damage_as_user_error(path):
        connection = _connection(path)
        first, count = _place(connection, path, name)
        for frame in range(first, first + count):
            yield _jpeg(connection, frame)


def in_packed(path: Path) -> tuple[Path, str] | None:
    """Returns the store and the name of a video given as `<store>/<class>/<video>`; None for any other path."""
    store = path.parent.parent
    if store.suffix != PACKED_SUFFIX or not store.is_file():
        return None
    return store, f"{path.parent.name}/{path.name}"


def _place(connection: sqlite3.Connection, path: Path, name: str) -> tuple[int, int]:
    """Returns the id of the first frame of a video and its number of frames; raises UserError if it is missing."""
    place = connection.execute("SELECT first, frames FROM videos WHERE name = ?", (name,)).fetchone()
    if place is None:
        raise UserError(f"There is no video {name!r} in the packed store {path}: prepare it again, or check the list.")
    return place


def _jpeg(connection: sqlite3.Connection, frame: int) -> bytes:
    """Returns the content of one JPEG file; raises sqlite3.DatabaseError if it is missing."""
    row = connection.execute("SELECT jpeg FROM frames WHERE id = ?", (frame,)).fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise sqlite3.DatabaseError(f"frame {frame} is missing")
    return row[0]


class _Opened(threading.local):
    """The open stores of this thread: (process, path) -> identity of the file and its connection.

    The process is part of the key, so a connection copied by a fork is neither used nor closed.
    """

    def __init__(self) -> None:
        self.stores: dict[tuple[int, Path], tuple[tuple[int, ...], sqlite3.Connection]] = {}


_opened = _Opened()


def _connection(path: Path) -> sqlite3.Connection:
    """Returns this thread's connection to a store, opened when it is first needed.

    Raises:
        UserError: the file is missing or not a packed store.
        sqlite3.Error: it is damaged.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"Cannot open the packed store {path} ({error.strerror}): check the data folder, or prepare it again."
        ) from error
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (os.getpid(), path)
    known, connection = _opened.stores.get(key, (None, None))
    if connection is None or known != identity:  # the file was replaced
        # `immutable` avoids locks, which some network file systems do not support, and a check for changes per query.
        raise_if_lfs_pointer(path)
        connection = sqlite3.connect(path.absolute().as_uri() + "?mode=ro&immutable=1", uri=True, isolation_level=None)
        _check_format(connection, path)
        _opened.stores[key] = (identity, connection)
    return connection


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Raises UserError for a database that `write_packed` did not write completely, sqlite3.Error for a damaged one."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID or version == 0:
        raise UserError(f"The file {path} is not a complete packed store: prepare it again.")
    if version != VERSION:
        raise UserError(f"The packed store {path} has version {version}, expected version {VERSION}: prepare it again.")
    (tables,) = connection.execute(COUNT_TABLES).fetchone()
    if tables != 2:
        raise sqlite3.DatabaseError("a table is missing")
    (misplaced,) = connection.execute(COUNT_MISPLACED).fetchone()
    if misplaced:
        raise sqlite3.DatabaseError(f"the frames of {counted(misplaced, 'video')} are not where they were written")


@contextlib.contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    """Turns SQLite's error about a damaged or foreign file into a UserError."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"The packed store {path} is damaged ({error}): copy it or prepare it again.") from error
