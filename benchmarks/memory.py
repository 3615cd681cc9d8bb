"""How much memory a training step takes with each setting, counted without computing anything.

    python benchmarks/memory.py                          5-way 5-shot of ViT-B/16: two minutes, to build the models
    python benchmarks/memory.py --backbone RN50 --way 2 --shot 1 --query 1 --frames 4 --chunk 1 --out rn50.md

The step is the framework's own, forward and backward, on tensors that have a shape and no values (PyTorch's
FakeTensorMode): every block of memory that a tensor requests is counted until the last tensor in it is freed.
Sizes that exceed the available machine can therefore be computed. Not counted are the workspace of single kernels, and
the reserve of a GPU's libraries and PyTorch's allocator. `benchmarks/training.py --sections memory` measures the same
steps where they fit.
"""

import argparse
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import machine
from benchmarks.training import SETTINGS, Bench, training_step
from episodes.dataset import EpisodeClips
from models.base import parameter_count
from run.cached_episodes import EpisodeFeatures
from run.command import run_command
from run.main_run import Learner
from utils.logs import set_up_logging

OUT = ROOT / "benchmarks" / "results" / "memory.md"
MOMENTS = 2  # numbers that Adam stores per trained value
VALUE = 4  # bytes of a float32
CACHED = {"TRAINABLE head, CACHED_FEATURES": ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")}


class CountedMemory(TorchDispatchMode):
    """Counts the memory of all tensors created within this block, each until nothing refers to it.

    Attributes:
        now, peak: bytes, including tensors passed to `hold`.
    """

    def __init__(self) -> None:
        """Starts with a count of zero."""
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls the operation and counts its results."""
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts the memory of tensors; views of the same memory count once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._release(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def drop_values(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replaces a module's parameters and buffers with tensors of the same shapes without values."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                shape_only = fake.from_tensor(parameter.detach())
                part._parameters[name] = nn.Parameter(shape_only, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fake.from_tensor(buffer)


def without_values(learner: Learner) -> FakeTensorMode:
    """Drops the values of everything that a step of the learner reads; returns the mode of the new tensors."""
    fake, encoder, text = FakeTensorMode(), learner.encoder, learner.text
    drop_values(learner.model, fake)
    text["train"] = fake.from_tensor(text["train"])
    encoder.mean = None if encoder.mean is None else fake.from_tensor(encoder.mean)
    encoder.std = None if encoder.std is None else fake.from_tensor(encoder.std)
    return fake


def peak_of_step(learner: Learner, fake: FakeTensorMode) -> tuple[int, int]:
    """Returns the bytes of the weights, and the additional peak of an episode forward and backward.

    Args:
        learner: without values.
        fake: the mode from `without_values`.
    """
    learner.model.zero_grad()
    step = training_step(learner)
    with fake:
        episode = _episode(learner)
        with CountedMemory() as memory:
            memory.hold([*learner.model.parameters(), *learner.model.buffers()])
            weights = memory.now
            memory.hold([episode.clips if isinstance(episode, EpisodeClips) else episode.features])
            step.add_gradient(episode, group_size=1)
    # On a GPU, only the mirrored clips exist while the step runs, not the original ones.
    twice = episode.clips.nbytes if isinstance(episode, EpisodeClips) else 0
    return weights, memory.peak - weights - twice


def _episode(learner: Learner) -> EpisodeClips | EpisodeFeatures:
    """Returns an episode without values, within a FakeTensorMode."""
    train, data = learner.config.TRAIN, learner.config.DATA
    class_ids, labels = torch.arange(train.WAY), torch.arange(train.WAY).repeat(train.QUERY_PER_CLASS)
    videos = train.WAY * train.SHOT + len(labels)
    clips = torch.empty(videos, data.SEQ_LEN, 3, data.IMG_SIZE, data.IMG_SIZE, dtype=torch.uint8)
    if not train.CACHED_FEATURES:
        return EpisodeClips(0, clips, [False] * videos, class_ids, labels, {})
    with torch.no_grad():
        shape = learner.encoder.backbone(clips[:1]).shape[1:]
    return EpisodeFeatures(0, torch.empty(videos, *shape), class_ids, labels)


def row(name: str, overrides: Sequence[str], bench: Bench) -> str:
    """Returns a line of the table: the peak beyond the weights, and with weights and the optimizer's moments."""
    learner = bench.learner(*(override.format(chunk=bench.options.chunk) for override in overrides))
    trained = parameter_count(learner.model)
    if not trained:
        return f"| {name} | nothing to train | | | |"
    fake, cells = without_values(learner), []
    for amp in (False, True):
        learner.encoder.amp = amp
        weights, peak = peak_of_step(learner, fake)
        whole = (weights + MOMENTS * VALUE * trained + peak) / 1e9
        cells += [f"{peak / 1e9:.2f}", f"{whole:.1f}" if whole <= bench.options.card else f"**{whole:.1f}**"]
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, prints the table and writes it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="clipspm")
    parser.add_argument("--backbone", default="ViT-B/16")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=5)
    parser.add_argument("--query", type=int, default=4, help="per class")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--chunk", type=int, default=5, help="TRAIN.CHUNK")
    parser.add_argument(
        "--card", type=float, default=12, help="memory of a GPU in GB; larger values are printed in bold"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="file for the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Nothing is computed and no video is read. The data set only exists because a training run checks it.
    options.episodes, options.workers, options.device, options.amp, options.data = 1, 0, "cpu", False, None
    set_up_logging()  # only errors of libraries
    videos = options.way * (options.shot + options.query)
    lines = [
        f"{options.method} on {options.backbone}, {options.way}-way {options.shot}-shot, {options.query} queries a "
        f"class: {videos} videos of {options.frames} frames of {options.size} pixels, one episode a step; TRAIN.CHUNK "
        f"is {options.chunk} where it is set. GB of tensors, counted without computing; bold: more than "
        f"{options.card:g}. {machine()}.",
        "",
        "| setting | float32: beyond the weights | with weights and Adam | USE_AMP: beyond the weights | with weights "
        "and Adam |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        lines += [row(name, overrides, bench) for name, overrides in {**SETTINGS, **CACHED}.items()]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
