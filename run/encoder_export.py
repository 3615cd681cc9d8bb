"""Exports a model's video encoder as a `torch.export` program or an ONNX graph, and compares it with the model.

Shapes: V videos, T frames, F the method's own feature shape.
"""

import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
        """Returns the features of clips: uint8 [V, T, 3, H, W] -> float32 [V, T, *F]."""
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
        `file`, `input` and `output` with their shapes, and `largest_difference`, see `difference`.

    Raises:
        UserError: the encoder cannot be exported, or the features of the file differ from the model's.
    """
    method, data = type(model).__name__, model.data
    clip = [data.SEQ_LEN, 3, data.IMG_SIZE, data.IMG_SIZE]
    expected = Encoder(model, torch.device("cpu"), data.IMG_NORM, amp=False)
    try:
        exported = WRITERS[to](trace(model, noise(TRACED_VIDEOS, clip)), folder / FILES[to])
        pairs = [(exported(clips), expected(clips)) for clips in (noise(videos, clip) for videos in COMPARED_VIDEOS)]
    except OSError:
        raise
    except Exception as error:  # PyTorch and ONNX Runtime raise many types of errors
        raise UserError(export_error(method, to, error)) from error
    largest = max(difference(*pair) for pair in pairs)
    if not largest <= TOLERANCE:
        raise UserError(
            f"the features of the exported encoder of {method} differ from PyTorch's by up to {largest:.1e} of their "
            f"mean absolute value; the limit is {TOLERANCE}. Nothing was written; use the checkpoint from Python, see "
            "docs/python.md"
        )
    return {
        "file": FILES[to],
        "input": {"name": INPUT, "dtype": "uint8", "shape": [VIDEOS, *clip], "channels": "RGB"},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [VIDEOS, *pairs[0][0].shape[1:]]},
        "largest_difference": largest,
    }


def export_error(method: str, to: Format, error: Exception) -> str:
    """Returns a message that explains what cannot be exported and what to do instead."""
    if to == "torch":
        remedy = "use the checkpoint from Python, see docs/python.md"
        return f"the encoder of {method} cannot be exported ({reason_of(error)}); {remedy}"
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    operators = re.findall(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", " ".join(map(str, causes)))
    reason = f"ONNX has no operator for PyTorch's {operators[0]}" if operators else reason_of(causes[-1])
    return f"the encoder of {method} cannot be exported to ONNX: {reason}. Export it with --format torch"


def trace(model: FewShotModel, clips: Tensor) -> ExportedProgram:
    """Returns the encoder as a program for any number of clips, with the weights that the encoder reads."""
    encoder = VideoEncoder(model).eval().requires_grad_(False)
    with without_unread_weights(encoder, clips), redirect_stderr(io.StringIO()):  # PyTorch prints the graph on failure
        return torch.export.export(encoder, (clips,), dynamic_shapes=({0: Dim(VIDEOS, min=1)},))


@contextmanager
def without_unread_weights(encoder: VideoEncoder, clips: Tensor) -> Iterator[None]:
    """Removes the weights and buffers that `encoder(clips)` does not read, such as the matcher's."""
    with ReadTensors() as read:
        encoder(clips)
    unread = [
        (module, name, tensor)
        for module in encoder.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if id(tensor) not in read.ids
    ]
    for module, name, _ in unread:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, tensor in unread:
            setattr(module, name, tensor)


class ReadTensors(TorchFunctionMode):
    """Collects the ids of the tensors that are passed to functions of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function and notes the tensors among its arguments."""
        self.ids.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def noise(videos: int, clip: Sequence[int]) -> Tensor:
    """Returns random clips of the given shape: uint8 [V, T, 3, H, W]."""
    generator = torch.Generator().manual_seed(videos)
    return torch.randint(256, (videos, *clip), dtype=torch.uint8, generator=generator)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of features over their mean absolute value; infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().mean())


def write_program(program: ExportedProgram, file: Path) -> Encode:
    """Writes a `torch.export` program; returns the function in the file."""
    torch.export.save(program, file)
    return torch.export.load(file).module()


def write_onnx(program: ExportedProgram, file: Path) -> Encode:
    """Writes an ONNX graph, with weights above 2 GB in a separate file; returns its function in ONNX Runtime."""
    import onnxruntime

    pooling = torch.ops.aten.adaptive_max_pool2d.default
    if program.graph.find_nodes(op="call_function", target=pooling):
        program = program.run_decompositions({pooling: adaptive_max_pool})
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns about operators that it does not simplify
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert graph is not None
    graph.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])


def adaptive_max_pool(maps: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Computes adaptive_max_pool2d with operators of ONNX; the indices are placeholders, since no encoder uses them."""
    for axis, cells in zip((-2, -1), size, strict=True):
        length = maps.shape[axis]
        bounds = [(cell * length // cells, -(-(cell + 1) * length // cells)) for cell in range(cells)]
        maps = torch.stack([maps.narrow(axis, start, stop - start).amax(axis) for start, stop in bounds], axis)
    return maps, maps.long()


WRITERS: dict[Format, Callable[[ExportedProgram, Path], Encode]] = {"torch": write_program, "onnx": write_onnx}
