"""Prepares and checks data sets: `python run/prepare.py COMMAND --help` lists the options of a command.

demo       renders a small set of moving shapes that the demo configs train on; needs no download.
hmdb51 ucf101 kinetics ssv2_full ssv2_small
           turns the raw videos of a benchmark into frames, packed stores, lists and a report on the videos.
custom     does the same for your own videos, one folder per class.
check      compares the data of a config with its report, in seconds, before training; --full reads all of the data.

Exit code: 0 if the data is complete, 1 if videos are missing or the data differs from its report, 2 for a user error,
130 for Ctrl-C, 75 for SIGTERM.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

import argparse
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from episodes.demo.render import DEMO_SETS, render_demo
from episodes.preparation.check import check_prepared
from episodes.preparation.custom import (
    check_enough_classes,
    class_file,
    draw_split,
    find_classes,
    new_class_list,
    split_of_lists,
)
from episodes.preparation.custom_config import CONFIG, MIN_WAY, config_file
from episodes.preparation.plan import CUSTOM, Plan, make_plan
from episodes.preparation.prepare import locked_folder, own_folders, prepare
from episodes.preparation.report import MAX_NAMED, split_index
from episodes.preparation.settings import (
    NOTE,
    PACKED,
    PRESETS,
    PUBLISHED,
    SPLIT_LISTS,
    FrameSettings,
    check_apart,
    claim_folder,
)
from episodes.search import OPTIONAL_SPLITS, SPLITS
from episodes.splits import CLASS_FILE, ClassList, SplitIndex, quoted, raise_problems, read_class_list
from run.command import run_command
from utils.config import REPOSITORY, load_config
from utils.errors import UserError
from utils.files import write_atomically
from utils.jobs import usable_cores
from utils.schema import DATASETS
from utils.yaml_text import one_line, printable

INCOMPLETE_EXIT = 1
WITHOUT = {"train": "the data set can only be used for testing", "val": "training runs on it without validation"}


def _run_demo(arguments: argparse.Namespace) -> int:
    """Renders a demo set and prints the next command."""
    dataset = DEMO_SETS[arguments.set].dataset
    folder = Path("data") / dataset
    out = arguments.out or folder
    render_demo(out, arguments.seed, arguments.train_clips, arguments.eval_clips, arguments.workers, arguments.set)
    print(f"videos: {out / 'videos'}")
    print(f"splits: {out / 'splits'}")
    keys = {} if out == folder else {"DATA.DATA_DIR": out / "videos", "DATA.SPLIT_DIR": out / "splits"}
    print(f"next:   python run/run.py --cfg configs/clipspm/{dataset}.yaml{_as_overrides(keys)}")
    return 0


def _run_benchmark(arguments: argparse.Namespace) -> int:
    """Prepares one of the five benchmarks."""
    name, out = arguments.dataset, arguments.out
    settings = _settings(arguments)
    check_apart(out, arguments.videos)
    class_list = _class_list((arguments.split_dir or REPOSITORY / "splits" / DATASETS[name]) / CLASS_FILE)
    plan = make_plan(name, class_list, arguments.videos, _lists(arguments), own_folders(out))
    with locked_folder(out):
        claim_folder(out, name, settings)
        if arguments.split_dir:
            write_atomically(out / SPLIT_LISTS / CLASS_FILE, class_list.path.read_bytes())
        complete = _prepare(plan, arguments, settings)
    _print_impossible_episodes(sorted(REPOSITORY.glob(f"configs/*/{name}.yaml")), _prepared_splits(class_list, out))
    print(f"next: python run/run.py --cfg configs/clipspm/{name}.yaml{_overrides(arguments)}")
    return 0 if complete else INCOMPLETE_EXIT


def _run_custom(arguments: argparse.Namespace) -> int:
    """Prepares the user's own videos."""
    out = arguments.out
    name = printable(arguments.name or out.absolute().name)
    settings = _settings(arguments)
    check_apart(out, arguments.videos)
    lists = _lists(arguments)
    file = out / SPLIT_LISTS / CLASS_FILE
    split, counts, origin = _split(arguments, lists)
    is_new = not ((out / NOTE).is_file() and file.is_file())  # else keep the user's edits
    class_list = new_class_list(file, name, split, counts) if is_new else _class_list(file)
    check_enough_classes(class_list, _remedy(arguments, None if is_new else file))
    for optional in OPTIONAL_SPLITS:
        if not class_list.classes[optional]:
            print(f"{optional} has no classes; {WITHOUT[optional]}")
    plan = make_plan(CUSTOM, class_list, arguments.videos, lists, own_folders(out))
    with locked_folder(out):  # writes files, so it comes after all checks
        claim_folder(out, name, settings, origin)
        if is_new:
            write_atomically(file, class_file(class_list).encode())
        notes = (*plan.notes, *_unknown_classes(class_list, counts))
        complete = _prepare(replace(plan, notes=notes), arguments, settings)
    indexes, config = _prepared_splits(class_list, out), out / CONFIG
    if not config.exists():  # else keep the user's edits
        write_atomically(config, config_file(indexes, class_list.dataset, out).encode())
    _print_impossible_episodes([config], indexes)
    print(f"prompts, mirroring and expected videos: edit {file}; way, shots and everything else: edit {config}")
    print(f"next: python run/run.py --cfg {shlex.quote(str(config))}")
    return 0 if complete else INCOMPLETE_EXIT


