"""Converts a checkpoint of released code into the format of this framework.

    python run/convert.py released.pt ours.pt

The names of its entries determine the method, their shapes the backbone; every entry is reported. Nothing is written
if the file does not fit the method completely.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

import argparse

from run.command import run_command
from utils.errors import UserError
from utils.files import raise_if_missing, raise_if_not_new

FROM_RELEASE = "the released code wrote"


def main() -> None:
    """Parses the command line and converts one file; PyTorch is imported after that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, metavar="RELEASED", help="the released checkpoint")
    parser.add_argument("ours", type=Path, metavar="OURS", help="file to write; must not exist")
    options = parser.parse_args()
    raise_if_not_new(options.ours)
    raise_if_missing(options.released, FROM_RELEASE)

    import models
    from models.recognise import check_model, recognise_method
    from models.released import convert_released, is_released
    from utils.checkpoint import STATE, load_checkpoint, save_checkpoint
    from utils.logs import set_up_logging

    set_up_logging()
    content = load_checkpoint(options.released, FROM_RELEASE)
    if not is_released(content):
        raise UserError(f"{options.released}: already a checkpoint of this framework; no conversion is needed")
    method = recognise_method(content[STATE], options.released)
    converted, report = convert_released(content, models.method_class(method).released, options.released)
    backbone, image_size = check_model(converted["model"], method, options.released)
    save_checkpoint(options.ours, converted)
    print("\n".join([*report, f"method: {method}", f"backbone: {backbone}, frames of {image_size} pixels"]))
    print(f"written: {options.ours}")


if __name__ == "__main__":
    run_command(main, "start the same command again")
