"""Exports the video encoder of a checkpoint, and text features of classes, for use outside this code base.

    python run/export.py --checkpoint checkpoints/clipspm_demo/checkpoint_best.pt --output exported
    python run/export.py --checkpoint best.pt --output exported --format onnx --classes "waving a hand" clapping
    python run/export.py --checkpoint best.pt --output exported --classes my_actions/classes.yaml

The encoder takes any number of clips as uint8 [videos, frames, 3, height, width], normalises them, and returns the
method's features, which are compared with PyTorch's before anything is written. ONNX needs requirements-export.txt.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import checkpoint, run_command
from utils.errors import UserError
from utils.files import raise_if_not_new, writing

if TYPE_CHECKING:
    import numpy as np

    from models.base import FewShotModel

TEXT_FEATURES, ABOUT = "class_text.npy", "export.json"
# A compiled or recomputed backbone gives the same features but cannot be traced.
TRACEABLE = ("MODEL.COMPILE=false", "MODEL.ACTIVATION_CHECKPOINTING=false")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, exports, compares and writes."""
    options = parse_arguments(arguments)
    raise_if_not_new(options.output)

    texts = class_prompts(options.classes)

    import numpy as np

    import fsar
    from run.encoder_export import export_encoder, require_onnx
    from run.results import as_json
    from utils.logs import set_up_logging

    set_up_logging()
    if options.format == "onnx":
        require_onnx()
    model = fsar.load(options.checkpoint, options.cfg, [*options.overrides, *TRACEABLE])
    features = text_features(model, texts) if texts else None
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export_", dir=options.output.parent) as temporary:
            folder = Path(temporary) / options.output.name
            folder.mkdir()
            about = describe_export(model, options) | export_encoder(model, options.format, folder)
            if features is not None:
                np.save(folder / TEXT_FEATURES, features)
                about |= {"text_features": TEXT_FEATURES, "classes": list(texts), "texts": list(texts.values())}
            (folder / ABOUT).write_bytes(as_json(about))
            os.replace(folder, options.output)
    share = f"{about['largest_difference']:.1g} of their mean absolute value"
    print(f"written: {options.output}; its features differ from PyTorch's by at most {share}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=checkpoint, required=True, metavar="FILE", help="the trained checkpoint")
    parser.add_argument("--cfg", metavar="FILE", help="config for a checkpoint without one")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--format", choices=("torch", "onnx"), default="torch", help="torch.export (default) or ONNX")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="class names, or a classes.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config; before the options"
    )
    return parser.parse_intermixed_args(arguments)


def class_prompts(names: Sequence[str]) -> dict[str, str]:
    """Returns the text of each class, in the order of the command line or the file.

    Raises:
        UserError: the file is missing, empty or invalid, a class is named twice, or a word is an override.
    """
    from episodes.preparation.names import prompt_of
    from run.clips import read_texts

    if len(names) == 1 and names[0].endswith((".yaml", ".yml")):
        if texts := read_texts(Path(names[0])):
            return texts
        raise UserError(f"--classes {names[0]} is empty; write a line `class: text` for each class")
    if overrides := [name for name in names if re.match(r"[A-Z_]+(\.[A-Z0-9_]+)*=", name)]:
        raise UserError(f"--classes has {overrides[0]!r}, which is not a class; write KEY=VALUE before the options")
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UserError(f"--classes has {repeated[0]!r} twice; name each class once")
    return {name: prompt_of(name) for name in names}


def text_features(model: "FewShotModel", texts: dict[str, str]) -> "np.ndarray":
    """Returns the text features of C classes, float32 [C, D].

    Raises:
        UserError: the method has no text, or two classes have the same feature.
    """
    from run.feature_cache import ClassTexts

    features = ClassTexts(model).features(texts, "--classes")
    if features.shape[1] == 1:
        raise UserError(f"--classes: {type(model).__name__} has no class text; leave --classes out")
    return features.cpu().numpy()


def describe_export(model: "FewShotModel", options: argparse.Namespace) -> dict[str, Any]:
    """Describes how clips are prepared for the encoder, and its checkpoint."""
    from models import config_of
    from utils.checkpoint import file_digest
    from utils.utils import git_state, package_versions

    config = config_of(options.checkpoint, options.cfg, options.overrides)
    data = model.data
    return {
        "method": config.MODEL.NAME,
        "backbone": config.MODEL.BACKBONE,
        "checkpoint": str(options.checkpoint),
        "checkpoint_sha256": file_digest(options.checkpoint),
        "git": git_state(),
        "versions": package_versions(),
        "format": options.format,
        "frames": data.SEQ_LEN,
        "sampling": data.SAMPLING,
        "short_side": data.SHORT_SIDE,
        "crop": data.IMG_SIZE,
        "pixel_mean": list(model.pixel_mean) if data.IMG_NORM else None,
        "pixel_std": list(model.pixel_std) if data.IMG_NORM else None,
    }


if __name__ == "__main__":
    run_command(main, "nothing was written")