def _run_check(arguments: argparse.Namespace) -> int:
    """Checks the data of a config."""
    config = load_config(arguments.config, arguments.overrides).config

    from run.data import impossible_episodes, load_splits_of  # with PyTorch, which no worker process needs

    indexes = load_splits_of(config, None)
    text, intact = check_prepared(indexes, Path(config.DATA.DATA_DIR), arguments.full)
    too_small = impossible_episodes(config, indexes)
    print("\n".join([text, *(f"too small for the config: {problem}" for problem in too_small)]))
    return 0 if intact and not too_small else INCOMPLETE_EXIT


# --- parts ------------------------------------------------------------------------------------------------


def _split(
    arguments: argparse.Namespace, lists: Path | None
) -> tuple[dict[str, list[str]], dict[str, int], dict[str, object]]:
    """Divides the user's classes: by lists, by the folders above the classes, or at random.

    Returns:
        split -> classes; class -> number of videos; the origin of the split, for the note in the output folder.
    """
    classes = find_classes(arguments.videos, own_folders(arguments.out))
    if lists:
        split, counts = split_of_lists(lists, classes)
        return split, counts, {"lists": True}
    if classes.split is not None:
        print(f"the split comes from the folders above the classes in {arguments.videos}; none is drawn")
        return classes.split, classes.counts, {"split_folders": True}
    split = draw_split(classes.counts, arguments.ratios, arguments.seed)
    return split, classes.counts, {"ratios": arguments.ratios, "seed": arguments.seed}


def _prepare(plan: Plan, arguments: argparse.Namespace, settings: FrameSettings) -> bool:
    """Prepares, prints the report, and returns whether it is complete."""
    workers = usable_cores() if arguments.workers is None else arguments.workers
    text, complete = prepare(plan, arguments.out, settings, workers, arguments.allow_missing)
    print(text, end="")
    return complete


def _prepared_splits(class_list: ClassList, out: Path) -> dict[str, SplitIndex]:
    """Returns the prepared splits; a class without videos keeps its place."""
    lists = {split: (out / SPLIT_LISTS / f"{split}list03.txt").read_text(encoding="utf-8") for split in SPLITS}
    return {
        split: split_index(class_list, split, out, names.split("\n")[:-1])
        for split, names in lists.items()
        if class_list.classes[split]
    }


