"""Renders the demo set: a small few-shot benchmark of moving shapes, as real video files, from a seed.

It needs no download, so the whole framework can be tried on any machine. The classes and their motions are in
`motions.py`, the drawing in `drawing.py`; this file turns them into clips, files and split lists:

    <out>/demo.yaml                       the parameters of the set, written first
    <out>/videos/<class>/<class>_0000.mp4
    <out>/splits/classes.yaml, {train,val,test}list03.txt   written last, so they mark a complete set
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import zlib
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import av
import numpy as np
import yaml

from episodes.demo.drawing import draw_clip
from episodes.demo.motions import MOTIONS, REVERSED_PAIRS, SPLITS
from utils.counts import counted
from utils.errors import UserError
from utils.files import write_whole
from utils.jobs import children_block, progress, usable_cores
from utils.yaml_text import read_yaml_file

__all__ = ["REVERSED_PAIRS", "SPLITS", "render_clip", "render_demo", "write_video"]

# Raise it when a change to the motions, the drawing or the encoding changes the clips: sets do not mix.
RENDERER_VERSION = 1
CLIPS_PER_TASK = 16


def render_clip(motion: str, seed: int, number: int, frames: int = 24, size: int = 72) -> np.ndarray:
    """One clip of a motion class, a pure function of its arguments.

    Args:
        motion: a class name of `SPLITS`.
        seed: of the whole set.
        number: of the clip within its class.

    Returns:
        uint8 [T, H, W, 3], RGB; T is `frames`, H and W are `size`.
    """
    if motion not in MOTIONS:
        raise UserError(f"unknown motion class {motion!r}; the demo set has: {', '.join(MOTIONS)}")
    # Python's own hash of a string differs from run to run.
    rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(motion.encode()), number]))
    return draw_clip(rng, MOTIONS[motion].tracks(rng, frames), size)


def write_video(path: Path, frames: np.ndarray, fps: int = 12, codec: str = "libx264") -> None:
    """Encodes RGB frames as an .mp4 file; with libx264 the same frames give the same bytes.

    Args:
        frames: uint8 [T, H, W, 3]; H and W are even.
        codec: the name of one of FFmpeg's encoders.
    """
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With more threads the bytes may depend on the machine.
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            # At sides that are not a multiple of 16, x264's macroblock tree reads memory that it never set, and
            # the bytes then differ from run to run.
            options = {"preset": "veryfast", "crf": "20", "g": "12", "mbtree": "0"}
            stream.codec_context.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    write_whole(path, buffer.getvalue())


def _clip_name(motion: str, number: int) -> str:
    """What the list files call a clip: its path below the video folder, without the extension."""
    return f"{motion}/{motion}_{number:04d}"


def _clip_path(out: Path, motion: str, number: int) -> Path:
    """Returns the path of a clip of the set in `out`."""
    return out / "videos" / f"{_clip_name(motion, number)}.mp4"


def _render_to_file(task: tuple[Path, int, str, int]) -> None:
    """Renders the clip (out, seed, motion, number) and writes its file."""
    out, seed, motion, number = task
    write_video(_clip_path(out, motion, number), render_clip(motion, seed, number))


def _render_all(tasks: list[tuple[Path, int, str, int]], workers: int) -> Iterator[None]:
    """Renders the clips, in this process or in several, and yields after each one."""
    # A process takes about as long to start as a few dozen clips take to render.
    workers = min(workers, -(-len(tasks) // (2 * CLIPS_PER_TASK)))
    if workers <= 1:
        yield from map(_render_to_file, tasks)
        return
    # The caller may have imported torch, whose threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # first, since its start lets signals through
    with children_block(signal.SIGINT):  # not SIGTERM, with which the pool ends them
        pool = context.Pool(workers)
    with pool:
        yield from pool.imap_unordered(_render_to_file, tasks, chunksize=CLIPS_PER_TASK)


def _claim_folder(out: Path, parameters: dict[str, int]) -> None:
    """Creates the folder and records the set's parameters in it, or checks those recorded there.

    Raises:
        UserError: the folder holds another set or other files.
    """
    note = out / "demo.yaml"
    if note.is_file():
        found = read_yaml_file(note, str(note), "note")
        if found != parameters:
            raise UserError(
                f"{out} holds a demo set with other parameters: {found}, asked for: {parameters}; "
                "give another folder with --out, or use the parameters of the existing set"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is neither empty nor a demo set (it has no demo.yaml); give another folder with --out")
    header = "# Written by `python run/prepare.py demo`: what the clips of this folder were rendered with.\n"
    write_whole(note, (header + yaml.safe_dump(parameters, sort_keys=False)).encode())


def _split_files(out: Path, clips: dict[str, int]) -> dict[Path, str]:
    """The text of each split file; `clips` has the number of videos per class of each split."""
    files: dict[Path, str] = {}
    lines = [
        "# Written by `python run/prepare.py demo`: the classes of the demo set.",
        "dataset: demo",
        "videos: listed  # the three list files name the videos",
        "horizontal_flip: false  # direction is the label",
    ]
    for split, motions in SPLITS.items():
        lines.append(f"{split}:")
        for motion in motions:
            entry = f"folder: {motion}, prompt: {MOTIONS[motion].prompt}, videos: {clips[split]}"
            lines.append(f"- {{{entry}}}")
        names = [_clip_name(motion, number) for motion in motions for number in range(clips[split])]
        files[out / "splits" / f"{split}list03.txt"] = "".join(f"{name}\n" for name in names)
    files[out / "splits" / "classes.yaml"] = "".join(f"{line}\n" for line in lines)
    return files


def render_demo(
    out: Path,
    seed: int = 0,
    train_clips: int = 200,
    eval_clips: int = 24,
    workers: int | None = None,
) -> None:
    """Renders the demo set into a folder, skipping clips that exist.

    Starts worker processes, so a script must call it under `if __name__ == "__main__":`.

    Args:
        out: the folder of the set; new, empty, or with a set of the same parameters.
        seed: every clip is a function of it, 0 or more.
        train_clips: clips of each training class.
        eval_clips: clips of each validation and test class.
        workers: processes; by default one per CPU core that this process may use.
    """
    for name, value, least in [
        ("seed", seed, 0),
        ("train_clips", train_clips, 1),
        ("eval_clips", eval_clips, 1),
        ("workers", 1 if workers is None else workers, 1),
    ]:
        if value < least:
            raise UserError(f"{name} is {value}; it has to be {least} or more")
    if workers is None:
        workers = usable_cores()

    clips = {"train": train_clips, "val": eval_clips, "test": eval_clips}
    parameters = {
        "renderer": RENDERER_VERSION,
        "seed": seed,
        "train_clips": train_clips,
        "eval_clips": eval_clips,
    }
    try:
        _claim_folder(out, parameters)
        missing = [
            (out, seed, motion, number)
            for split, motions in SPLITS.items()
            for motion in motions
            for number in range(clips[split])
            if not _clip_path(out, motion, number).is_file()
        ]
        split_files = _split_files(out, clips)
        total = sum(clips[split] * len(motions) for split, motions in SPLITS.items())
        if not missing and all(path.is_file() for path in split_files):
            print(f"the demo set is already there: {counted(total, 'clip')} in {out}")
            return
        print(f"rendering {len(missing):,} of {counted(total, 'clip')} into {out}")
        for _ in progress(_render_all(missing, workers), len(missing), "rendering", "clip", in_lines=True):
            pass
        for path, text in split_files.items():
            write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo set into {out}: {error}") from error
