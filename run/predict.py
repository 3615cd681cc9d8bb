"""Classifies your own clips by a few examples of each class.

    python run/predict.py --checkpoint checkpoints/clipspm_demo/checkpoint_best.pt --support my_actions --query clip.mp4
    python run/predict.py --checkpoint best.pt --support my_actions --query clips/ --csv answers.csv --json answers.json
    python run/predict.py --checkpoint best.pt --support my_actions --query long.mp4 --window 2s --stride 1s \\
        --csv timeline.csv --picture timeline.png
    python run/predict.py --checkpoint released.pt --cfg configs/clipspm/released/hmdb51.yaml --support my_actions \\
        --query clip.mp4

The support folder has one folder per class, with one or more clips (video files or folders of images) in it.
Exit code: 0; 1 if some clips are unreadable (they are reported, the others are classified); 2 for a user error.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import checkpoint, run_command
from utils.errors import UserError
from utils.files import raise_if_not_new, write_atomically, writing

if TYPE_CHECKING:
    import numpy as np

    from fsar import Classifier
    from run.clips import Support
    from run.prediction_output import Answer
    from run.timeline import Timeline

INCOMPLETE_EXIT = 1
STANDARD_OUTPUT = Path("-")

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, classifies and reports; returns the exit code."""
    options = parse_arguments(arguments)
    check_outputs(options)

    from run.clips import find_queries, read_support
    from utils.logs import set_up_logging

    set_up_logging()
    support, queries = read_support(options.support), find_queries(options.query)
    if options.picture:
        from run.timeline_picture import raise_if_too_many

        raise_if_too_many(len(queries))

    import fsar
    from run.prediction_output import as_text
    from run.rejection import read_threshold

    classifier = fsar.Classifier(fsar.load(options.checkpoint, options.cfg, options.overrides), options.device)
    rejection = read_threshold(options.reject, options.checkpoint) if options.reject else None
    threshold = rejection["threshold"] if rejection else None
    unreadable: dict[Path, str] = {}
    shots = fit(classifier, support, unreadable)
    if rejection and (rejection["way"], rejection["shot"]) != (way_and_shot := (len(shots), max(shots.values()))):
        logger.warning(
            "--reject %s was measured %d-way %d-shot, and the support folder is %d-way %d-shot: calibrate again",
            options.reject, rejection["way"], rejection["shot"], *way_and_shot,
        )  # fmt: skip
    if options.window:
        timelines = classify_long(classifier, queries, options, unreadable)
        answers, text = describe_timelines(timelines, threshold)
    else:
        timelines = {}
        answers = classify(classifier, queries, threshold, unreadable)
        text = [as_text(answer) for answer in answers]
    if not answers:
        raise UserError("no query clip could be classified; the reasons are above")
    write(options, answers, timelines, {"classes": shots, "rejection": rejection}, unreadable)
    if STANDARD_OUTPUT not in (options.csv, options.json):
        print("\n".join(text))
    return INCOMPLETE_EXIT if unreadable else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    from run.lengths import Length, length

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=checkpoint, required=True, metavar="FILE", help="the trained checkpoint")
    parser.add_argument("--cfg", metavar="FILE", help="config for a checkpoint without one")
    parser.add_argument("--support", type=Path, required=True, metavar="DIR", help="one folder of clips per class")
    parser.add_argument(
        "--query", type=Path, nargs="+", required=True, metavar="CLIP", help="clips, or folders that contain clips"
    )
    parser.add_argument("--window", type=length, metavar="LENGTH", help="classify windows of this length: 2s, 16f")
    parser.add_argument(
        "--stride", type=length, metavar="LENGTH", help="distance between windows (default: half a window)"
    )
    parser.add_argument("--reject", type=Path, metavar="FILE", help="threshold file of run/calibrate.py")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the answers as CSV; - prints them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers as JSON; - prints them")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the timelines: .png, .svg or .pdf")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config; before the options"
    )
    options = parser.parse_intermixed_args(arguments)
    if not options.window and (options.stride or options.picture):
        parser.error(f"{'--stride' if options.stride else '--picture'} needs --window")
    if options.window and not options.stride:
        half = options.window.amount / 2
        options.stride = Length(max(half // 1, 1.0) if options.window.unit == "f" else half, options.window.unit)
    if options.window and options.window.unit != options.stride.unit:
        parser.error("--window and --stride must both be in seconds or both in frames")
    return options


def check_outputs(options: argparse.Namespace) -> None:
    """Raises UserError before any computation if an output exists or cannot be written."""
    raise_if_not_new(*(path for path in (options.csv, options.json, options.picture) if path != STANDARD_OUTPUT))
    if options.csv == options.json == STANDARD_OUTPUT:
        raise UserError("--csv - and --json - both print; write one of them to a file")
    if options.picture:
        picture_suffix(options.picture)

        from run.timeline_picture import matplotlib_pyplot

        matplotlib_pyplot()


def picture_suffix(path: Path) -> str:
    """Returns png, svg or pdf from the name of a picture; raises UserError for other names."""
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UserError(f"--picture {path}: expected a name that ends with .png, .svg or .pdf")
    return suffix


def fit(classifier: "Classifier", support: "Support", unreadable: dict[Path, str]) -> dict[str, int]:
    """Encodes the readable clips of each class; returns how many there are.

    Raises:
        UserError: a class has no readable clip.
    """
    clips = {}
    for name, paths in support.clips.items():
        clips[name] = [frames for _, frames in readable(classifier, paths, unreadable)]
        if not clips[name]:
            raise UserError(f"class {name!r} has no readable clip in {paths[0].parent}; the reasons are above")
    classifier.fit(clips, support.texts)
    return {name: len(frames) for name, frames in clips.items()}


def readable(
    classifier: "Classifier", paths: Sequence[Path], unreadable: dict[Path, str]
) -> Iterator[tuple[Path, "np.ndarray"]]:
    """Yields the readable clips; reports the others and records the reason."""
    for path in paths:
        try:
            frames = classifier.read(path)
        except UserError as error:
            skip(path, error, unreadable)
        else:
            yield path, frames


def skip(path: Path, error: UserError, unreadable: dict[Path, str]) -> None:
    """Reports a clip that is skipped."""
    unreadable[path] = str(error)
    logger.warning("skipped: %s", error)


def classify(
    classifier: "Classifier", queries: Sequence[Path], threshold: float | None, unreadable: dict[Path, str]
) -> "list[Answer]":
    """Returns the answers to the readable clips, with one batch in memory at a time."""
    from fsar import CLIPS_PER_BATCH
    from run.prediction_output import answers_of
    from utils.jobs import progress

    answers: list[Answer] = []
    clips = readable(classifier, progress(queries, len(queries), "classify", unit="clip"), unreadable)
    while batch := list(islice(clips, CLIPS_PER_BATCH)):
        prediction = classifier.predict([frames for _, frames in batch])
        answers += answers_of([str(path) for path, _ in batch], prediction, threshold)
    return answers


def classify_long(
    classifier: "Classifier", queries: Sequence[Path], options: argparse.Namespace, unreadable: dict[Path, str]
) -> "dict[str, Timeline]":
    """Returns the timeline of each readable video."""
    from run.timeline import classify_windows

    timelines = {}
    for path in queries:
        try:
            timelines[str(path)] = classify_windows(classifier, path, options.window, options.stride)
        except UserError as error:
            skip(path, error, unreadable)
    return timelines


def describe_timelines(timelines: "dict[str, Timeline]", threshold: float | None) -> "tuple[list[Answer], list[str]]":
    """Returns the answers to all windows, and the text for each video."""
    from run.prediction_output import answers_of, timeline_as_text

    answers, text = [], []
    for name, timeline in timelines.items():
        window_answers = answers_of([name] * len(timeline.starts), timeline.prediction, threshold, timeline)
        answers += window_answers
        segments = timeline.segments([answer.answer for answer in window_answers])
        text.append(timeline_as_text(name, segments, timeline.unit))
    return answers, text


def write(
    options: argparse.Namespace,
    answers: "list[Answer]",
    timelines: "dict[str, Timeline]",
    about: dict[str, Any],
    unreadable: dict[Path, str],
) -> None:
    """Writes or prints the requested files."""
    from run.prediction_output import as_csv, as_records
    from run.results import as_json

    contents = {}
    if options.csv:
        contents[options.csv] = as_csv(answers)
    if options.json:
        failed = {str(path): reason for path, reason in unreadable.items()}
        record = {"checkpoint": str(options.checkpoint), **about, "answers": as_records(answers), "unreadable": failed}
        contents[options.json] = as_json(record)
    if options.picture:
        from run.timeline_picture import draw

        contents[options.picture] = draw(timelines, answers, picture_suffix(options.picture))
    for path, content in contents.items():
        if path == STANDARD_OUTPUT:
            print(content.decode(), end="")
        else:
            with writing(path):
                write_atomically(path, content)


if __name__ == "__main__":
    run_command(main)
