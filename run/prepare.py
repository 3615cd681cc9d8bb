"""Prepares data sets: `python run/prepare.py <what> --help` tells the options of each.

demo    renders the small set of moving shapes that the demo configs train on; needs no download.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse

from episodes.demo import render_demo
from utils.errors import UserError


def _run_demo(arguments: argparse.Namespace) -> None:
    """Render the demo set and say how to go on."""
    render_demo(arguments.out, arguments.seed, arguments.train_clips, arguments.eval_clips, arguments.workers)
    print(f"videos: {arguments.out / 'videos'}")
    print(f"splits: {arguments.out / 'splits'}")
    print("next:   python run/run.py --cfg configs/clipspm/demo.yaml")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    """Declare `prepare.py demo`."""
    parser = commands.add_parser("demo", help="render the demo set of moving shapes")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every clip (default: %(default)s)")
    parser.add_argument("--train-clips", type=int, default=200, help="per train class (default: %(default)s)")
    parser.add_argument("--eval-clips", type=int, default=24, help="per val or test class (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU core)")
    parser.set_defaults(command=_run_demo)


def main() -> int:
    """Run one subcommand and return the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Prepare data sets.")
    commands = parser.add_subparsers(required=True, metavar="what")
    _add_demo(commands)
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
