"""Runs all rows, columns and seeds of a sweep file and writes their tables; or tunes a row on the validation classes.

    python run/sweep.py configs/sweeps/demo_all_methods.yaml
    python run/sweep.py configs/sweeps/clipspm_ablation.yaml --gpus 0,1 DATA.DATA_DIR=/data/hmdb51/packed
    python run/sweep.py configs/sweeps/clipspm_ablation.yaml --dry-run
    python run/sweep.py configs/sweeps/clipspm_ablation.yaml --only-table
    python run/sweep.py configs/sweeps/demo_search.yaml --search 20

The same command again continues: finished runs are kept, interrupted ones resume, failed ones are reported.
docs/experiments.md describes sweep files and the files of a sweep's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import number, run_command
from run.sweeping.sweep_file import SweepFile, load_sweep_file
from utils.errors import UserError, counted, first_of

if TYPE_CHECKING:  # these import PyTorch
    from run.sweeping.cells import Results
    from run.sweeping.execution import Machine
    from run.sweeping.folder import SweepFolder
    from run.sweeping.plan import SweepRun

MAX_FAILURES = 5  # failed runs whose last lines are shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, checks all runs, and starts those that are not finished.

    Raises:
        UserError: the sweep file or a config is not valid, the folder is in use, or a run has failed.
    """
    options = parse_arguments(arguments)
    file = load_sweep_file(options.file)

    from run.sweeping.cells import Results
    from run.sweeping.checks import check_data
    from run.sweeping.execution import Execution
    from run.sweeping.folder import FAILED, FINISHED, SweepFolder, unique
    from run.sweeping.local import raise_if_gpus_are_missing
    from run.sweeping.plan import plan
    from run.sweeping.table import write_tables
    from utils.logs import set_up_logging

    set_up_logging()
    if options.gpus and not (options.dry_run or options.only_table):
        raise_if_gpus_are_missing(options.gpus)
    if options.search:
        search(file, options)
        return
    runs = plan(file, options.out, options.overrides, options.rows)
    folder = SweepFolder(options.out)
    if options.dry_run:
        print("\n".join(listing(runs, folder, options.jobs or max(1, len(options.gpus)))))
        return
    results = Results(runs, folder, file.BASELINE)
    if options.only_table and not any(folder.status(run) == FINISHED for run in runs):
        raise UserError(f"{options.out}: contains no finished run of {options.file}; run the sweep, or correct --out")
    with folder.lock():
        title = title_of(file, options.overrides)
        if options.only_table:
            report(title, results, options.out, file.BASELINE)
            return
        to_do = [
            run
            for run in unique(runs)
            if (status := folder.status(run)) != FINISHED and (status != FAILED or options.retry)
        ]
        check_data(to_do)
        write = partial(write_tables, options.out, title, baseline=file.BASELINE)
        Execution(unique(runs), folder, machine_of(options, folder), lambda: write(cells=results.cells())).run(to_do)
        report(title, results, options.out, file.BASELINE)
        raise_if_failed(unique(runs), folder)


def search(file: SweepFile, options: argparse.Namespace) -> None:
    """Runs the unfinished trials of a search, and prints the table of all trials.

    Raises:
        UserError: the search space or a config is not valid, the folder is in use, or no trial has finished.
    """
    from run.sweeping.checks import check_data
    from run.sweeping.folder import SweepFolder
    from run.sweeping.search import FOLDER, NO_TEST, Search, Trials, base_run, trial_runs
    from run.sweeping.search_table import best_of, write_search
    from run.sweeping.space import checked_space, describe_space, with_values
    from run.sweeping.study import Study

    run = base_run(file, options.out, options.overrides, options.rows)
    without_test = with_values(run, {NO_TEST: 0})
    variants = checked_space(without_test, file.SEARCH)
    path = options.out / FOLDER
    trials, folder = Trials(path, without_test, file.SEARCH, options.search), SweepFolder(path)
    if options.dry_run:
        lines = trials.listing(options.jobs or max(1, len(options.gpus)))
        print(run.title, *describe_space(file.SEARCH), *lines, sep="\n")
        return
    write = partial(write_search, path, title_of(file, options.overrides), run, file.SEARCH, trials.by_number)
    with SweepFolder(options.out).lock():
        if not options.only_table:
            study, to_do = Study(file.SEARCH, run.config, run.seed), trials.to_do(options.retry)
            if to_do:
                check_data(variants)
            runs = trial_runs(without_test, path, trials)
            execution = Search(runs, folder, machine_of(options, folder), study, trials, write)
            execution.run([trial for trial in runs if trial.number in to_do])
        write()
    print((path / "search.md").read_text(encoding="utf-8"), f"written to {path}", sep="\n")
    if not options.only_table and (left := trials.to_do(retry=False)):
        raise UserError(f"{len(left)} of {trials.number} trials have not ended; the same command continues")
    if not best_of(trials.by_number):
        raise UserError(f"no trial has finished; see their output in {path / 'logs'}")


