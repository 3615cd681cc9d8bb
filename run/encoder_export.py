"""A model's video encoder as a `torch.export` program or an ONNX graph, compared with the model.

Shapes: V videos, T frames, F the method's own feature shape.
"""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from models.base import FewShotModel
from run.encoder import Encoder
from utils.errors import UserError, reason_of
from videotransforms.video_transforms import normalise

Format = Literal["torch", "onnx"]
Encode = Callable[[Tensor], Tensor]

FILES: dict[Format, str] = {"torch": "encoder.pt2", "onnx": "encoder.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT, VIDEOS = "clips", "features", "videos"
TRACED_VIDEOS = 2  # the number 1 would be traced as a constant
COMPARED_VIDEOS = (1, 3)
TOLERANCE = 1e-4


class VideoEncoder(nn.Module):
    """Normalisation and `model.encode` in one module."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: FewShotModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.pixel_mean) if model.data.IMG_NORM else None)
        self.register_buffer("std", torch.tensor(model.pixel_std) if model.data.IMG_NORM else None)

    def forward(self, clips: Tensor) -> Tensor:
        """Features of clips: uint8 [V, T, 3, H, W] -> float32 [V, T, *F]."""
        return self.model.encode(normalise(clips, self.mean, self.std)).float()


def require_onnx() -> None:
    """Raises UserError if a package for ONNX is missing."""
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"--format onnx needs {error.name}; install it with: pip install -r requirements-export.txt"
            ) from error


@torch.no_grad()
def export_encoder(model: FewShotModel, to: Format, folder: Path) -> dict[str, Any]:
    """Writes the encoder of a model into a folder, then compares the file with the model.

    Args:
        model: in evaluation mode, on the CPU.
        to: torch or onnx.
        folder: exists.

    Returns:
        the file, its input and output, and `largest_difference`, see `difference`.

    Raises:
        UserError: the encoder cannot be exported, or the file gives other features than the model.
    """
    method, data = type(model).__name__, model.data
    clip = [data.SEQ_LEN, 3, data.IMG_SIZE, data.IMG_SIZE]
    expected = Encoder(model, torch.device("cpu"), data.IMG_NORM, amp=False)
    try:
        found = WRITERS[to](traced(model, noise(TRACED_VIDEOS, clip)), folder / FILES[to])
        pairs = [(found(clips), expected(clips)) for clips in (noise(videos, clip) for videos in COMPARED_VIDEOS)]
    except OSError:
        raise
    except Exception as error:  # PyTorch and ONNX Runtime raise errors of many kinds
        raise UserError(
            f"the encoder of {method} cannot be exported ({reason_of(error)}); use the checkpoint from Python, see "
            "docs/python.md"
        ) from error
    largest = max(difference(*pair) for pair in pairs)
    if not largest <= TOLERANCE:
        raise UserError(
            f"the exported encoder of {method} gives other features than PyTorch: the largest difference is "
            f"{largest:.1e} of their mean size, {TOLERANCE} is allowed. Nothing was written; use the checkpoint from "
            "Python, see docs/python.md"
        )
    return {
        "file": FILES[to],
        "input": {"name": INPUT, "dtype": "uint8", "shape": [VIDEOS, *clip], "channels": "RGB"},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [VIDEOS, *pairs[0][0].shape[1:]]},
        "largest_difference": largest,
    }


def traced(model: FewShotModel, clips: Tensor) -> ExportedProgram:
    """Returns the encoder as a program for any number of clips."""
    encoder = VideoEncoder(model).eval().requires_grad_(False)
    with redirect_stderr(io.StringIO()):  # on failure PyTorch prints the graph, beside its error
        return torch.export.export(encoder, (clips,), dynamic_shapes=({0: Dim(VIDEOS, min=1)},))


def noise(videos: int, clip: Sequence[int]) -> Tensor:
    """Random clips of a shape: uint8 [V, T, 3, H, W]."""
    generator = torch.Generator().manual_seed(videos)
    return torch.randint(256, (videos, *clip), dtype=torch.uint8, generator=generator)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between features, in units of the mean absolute value; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().mean())


def write_program(program: ExportedProgram, file: Path) -> Encode:
    """Writes a `torch.export` program; returns what the file computes."""
    torch.export.save(program, file)
    return torch.export.load(file).module()


def write_onnx(program: ExportedProgram, file: Path) -> Encode:
    """Writes an ONNX graph, weights above 2 GB beside it; returns what ONNX Runtime computes with the file."""
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # warns of what it does not simplify
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert graph is not None
    graph.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])


WRITERS: dict[Format, Callable[[ExportedProgram, Path], Encode]] = {"torch": write_program, "onnx": write_onnx}