def _print_impossible_episodes(configs: Sequence[Path], indexes: Mapping[str, SplitIndex]) -> None:
    """Prints each class and split that is too small for one of the configs, once."""
    from run.data import impossible_episodes

    paths_of: dict[str, Path] = {}
    for path in configs:
        with suppress(UserError):  # a config that was edited may be invalid; the run will report it
            for problem in impossible_episodes(load_config(path).config, indexes):
                paths_of.setdefault(problem, path)
    lines = [f"too small for {path}: {problem}" for problem, path in paths_of.items()]
    more = [f"... and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    print("".join(f"{line}\n" for line in lines[:MAX_NAMED] + more), end="")


def _class_list(path: Path) -> ClassList:
    """Reads a class file. Raises UserError for any mistake in it."""
    if not path.is_file():
        raise UserError(f"no class list: expected {path}; give a folder that has one with --split-dir")
    problems: list[str] = []
    class_list = read_class_list(path, problems)
    raise_problems(problems)
    return class_list


def _settings(arguments: argparse.Namespace) -> FrameSettings:
    """Returns the preset with the requested changes."""
    settings = PRESETS[arguments.preset]
    requested = {key: getattr(arguments, key) for key in ("size", "shape", "quality", "layout")}
    settings = replace(settings, **{key: value for key, value in requested.items() if value is not None})
    if arguments.frames is not None:
        settings = replace(settings, frames=None if arguments.frames == "all" else int(arguments.frames))
    settings.check()
    for option, value, minimum in [
        ("--workers", arguments.workers, 1),
        ("--allow-missing", arguments.allow_missing, 0),
    ]:
        if value is not None and value < minimum:
            raise UserError(f"{option} is {value}; expected {minimum} or more")
    return settings


def _lists(arguments: argparse.Namespace) -> Path | None:
    """Returns --lists, which must not be the folder that this command writes to."""
    lists: Path | None = arguments.lists
    if lists is not None and lists.resolve() == (arguments.out / SPLIT_LISTS).resolve():
        raise UserError(f"--lists {lists} is where this command writes its own lists; keep yours in another folder")
    return lists


def _remedy(arguments: argparse.Namespace, class_file: Path | None) -> str:
    """Returns how to get more classes into a split of the user's own data.

    Args:
        arguments: those of `prepare.py custom`.
        class_file: the existing class file, or None.
    """
    if class_file is not None:
        return f"move or add classes to it in {class_file}, or give another --out"
    if arguments.lists:
        return f"name videos of more classes in its list in {arguments.lists}"
    splits = sum(ratio > 0 for ratio in arguments.ratios)
    return f"add class folders to {arguments.videos} until it has {MIN_WAY * splits} or more"


def _overrides(arguments: argparse.Namespace) -> str:
    """Returns the overrides for data that is not where the shipped configs expect it."""
    out = arguments.out
    keys = {} if out.as_posix() == f"data/{arguments.dataset}" else {"DATA.DATA_DIR": out / PACKED}
    if arguments.split_dir or (keys and arguments.lists):
        keys["DATA.SPLIT_DIR"] = out / SPLIT_LISTS
    return _as_overrides(keys)


def _as_overrides(keys: dict[str, Path]) -> str:
    """Returns paths as `KEY=VALUE` overrides for the end of a command."""
    return "".join(f" {shlex.quote(f'{key}={one_line(path.as_posix())}')}" for key, path in keys.items())


def _unknown_classes(class_list: ClassList, counts: dict[str, int]) -> tuple[str, ...]:
    """Returns a note on classes that are not in the class file."""
    known = {entry.folder for split in SPLITS for entry in class_list.classes[split]}
    unknown = sorted(set(counts) - known)
    if not unknown:
        return ()
    return (f"classes that are not in {CLASS_FILE}, so not used: {', '.join(unknown)}",)


# --- the command line -------------------------------------------------------------------------------------


def _add_parser(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    """Adds a command; `text` appears in its own help and in that of run/prepare.py."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    """Declares `prepare.py demo`."""
    parser = _add_parser(commands, "demo", "render a demo set of moving shapes")
    parser.add_argument(
        "--set", choices=DEMO_SETS, default="motions",
        help="motions: classes differ only over time; actions: pairs of an object and a motion, whose names matter",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: data/demo or data/demo_actions)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument(
        "--train-clips", type=int, metavar="N", help="clips per train class (default: 200, or 40 for actions)"
    )
    parser.add_argument("--eval-clips", type=int, metavar="N", help="clips per val or test class (default: 24)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU core)")
    parser.set_defaults(command=_run_demo)


def _add_benchmark(commands: argparse._SubParsersAction, name: str) -> None:
    """Declares `prepare.py hmdb51` and so on."""
    parser = _add_parser(commands, name, f"prepare {name} from its raw videos")
    _add_common(parser, Path("data") / name)
    parser.add_argument(
        "--split-dir", type=Path, metavar="DIR", help="folder with a classes.yaml to use instead of the shipped one"
    )
    parser.set_defaults(command=_run_benchmark, dataset=name)


def _add_custom(commands: argparse._SubParsersAction) -> None:
    """Declares `prepare.py custom`."""
    parser = _add_parser(commands, CUSTOM, "prepare your own videos, one folder per class")
    _add_common(parser, None)
    parser.add_argument("--name", help="name of the data set (default: that of the output folder)")
    parser.add_argument(
        "--ratios", type=float, nargs=3, default=[0.6, 0.2, 0.2], metavar=("TRAIN", "VAL", "TEST"),
        help="proportions of the classes (default: 0.6 0.2 0.2); 0 for no train or val classes; not used with --lists",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random split (default: %(default)s)"
    )
    parser.set_defaults(command=_run_custom)


def _add_common(parser: argparse.ArgumentParser, out: Path | None) -> None:
    """Declares the options that all data sets share."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the raw videos")
    parser.add_argument(
        "--out", type=Path, default=out, required=out is None, metavar="DIR",
        help="output folder" + (" (default: %(default)s)" if out else ""),
    )  # fmt: skip
    parser.add_argument("--lists", type=Path, metavar="DIR", help="folder with the train, val and test lists")
    parser.add_argument("--preset", choices=PRESETS, default=PUBLISHED, help="frame settings (default: %(default)s)")
    parser.add_argument("--frames", type=_frames, metavar="N", help="frames to store of each video, or `all`")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="length of both sides, or of the shorter one")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--square", dest="shape", action="store_const", const="square", help="stretch to a square")
    shape.add_argument("--short-side", dest="shape", action="store_const", const="short", help="keep the aspect ratio")
    parser.add_argument("--quality", type=int, metavar="Q", help="JPEG quality as ffmpeg's -q:v, from 1 (best) to 31")
    parser.add_argument("--layout", choices=["class", "split"], help="frames/CLASS/VIDEO or frames/SPLIT/CLASS/VIDEO")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU core)")
    parser.add_argument(
        "--allow-missing", type=int, default=0, metavar="N",
        help="videos that may be missing or left out (default: %(default)s)",
    )  # fmt: skip


def _frames(text: str) -> str:
    """Parses a number or `all`."""
    try:
        return text if text == "all" else str(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number or all, found {quoted(text)}") from error


def _add_check(commands: argparse._SubParsersAction) -> None:
    """Declares `prepare.py check`."""
    parser = _add_parser(commands, "check", "check the data of a config before training")
    parser.add_argument("config", metavar="CONFIG", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value of the config")
    parser.add_argument("--full", action="store_true", help="compare the frames of all videos, not only of a sample")
    parser.set_defaults(command=_run_check)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code, 1 for incomplete data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    _add_demo(commands)
    for name in DATASETS:
        _add_benchmark(commands, name)
    _add_custom(commands)
    _add_check(commands)
    arguments, rest = parser.parse_known_args(words)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # argparse splits overrides that stand before and after an option
    return arguments.command(arguments)


if __name__ == "__main__":
    run_command(main, "start the same command again to continue")