def machine_of(options: argparse.Namespace, folder: "SweepFolder") -> "Machine":
    """Returns the machine that runs the sweep."""
    from run.sweeping.cluster import Cluster
    from run.sweeping.local import LocalMachine

    if options.slurm:
        return Cluster(folder, options.slurm, options.jobs)
    return LocalMachine(options.jobs or max(1, len(options.gpus)), options.gpus)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="SWEEP", help="the sweep's YAML file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: checkpoints/sweeps/<name of SWEEP>)")
    parser.add_argument(
        "--jobs", type=number(int, 1), metavar="N", help="runs at a time (default: 1, or one for each GPU)"
    )
    parser.add_argument("--gpus", type=_gpus, default=[], metavar="0,1", help="GPUs, one for each run")
    parser.add_argument(
        "--slurm", type=_slurm, default={}, metavar="partition=P,gres=gpu:1,time=4:00:00",
        help="submit the runs to SLURM with these parameters of sbatch, and wait for them",
    )  # fmt: skip
    parser.add_argument(
        "--search", type=number(int, 1), metavar="N", help="tune the keys of SEARCH in N trials on validation classes"
    )
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="NAME",
        help="only rows whose name contains one of these; write KEY=VALUE before it",
    )  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their expected time, and stop")
    parser.add_argument("--only-table", action="store_true", help="write the tables of the finished runs, and stop")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value in all runs")
    options = parser.parse_intermixed_args(arguments)
    options.out = options.out or Path("checkpoints") / "sweeps" / options.file.stem
    if options.gpus and (options.jobs or 1) > len(options.gpus):
        parser.error(f"--jobs {options.jobs} needs as many GPUs, but --gpus lists {len(options.gpus)}")
    if options.gpus and options.slurm:
        parser.error("--gpus is for this machine; on a cluster, --slurm gres=gpu:1 gives each job a GPU")
    if options.search and options.slurm and not options.jobs:
        parser.error("--search on a cluster needs --jobs N, the number of trials that run at a time")
    return options


def _gpus(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different GPUs such as 0,1, found {text!r}")
    return names


def _slurm(text: str) -> dict[str, Any]:
    from run.sweeping.cluster import parsed_parameters

    try:
        return parsed_parameters(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def listing(runs: "Sequence[SweepRun]", folder: "SweepFolder", jobs: int) -> list[str]:
    """Returns a line for each run with its state and expected duration, and a line with the total."""
    from run.sweeping.folder import FINISHED, duration, unique

    runs = unique(runs)
    estimates = folder.estimates(runs)
    states = {run.name: folder.status(run) for run in runs}
    to_do = [run for run in runs if states[run.name] != FINISHED]
    lines = [
        f"{states[run.name]:<11} {duration(estimates[run.name]) if run.name in estimates else '?':>7}  {run.title}"
        for run in runs
    ]
    known = all(run.name in estimates for run in to_do)
    seconds = sum(estimates.get(run.name, 0.0) for run in to_do) / jobs
    time = f"about {duration(seconds)} with --jobs {jobs}" if known else "their time is known once a run has finished"
    return [*lines, f"{counted(len(runs), 'run')}, {len(runs) - len(to_do)} finished, {len(to_do)} to do: {time}"]


def title_of(file: SweepFile, overrides: Sequence[str]) -> str:
    """Returns the title of the tables, with the overrides that change a number, since the file's title may differ."""
    from run.sweeping.plan import WITHOUT_EFFECT

    without_effect = (*WITHOUT_EFFECT, "DATA.DATA_DIR", "DATA.SPLIT_DIR")
    words = [word for word in overrides if not word.startswith(without_effect)]
    return f"{file.TITLE}, with {' '.join(words)}" if words else file.TITLE


def report(title: str, results: "Results", out: Path, baseline: str) -> None:
    """Writes the tables and the figure, and prints the tables."""
    from run.sweeping.figure import draw
    from run.sweeping.table import write_tables

    cells = results.cells()
    try:
        figure, files = draw(out, cells, baseline), "table.md, .tex, .csv, .html, figure.svg and .png"
    except ImportError as error:
        figure = ""
        files = f"table.md, .tex, .csv and .html; the figure needs requirements-report.txt ({error})"
    write_tables(out, title, cells, baseline, figure)
    print((out / "table.md").read_text(encoding="utf-8"), f"written to {out}: {files}", sep="\n")


def raise_if_failed(runs: "Sequence[SweepRun]", folder: "SweepFolder") -> None:
    """Raises UserError with the last lines of each run that failed or was stopped."""
    from run.sweeping.folder import FAILED, FINISHED

    failed = [run for run in runs if folder.status(run) == FAILED]
    shown = [f"{run.title} ({run.log}) {folder.failure(run)}" for run in failed]
    if failed:
        raise UserError(
            "\n\n".join(
                [
                    f"{len(failed)} of {len(runs)} runs failed; the same command with --retry runs them again",
                    *first_of(shown, MAX_FAILURES, " runs"),
                ]
            )
        )
    if stopped := [run for run in runs if folder.status(run) != FINISHED]:
        raise UserError(f"{len(stopped)} of {len(runs)} runs were stopped; the same command resumes them")


if __name__ == "__main__":
    run_command(main, "local runs are saved, jobs on a cluster keep running; the same command continues")
