"""Trains the small CLIPs of the demo, which know the words of its classes: `MODEL.CLIP_WEIGHTS: demo`.

    python run/pretrain_demo.py --out weights.safetensors
    python run/pretrain_demo.py --backbone tiny-vit --out weights.safetensors

Both towers of `tiny`, the default backbone, learn from rendered frames and their captions with CLIP's contrastive loss;
no frame shows a motion, and no caption names one. On so few frames, this loss teaches a vision transformer the places
of the objects, but not their shapes. `tiny-vit` therefore gets the trained text tower of `tiny`, and its image tower
learns to reproduce the features of `tiny` for the whole frame and for its parts.

The files in `models/` were written by these commands.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

import argparse
from collections.abc import Sequence
from dataclasses import replace

from run.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains the towers and writes their weights; PyTorch is imported late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--backbone", choices=("tiny", "tiny-vit"), default="tiny", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: as in the backbone's recipe)")
    options = parser.parse_args(arguments)

    from models.tiny_clip import save_demo_weights, untrained_clip
    from run.demo_pretraining import RECIPES, RECORDED_LOSSES, build_objective, draw_batches, pretrain
    from utils.jobs import progress

    recipe = RECIPES[options.backbone]
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    clip = untrained_clip(options.backbone)
    steps = pretrain(build_objective(options.backbone, clip), draw_batches(recipe), recipe)
    losses = list(progress(steps, recipe.steps, "training", "step", in_lines=True))
    note = {"recipe": str(recipe), "first_losses": " ".join(f"{loss:.4f}" for loss in losses[:RECORDED_LOSSES])}
    save_demo_weights(clip, options.backbone, options.out, note)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; weights: {options.out}")


if __name__ == "__main__":
    run_command(main)
