"""Turns a checkpoint of the published code into one of ours, once and for all.

    python run/convert.py released.pt ours.pt

The method (clipspm, clipfsar or cpm2c) follows from the names of its entries, each of which is reported, and the
backbone from their shapes. A file that does not fit that method completely is refused.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from run.start import start

    start()

import torch
from torch import Tensor

import models
from models.recognise import recognise_backbone
from models.released import OUR_BACKBONE, convert_released, implied_options, is_released, misfits
from run.command import run_command
from utils.checkpoint import STATE, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.utils import set_up_logging
from utils.weights import differences, raise_if_not_finite


def main() -> None:
    """Parses the command line and converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, help="the published checkpoint")
    parser.add_argument("ours", type=Path, help="where to write ours; must not exist")
    options = parser.parse_args()
    set_up_logging()
    if options.ours.exists():
        raise UserError(f"{options.ours} exists already and is not overwritten; name another file")
    content = load_checkpoint(options.released, "the published code wrote")
    if not is_released(content):
        raise UserError(f"{options.released}: a checkpoint of this framework already, which needs no conversion")
    method = method_of(content[STATE], options.released)
    converted, report = convert_released(content, models.method_class(method).released, options.released)
    backbone = raise_if_other_model(converted["model"], method, options.released)
    save_checkpoint(options.ours, converted)
    print("\n".join([*report, f"method: {method}", f"backbone: {backbone}", f"written: {options.ours}"]))


def method_of(state: dict[str, Tensor], path: Path) -> str:
    """Returns the method whose names these are.

    Raises:
        UserError: the names of no method, or not all of them.
    """
    candidates = {name: models.method_class(name).released for name in models.available()}
    found = {name: misfits(state, names) for name, names in candidates.items() if names.used}
    closest = min(found, key=lambda name: len(found[name]))
    if found[closest]:
        raise UserError(
            f"{path}: its entries are not those of {', '.join(found)}; the closest is {closest}, where "
            f"{found[closest][0]}"
        )
    return closest


def raise_if_other_model(weights: dict[str, Tensor], method: str, path: Path) -> str:
    """Raises UserError unless the weights, by our names, are those of a whole model of the method, and are finite.

    Returns:
        its backbone and the size of its frames, for the report.
    """
    if views := [name for name, value in weights.items() if value.nbytes > value.untyped_storage().nbytes()]:
        raise UserError(f"{path}: has fewer numbers for {views[0]} than its shape requires; copy the file again")
    tower = {n.removeprefix(OUR_BACKBONE): value for n, value in weights.items() if n.startswith(OUR_BACKBONE)}
    backbone, image_size = recognise_backbone(tower)
    sizes = implied_options(weights, models.method_class(method).released)
    with torch.device("meta"):  # names and shapes alone
        model = models.build(method, image_size, BACKBONE=backbone, CLIP_WEIGHTS="random", **sizes)
    if found := differences(model.state_dict(), weights):
        raise UserError(
            f"{path}: the weights do not fit {method} with the backbone {backbone}, the closest one "
            f"({'; '.join(found)}); the file is incomplete, or was saved from a changed model"
        )
    raise_if_not_finite(weights, str(path), "copy the file again or use another one")
    return f"{backbone}, frames of {image_size} pixels"


if __name__ == "__main__":
    run_command(main)
