"""Renders the demo sets: small few-shot benchmarks of moving shapes, as real video files, from a seed.

They need no download, so the whole framework can be tried on any machine. The classes of the first set are in
`motions.py`, those of the second in `actions.py`, the drawing in `drawing.py`; this file turns them into clips, files
and split lists:

    <out>/demo.yaml                       the parameters of the set, written first
    <out>/videos/<class>/<class>_0000.mp4
    <out>/splits/classes.yaml, {train,val,test}list03.txt   written last, so they mark a complete set
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import av
import numpy as np
import yaml

from episodes.demo import actions
from episodes.demo.drawing import draw_clip
from episodes.demo.motions import MOTIONS, REVERSED_PAIRS, SPLITS
from utils.errors import UserError, counted
from utils.files import write_atomically
from utils.jobs import block_signals, progress, usable_cores
from utils.yaml_text import read_yaml_file

__all__ = ["DEMO_SETS", "REVERSED_PAIRS", "SPLITS", "DemoSet", "render_clip", "render_demo", "write_video"]

CLIPS_PER_TASK = 16


@dataclass(frozen=True)
class DemoSet:
    """A demo set: its classes, and the function that draws its clips.

    Attributes:
        dataset: the name in configs; the set is rendered into data/<dataset>.
        renderer: a version that changes with the motions, the drawing or the encoding, so that sets do not mix.
        splits: the classes of train, val and test.
        prompts: the words of each class for the text tower.
        train_clips, eval_clips: clips of each training class, and of each validation and test class.
        draw: (random generator, class, frames T, side in pixels) -> uint8 [T, H, W, 3].
    """

    dataset: str
    renderer: int | str
    splits: dict[str, list[str]]
    prompts: dict[str, str]
    train_clips: int
    eval_clips: int
    draw: Callable[[np.random.Generator, str, int, int], np.ndarray]


def _draw_motion(rng: np.random.Generator, name: str, frames: int, size: int) -> np.ndarray:
    """Draws one clip of a motion class: uint8 [T, H, W, 3]."""
    return draw_clip(rng, MOTIONS[name].tracks(rng, frames), size)


DEMO_SETS = {
    "motions": DemoSet(
        dataset="demo",
        renderer=1,
        splits=SPLITS,
        prompts={name: motion.prompt for name, motion in MOTIONS.items()},
        train_clips=200,
        eval_clips=24,
        draw=_draw_motion,
    ),
    "actions": DemoSet(
        dataset="demo_actions",
        renderer="actions 1",
        splits=actions.SPLITS,
        prompts=actions.PROMPTS,
        train_clips=40,
        eval_clips=24,
        draw=actions.draw_action,
    ),
}


def render_clip(
    name: str, seed: int, number: int, frames: int = 24, size: int = 72, demo_set: str = "motions"
) -> np.ndarray:
    """Renders one clip of a class, a pure function of its arguments.

    Args:
        name: a class of the set.
        seed: the seed of the whole set.
        number: number of the clip within its class.
        frames: T.
        size: H and W in pixels.
        demo_set: one of `DEMO_SETS`.

    Returns:
        uint8 [T, H, W, 3], RGB.
    """
    prompts = DEMO_SETS[demo_set].prompts
    if name not in prompts:
        raise UserError(f"unknown class {name!r}; the demo set {demo_set} has: {', '.join(prompts)}")
    # Python's own hash of a string differs from run to run.
    rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode()), number]))
    return DEMO_SETS[demo_set].draw(rng, name, frames, size)


def write_video(path: Path, frames: np.ndarray, fps: int = 12, codec: str = "libx264") -> None:
    """Encodes RGB frames as an .mp4 file; with libx264 the same frames give the same bytes.

    Args:
        path: the file.
        frames: uint8 [T, H, W, 3]; H and W are even.
        fps: frames per second.
        codec: name of an encoder of FFmpeg.
    """
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With more threads the bytes may depend on the machine.
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            # If a side is not a multiple of 16, x264's macroblock tree reads uninitialised memory, and the bytes then
            # differ between runs.
            options = {"preset": "veryfast", "crf": "20", "g": "12", "mbtree": "0"}
            stream.codec_context.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class _Clip:
    """One clip of a set that is rendered into a folder."""

    out: Path
    demo_set: str
    seed: int
    name: str  # of its class
    number: int

    @property
    def path(self) -> Path:
        """The path of its file."""
        return self.out / "videos" / f"{_listed(self.name, self.number)}.mp4"


def _listed(name: str, number: int) -> str:
    """Returns the name of a clip in the list files: its path below the video folder, without the extension."""
    return f"{name}/{name}_{number:04d}"


def _render_to_file(clip: _Clip) -> None:
    """Renders a clip and writes its file."""
    write_video(clip.path, render_clip(clip.name, clip.seed, clip.number, demo_set=clip.demo_set))


def _render_all(clips: list[_Clip], workers: int) -> Iterator[None]:
    """Renders the clips, in this process or in several, and yields after each one."""
    # A process takes about as long to start as a few dozen clips take to render.
    workers = min(workers, -(-len(clips) // (2 * CLIPS_PER_TASK)))
    if workers <= 1:
        yield from map(_render_to_file, clips)
        return
    # The caller may have imported torch, whose threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # first, since it unblocks signals when it starts
    with block_signals(signal.SIGINT):  # not SIGTERM, with which the pool ends them
        pool = context.Pool(workers)
    with pool:
        yield from pool.imap_unordered(_render_to_file, clips, chunksize=CLIPS_PER_TASK)


def _claim_folder(out: Path, parameters: dict[str, int | str]) -> None:
    """Creates the folder and records the parameters of the set in it, or checks the recorded ones.

    Raises:
        UserError: the folder contains another set or other files.
    """
    note = out / "demo.yaml"
    if note.is_file():
        recorded = read_yaml_file(note, str(note), "parameter record")
        if recorded != parameters:
            raise UserError(
                f"{out} contains a demo set with other parameters: {recorded}, requested: {parameters}; "
                "give another folder with --out, or use the parameters of the existing set"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is neither empty nor a demo set (it has no demo.yaml); give another folder with --out")
    header = "# Written by `python run/prepare.py demo`: the parameters of the clips in this folder.\n"
    write_atomically(note, (header + yaml.safe_dump(parameters, sort_keys=False)).encode())


def _split_files(out: Path, demo_set: DemoSet, clips: dict[str, int]) -> dict[Path, str]:
    """Returns the text of each split file; `clips` has the number of videos per class of each split."""
    files: dict[Path, str] = {}
    lines = [
        "# Written by `python run/prepare.py demo`: the classes of the demo set.",
        f"dataset: {demo_set.dataset}",
        "videos: listed  # the three list files name the videos",
        "horizontal_flip: false  # direction is the label",
    ]
    for split, classes in demo_set.splits.items():
        lines.append(f"{split}:")
        for name in classes:
            entry = f"folder: {name}, prompt: {demo_set.prompts[name]}, videos: {clips[split]}"
            lines.append(f"- {{{entry}}}")
        names = [_listed(name, number) for name in classes for number in range(clips[split])]
        files[out / "splits" / f"{split}list03.txt"] = "".join(f"{name}\n" for name in names)
    files[out / "splits" / "classes.yaml"] = "".join(f"{line}\n" for line in lines)
    return files


def render_demo(
    out: Path,
    seed: int = 0,
    train_clips: int | None = None,
    eval_clips: int | None = None,
    workers: int | None = None,
    demo_set: str = "motions",
) -> None:
    """Renders a demo set into a folder, skipping clips that exist.

    Starts worker processes, so a script must call it under `if __name__ == "__main__":`.

    Args:
        out: the folder of the set: new, empty, or with a set of the same parameters.
        seed: the seed of all clips, 0 or more.
        train_clips: clips of each training class; by default those of the set.
        eval_clips: clips of each validation and test class; by default those of the set.
        workers: processes; by default one per CPU core that this process may use.
        demo_set: one of `DEMO_SETS`.

    Raises:
        UserError: a number is out of range, the folder contains something else, or it cannot be written.
    """
    chosen = DEMO_SETS[demo_set]
    train_clips = chosen.train_clips if train_clips is None else train_clips
    eval_clips = chosen.eval_clips if eval_clips is None else eval_clips
    for name, value, minimum in [
        ("seed", seed, 0),
        ("train_clips", train_clips, 1),
        ("eval_clips", eval_clips, 1),
        ("workers", 1 if workers is None else workers, 1),
    ]:
        if value < minimum:
            raise UserError(f"{name} is {value}; expected {minimum} or more")
    if workers is None:
        workers = usable_cores()

    clips = {"train": train_clips, "val": eval_clips, "test": eval_clips}
    parameters: dict[str, int | str] = {
        "renderer": chosen.renderer,
        "seed": seed,
        "train_clips": train_clips,
        "eval_clips": eval_clips,
    }
    try:
        _claim_folder(out, parameters)
        wanted = [
            _Clip(out, demo_set, seed, name, number)
            for split, classes in chosen.splits.items()
            for name in classes
            for number in range(clips[split])
        ]
        missing = [clip for clip in wanted if not clip.path.is_file()]
        split_files = _split_files(out, chosen, clips)
        if not missing and all(path.is_file() for path in split_files):
            print(f"the demo set exists already: {counted(len(wanted), 'clip')} in {out}")
            return
        print(f"rendering {len(missing):,} of {counted(len(wanted), 'clip')} into {out}")
        for _ in progress(_render_all(missing, workers), len(missing), "rendering", "clip", in_lines=True):
            pass
        for path, text in split_files.items():
            write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo set into {out}: {error}") from error
