"""Prepares a data set: decodes each raw video once, packs the frames, writes the lists and the report.

<out>/prepared.yaml                          how the frames are stored, written first
<out>/frames/<class>/<video>/00000001.jpg    a folder for each video, whole or absent
<out>/packed/<split>.sqlite                  the same frames, for training
<out>/splits/trainlist03.txt ...             the prepared videos
<out>/report.json, report.txt                written last
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path

from episodes.data_report import read_report
from episodes.packed import PACKED_SUFFIX, packed_videos, write_packed
from episodes.preparation.checksums import as_saved, changed_videos, checksum, saved_checksums
from episodes.preparation.extract import Record, Task, extract, record_of
from episodes.preparation.plan import Plan, WantedVideo
from episodes.preparation.report import make_report, save_report
from episodes.preparation.settings import FRAMES, PACKED, PARTIAL, SPLIT_LISTS, FrameSettings
from episodes.preparation.several_files import OtherFiles, used_file
from episodes.search import SPLITS
from utils.errors import UserError, counted
from utils.files import exclusive, write_atomically
from utils.jobs import progress

LOCK = ".lock"
OUR_IMAGE = re.compile(r"\d{8}\.jpg")


def own_folders(out: Path) -> list[Path]:
    """Returns the folders below the output folder that contain no raw videos."""
    return [out / FRAMES, out / PACKED, out / PARTIAL]


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Creates and locks the folder; raises UserError while another preparation uses it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = exclusive(out / LOCK, f"the output folder {out}", "give another --out")
    try:
        with lock:
            yield
    finally:
        os.truncate(out / LOCK, 0)  # without the process id, equal preparations leave equal files


def prepare(plan: Plan, out: Path, settings: FrameSettings, workers: int, allowed: int) -> tuple[str, bool]:
    """Performs all steps that are not done yet.

    Args:
        plan: the videos.
        out: the output folder, claimed and locked.
        settings: settings of the frames.
        workers: number of threads, each with a helper process.
        allowed: number of videos that may be missing, including skipped files that may be videos.

    Returns:
        the report as text, and whether no more than `allowed` videos are missing.
    """
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    targets = {video.full_name: _target(out, video, settings) for video in plan.videos}
    records = _already_prepared(plan.videos, targets)
    checksums, broken = _unchanged(out, plan.videos, targets, records)
    tasks = _to_do(plan.videos, targets, records, out, settings)
    print(f"{counted(len(plan.videos), 'video')} requested, {len(records)} already prepared, {len(tasks)} to decode")
    if tasks:
        _remove_packed(out)  # first, so that no store outlives its frames
    try:
        _decode(tasks, OtherFiles(plan.videos), workers, records, checksums, broken)
    finally:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
    prepared = [video for video in plan.videos if video.full_name in records]
    _write_lists(out, prepared)
    _write_packed(out, prepared, targets, records, checksums)
    content = make_report(plan, settings, records, broken)
    sizes = {split: _store(out, split).stat().st_size for split in SPLITS}
    text = save_report(out, content, allowed, plan.layout, as_saved(checksums, sizes), plan.left_out)
    return text, content["missing_videos"] + sum(file.may_be_video for file in plan.left_out) <= allowed


def _decode(
    tasks: Sequence[Task],
    others: OtherFiles,
    workers: int,
    records: dict[str, Record],
    checksums: dict[str, str],
    broken: dict[str, str],
) -> None:
    """Decodes videos, and the other files of broken ones; adds the results to the three dictionaries."""
    while tasks:
        again: list[Task] = []
        with closing(_extract_all(tasks, workers)) as results:  # an error in this block ends the threads first
            for task, problem in progress(results, len(tasks), "decoding", "video", in_lines=True):
                record = record_of(task.target) if problem == "" else None
                if record is not None:
                    records[task.name], checksums[task.name] = record, checksum(task.target)
                    broken.pop(task.name, None)
                else:
                    broken.setdefault(task.name, problem or "its frames cannot be read back")
                    again += others.next(task)
        tasks = again


def _extract_all(tasks: Sequence[Task], workers: int) -> Generator[tuple[Task, str], None, None]:
    """Yields each task with the result of `extract`, in the order in which they finish.

    Threads are enough: each has a helper process that decodes, and Pillow resizes and encodes outside the GIL.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(extract, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the other videos


def _target(out: Path, video: WantedVideo, settings: FrameSettings) -> Path:
    top = out / FRAMES / video.split if settings.layout == "split" else out / FRAMES
    return top / video.folder / video.name


def _already_prepared(videos: Sequence[WantedVideo], targets: Mapping[str, Path]) -> dict[str, Record]:
    """Returns the videos whose frames exist, without those whose raw video has another size now."""
    records = {}
    for video in videos:
        record = record_of(targets[video.full_name])
        # The raw video may have been removed after its frames were written.
        if record and (video.source is None or used_file(video, record)):
            records[video.full_name] = record
    return records


def _unchanged(
    out: Path, videos: Sequence[WantedVideo], targets: Mapping[str, Path], records: dict[str, Record]
) -> tuple[dict[str, str], dict[str, str]]:
    """Removes from `records` the videos whose frames have changed since the report was written.

    Returns:
        name -> checksum of the others, and name -> problem of the changed ones that have no raw video.
    """
    before = _previous_checksums(out)
    checksums, broken = {}, {}
    done = [video for video in videos if video.full_name in records]
    for video in progress(done, len(done), "comparing", "video", in_lines=True):
        name = video.full_name
        current = checksum(targets[name])
        if before.get(name, current) == current:
            checksums[name] = current
            continue
        del records[name]
        if video.source is None:
            broken[name] = "its frames have changed since they were prepared, and the raw video is missing"
        else:
            print(f"changed since it was prepared, and prepared again: {name}")
    return checksums, broken


def _previous_checksums(out: Path) -> dict[str, str]:
    """Returns class/video -> checksum from the report; empty if there is none or it was edited."""
    try:
        saved = saved_checksums(read_report(out))
    except UserError:
        return {}
    return {} if saved is None else saved[0]


def _to_do(
    videos: Sequence[WantedVideo],
    targets: Mapping[str, Path],
    records: Mapping[str, Record],
    out: Path,
    settings: FrameSettings,
) -> list[Task]:
    """Returns the videos to decode, and removes their incomplete folders."""
    tasks = []
    for video in videos:
        name = video.full_name
        if video.source is not None and name not in records:
            _remove_incomplete(targets[name])
            tasks.append(Task(name, video.source, targets[name], out / PARTIAL, settings))
    return tasks


def _remove_incomplete(target: Path) -> None:
    """Removes an incomplete folder of frames; raises UserError if it contains anything else."""
    if not target.exists():
        return
    foreign = [name for name in os.listdir(target) if not OUR_IMAGE.fullmatch(name)]
    if foreign:
        raise UserError(f"{target} contains {foreign[0]}, which this command did not write; move it elsewhere")
    shutil.rmtree(target)


def _write_lists(out: Path, prepared: Sequence[WantedVideo]) -> None:
    for split in SPLITS:
        lines = [f"{video.full_name}\n" for video in prepared if video.split == split]
        write_atomically(out / SPLIT_LISTS / f"{split}list03.txt", "".join(lines).encode())


def _remove_packed(out: Path) -> None:
    for split in SPLITS:
        _store(out, split).unlink(missing_ok=True)


def _store(out: Path, split: str) -> Path:
    return out / PACKED / f"{split}{PACKED_SUFFIX}"


def _write_packed(
    out: Path,
    prepared: Sequence[WantedVideo],
    targets: Mapping[str, Path],
    records: Mapping[str, Record],
    checksums: Mapping[str, str],
) -> None:
    """Writes the packed stores that are missing or outdated."""
    for split in SPLITS:
        path = _store(out, split)
        names = [video.full_name for video in prepared if video.split == split]
        if _packed_or_none(path) != {name: records[name].kept for name in names} or changed_videos(
            ((name, path / name) for name in names), checksums
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            files = _files(names, targets, records)
            write_packed(path, progress(files, len(names), f"packing {split}", "video", in_lines=True))


def _packed_or_none(path: Path) -> dict[str, int] | None:
    try:
        return packed_videos(path) if path.is_file() else None
    except UserError:
        return None


def _files(
    names: Sequence[str], targets: Mapping[str, Path], records: Mapping[str, Record]
) -> Iterator[tuple[str, list[Path]]]:
    """Yields each video with the paths of its frames, in order."""
    for name in names:
        yield name, [targets[name] / f"{number:08d}.jpg" for number in range(1, records[name].kept + 1)]
