"""Turns a checkpoint of the published code into one of ours, once and for all.

    python run/convert.py released.pt ours.pt

The method (clipspm, clipfsar or cpm2c) follows from the names of its entries, each of which is reported.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from run.start import start

    start()

import models
from run.command import run_command
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.released import STATE, convert_released, fits, is_released


def main() -> None:
    """Parses the command line and converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, help="the published checkpoint")
    parser.add_argument("ours", type=Path, help="where to write ours; must not exist")
    options = parser.parse_args()
    if options.ours.exists():
        raise UserError(f"{options.ours} exists already and is not overwritten; name another file")
    content = load_checkpoint(options.released, "the published code wrote")
    if not is_released(content):
        raise UserError(f"{options.released}: no checkpoint of the published code (no {STATE} in it)")
    method = method_of(content[STATE], options.released)
    converted, report = convert_released(content, models.method_class(method).released, options.released)
    save_checkpoint(options.ours, converted)
    print("\n".join([*report, f"method: {method}", f"written: {options.ours}"]))


def method_of(state: dict, path: Path) -> str:
    """The method whose names these are.

    Raises:
        UserError: none of ours.
    """
    candidates = [name for name in models.available() if models.method_class(name).released.used]
    for name in candidates:
        if fits(state, models.method_class(name).released):
            return name
    raise UserError(f"{path}: its entries are those of none of {', '.join(candidates)}")


if __name__ == "__main__":
    run_command(main)
