"""Measures the speed of training and the memory of each setting; both sides of every ratio in one run.

    python benchmarks/training.py --frames 4 --episodes 3                for a CPU: minutes
    python benchmarks/training.py --backbone ViT-B/16 --shot 5 --query 4 --episodes 50 --workers 14 --amp

loop     forward, backward and optimizer step on clips in memory, against the whole loop, which reads a packed store
literal  the literal trainer of benchmarks/literal_training.py, which reads folders of JPEG files, against ours
memory   peak memory of one step with each setting that reduces it, and how far its gradient is from the first one

The weights are random and the videos are generated: 340 x 256 JPEGs, or those of --data (a folder per class, in it a
folder per video, with a short side of 256 pixels). The first episode is not timed. The two sides take turns, and the
shortest time of each counts. Their losses and gradients are compared; the script fails if they do not agree.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.literal_training import literal_losses
from benchmarks.machine import machine
from episodes.dataset import EpisodeClips
from episodes.packed import write_packed
from run.cached_episodes import EpisodeFeatures
from run.command import run_command
from run.main_run import Learner
from run.meter import Meter
from run.solver import Solver
from run.training_step import TrainingStep
from utils.config import load_config
from utils.logs import set_up_logging

FRAMES_OF_A_VIDEO, WIDTH, HEIGHT = 16, 340, 256
CLASSES_NOT_TRAINED = 3
WARM_UP = 1  # episodes
LOSSES_AGREE, GRADIENTS_AGREE = 1e-3, 1e-2  # relative; with --amp ten times that
MATRIX = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}  # of the matrix product: size, type
GOAL = 90  # percent of the rate of forward and backward alone

SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ACTIVATION_CHECKPOINTING": ("MODEL.ACTIVATION_CHECKPOINTING=true",),
    "CHUNK": ("TRAIN.CHUNK={chunk}",),
    "CHUNK and ACTIVATION_CHECKPOINTING": ("TRAIN.CHUNK={chunk}", "MODEL.ACTIVATION_CHECKPOINTING=true"),
    "TRAINABLE last_1": ("MODEL.TRAINABLE=last_1",),
    "TRAINABLE head": ("MODEL.TRAINABLE=head",),
}


# --- measurements -----------------------------------------------------------------------------------------


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Returns the peak memory of tensors during `action`, beyond the memory in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    return int(np.cumsum([0, *(change for _, change in sorted(changes, key=lambda pair: pair[0]))]).max())


def matrix_rate(device: torch.device) -> float:
    """Returns the measured operations/s of a large matrix product: bf16 on a GPU, float32 on a CPU."""
    size, kind = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(12):
        before = now(device)
        left @ right
        times.append(now(device) - before)
    return 2 * size**3 / min(times)


def now(device: torch.device) -> float:
    """Returns the time in seconds after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(actual, expected, strict=True))


def gradient_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns ||a - b|| / ||b|| over the parameters that both have."""
    pairs = [(actual[name].double(), expected[name].double()) for name in actual.keys() & expected.keys()]
    apart = sum((a - b).square().sum().item() for a, b in pairs)
    return (apart / max(sum(b.square().sum().item() for _, b in pairs), 1e-30)) ** 0.5


# --- the measured training runs ---------------------------------------------------------------------------


class Bench:
    """Builds the same training run repeatedly, from the same weights."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.videos = options.data or write_videos(folder / "videos", options)
        self.splits = write_splits(folder / "splits", self.videos)
        self.packed = pack(folder / "packed", self.videos)

    def learner(self, *overrides: str) -> Learner:
        """Returns a training run of the options' method that writes nothing."""
        o = self.options
        settings = [
            f"MODEL.BACKBONE={o.backbone}", f"TRAIN.WAY={o.way}", f"TRAIN.SHOT={o.shot}", "TEST.SHOT=1", "TEST.WAY=2",
            f"TRAIN.QUERY_PER_CLASS={o.query}", f"DATA.SEQ_LEN={o.frames}", f"DATA.IMG_SIZE={o.size}",
            f"DATA.NUM_WORKERS={o.workers}", f"DEVICE.DEVICE={o.device}", f"USE_AMP={str(o.amp).lower()}",
            f"DATA.DATA_DIR={self.packed}", f"DATA.SPLIT_DIR={self.splits}", "DATA.DATASET=benchmark",
            "TRAIN.VAL_FREQ=0", "DATA.CHECK_VIDEOS=false", "TRAIN.TASKS_PER_BATCH=1", "SOLVER.LR=1e-5",
            "SOLVER.OPTIM_METHOD=adam", "MODEL.CLIP_WEIGHTS=random", f"TRAIN.TRAIN_EPISODES={WARM_UP + o.episodes}",
            f"CHECKPOINT.CHECKPOINT_DIR={self.folder / 'run'}",
        ]  # fmt: skip
        if o.backbone.startswith("resnet"):
            settings.append("MODEL.WEIGHTS=random")
        config = ROOT / "configs" / o.method / "hmdb51.yaml"
        learner = Learner(load_config(config, [*settings, *overrides], warn=lambda message: None).config)
        learner.model.train()
        return learner

    @property
    def all_episodes(self) -> range:
        return range(WARM_UP + self.options.episodes)

    @property
    def frames_of_an_episode(self) -> int:
        o = self.options
        return o.way * (o.shot + o.query) * o.frames


def training_step(learner: Learner) -> TrainingStep:
    train = learner.config.TRAIN
    solver = Solver(learner.model, learner.config.SOLVER, train.TRAIN_EPISODES, train.CLIP_GRAD)
    meter = Meter(learner.device)
    return TrainingStep(learner.model, learner.encoder, solver, meter, learner.text["train"], learner.config)


def timed_steps(
    step: TrainingStep, episodes: Iterable[EpisodeClips | EpisodeFeatures], bench: Bench
) -> tuple[list[float], float]:
    """Makes steps of one episode each; returns all losses, and the seconds of the steps after the warm-up."""
    losses, iterator, start = [], iter(episodes), 0.0
    for i in bench.all_episodes:
        if i == WARM_UP:
            start = now(step.device)
        step.meter.sums.clear()
        step(range(i, i + 1), iterator)
        losses.append(step.meter.sums["loss"])
    seconds = now(step.device) - start
    step.watch.raise_if_nonfinite()
    return [loss.item() for loss in losses], seconds


def resident_side(bench: Bench) -> tuple[list[float], float]:
    """Runs forward and backward alone, with the optimizer's step."""
    learner = bench.learner()
    return timed_steps(training_step(learner), list(learner.training_episodes(bench.all_episodes)), bench)


def loop_side(bench: Bench) -> tuple[list[float], float]:
    """Runs the whole loop, which reads the packed store."""
    learner = bench.learner()
    return timed_steps(training_step(learner), learner.training_episodes(bench.all_episodes), bench)


def literal_side(bench: Bench) -> tuple[list[float], float]:
    """Runs the plain trainer, which reads JPEG folders."""
    learner, found, start = bench.learner(f"DATA.DATA_DIR={bench.videos}"), [], 0.0
    losses = literal_losses(
        learner.model, learner.text["train"], learner.data.samplers["train"], learner.data.clip_options, learner.config,
        bench.all_episodes,
    )  # fmt: skip
    for loss in losses:
        found.append(loss)
        start = start or now(learner.device)
    return found, now(learner.device) - start


Side = Callable[[Bench], tuple[list[float], float]]


def compare(bench: Bench, one: Side, other: Side) -> tuple[float, float]:
    """Returns the shortest times of both sides, which take turns; raises an error if their losses differ."""
    found = [(one(bench), other(bench)) for _ in range(bench.options.repeats)]
    worst = max(difference(losses, others) for (losses, _), (others, _) in found)
    print(f"largest relative difference of the losses: {worst:.1e}")
    if not worst <= LOSSES_AGREE * (10 if bench.options.amp else 1):
        raise SystemExit("the losses of the two sides do not agree")
    return min(seconds for (_, seconds), _ in found), min(seconds for _, (_, seconds) in found)


def measure_loop(bench: Bench) -> None:
    """Compares only forward and backward with the whole loop."""
    count, learner = bench.options.episodes, bench.learner()
    with FlopCounterMode(display=False) as counter:
        training_step(learner).add_gradient(next(iter(learner.training_episodes(range(1)))), group_size=1)
    alone, whole = compare(bench, resident_side, loop_side)
    done, possible = counter.get_total_flops() * count / whole, matrix_rate(learner.device)
    print(f"forward and backward alone  {count / alone:8.3f} episodes/s")
    print(f"the whole loop              {count / whole:8.3f} episodes/s")
    print(f"share                       {100 * alone / whole:8.1f} % (goal {GOAL})")
    print(f"frames/s in the loop        {count * bench.frames_of_an_episode / whole:8.1f}")
    kind = str(MATRIX[learner.device.type][1]).removeprefix("torch.")
    print(f"arithmetic                  {done / 1e12:8.3f} TFLOP/s, {100 * done / possible:.1f} % of the measured rate")
    print(f"a large {kind} product      {possible / 1e12:8.3f} TFLOP/s")


def measure_literal(bench: Bench) -> None:
    """Compares the plain trainer with ours, including reading the videos."""
    count = bench.options.episodes
    literal, ours = compare(bench, literal_side, loop_side)
    print(f"the literal trainer         {count / literal:8.3f} episodes/s")
    print(f"ours                        {count / ours:8.3f} episodes/s")
    print(f"ratio                       {literal / ours:8.2f}")


def measure_memory(bench: Bench) -> None:
    """Measures the peak memory of one episode forward and backward with each setting, beyond the weights."""
    kind = "torch.cuda.max_memory_allocated" if bench.options.device == "cuda" else "tensors as PyTorch's allocator saw"
    print(f"peak beyond the weights ({kind}), time of one step, distance of the gradient from the first one's")
    expected: dict[str, Tensor] = {}
    first = 0
    for name in bench.options.settings:
        learner = bench.learner(*(override.format(chunk=bench.options.chunk) for override in SETTINGS[name]))
        if not any(parameter.requires_grad for parameter in learner.model.parameters()):
            print(f"  {name:36} nothing to train: {bench.options.method} has no head")
            continue
        add_gradient = partial(
            training_step(learner).add_gradient, next(iter(learner.training_episodes(range(1)))), group_size=1
        )
        seconds = float("nan") if bench.options.peaks_only else seconds_of(add_gradient, learner)
        peak = peak_bytes(add_gradient, learner.device)
        found = {key: p.grad.clone() for key, p in learner.model.named_parameters() if p.grad is not None}
        expected, first = expected or found, first or peak
        apart = gradient_difference(found, expected)
        print(
            f"  {name:36} {peak / 1e9:8.3f} GB {100 * peak / first:6.1f} % {seconds:8.2f} s   {apart:.1e}", flush=True
        )
        if apart > GRADIENTS_AGREE * (10 if bench.options.amp else 1):
            raise SystemExit(f"the gradients of {name} do not agree with the first ones")


def seconds_of(add_gradient: Callable[[], object], learner: Learner) -> float:
    """Returns the time of the second of two steps, since the first one is slower; clears the gradient."""
    add_gradient()
    before = now(learner.device)
    add_gradient()
    seconds = now(learner.device) - before
    learner.model.zero_grad()
    return seconds


# --- synthetic videos -------------------------------------------------------------------------------------


def write_videos(folder: Path, options: argparse.Namespace) -> Path:
    """Writes folders of JPEGs: soft moving patterns of colour, with file sizes like those of real frames."""
    for class_number in range(options.way + CLASSES_NOT_TRAINED):
        for video in range(max(options.shot + options.query, 2)):
            rng = np.random.default_rng([class_number, video])
            pattern = rng.integers(0, 256, size=(24, 40, 3), dtype=np.uint8)
            image = Image.fromarray(pattern).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            grain = rng.normal(0, 6, size=(HEIGHT, WIDTH, 3))
            target = folder / f"class_{class_number}" / f"video_{video}"
            target.mkdir(parents=True)
            for number in range(FRAMES_OF_A_VIDEO):
                part = np.asarray(image.crop((number * 8, 0, number * 8 + WIDTH, HEIGHT)), dtype=np.float64)
                pixels = np.clip(part + grain, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{number:05d}.jpg", quality=90)
    return folder


def write_splits(folder: Path, videos: Path) -> Path:
    """Writes a class list that trains and tests on the classes of a folder, since accuracy does not matter here."""
    folder.mkdir(parents=True)
    entries = [
        {"folder": path.name, "prompt": path.name.replace("_", " "), "videos": len(list(path.iterdir()))}
        for path in sorted(videos.iterdir())
    ]
    train, rest = entries[:-CLASSES_NOT_TRAINED], entries[-CLASSES_NOT_TRAINED:]
    content = {"dataset": "benchmark", "videos": "all", "horizontal_flip": True, "train": train}
    (folder / "classes.yaml").write_text(yaml.safe_dump({**content, "val": rest[:1], "test": rest[1:]}))
    return folder


def pack(folder: Path, videos: Path) -> Path:
    """Packs all videos into one store per split; each split uses the videos of its classes."""
    folder.mkdir(parents=True)
    names = [f"{video.parent.name}/{video.name}" for video in sorted(videos.glob("*/*"))]
    for split in ("train", "val", "test"):
        write_packed(folder / f"{split}.sqlite", [(name, sorted((videos / name).iterdir())) for name in names])
    return folder


# --- the command ------------------------------------------------------------------------------------------

SECTIONS = {"loop": measure_loop, "literal": measure_literal, "memory": measure_memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the measured numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--method", default="clipspm")
    parser.add_argument("--backbone", default="RN50")
    parser.add_argument("--way", type=int, default=2)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--query", type=int, default=1, help="per class")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--episodes", type=int, default=4, help="timed episodes, after the first")
    parser.add_argument("--repeats", type=int, default=2, help="of each comparison; the shortest times count")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=1, help="TRAIN.CHUNK of the memory section")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of the memory section")
    parser.add_argument("--peaks-only", action="store_true", help="of the memory section: one step each, not timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="USE_AMP")
    parser.add_argument("--data", type=Path, help="folder of classes with JPEG folders of videos; generated by default")
    options = parser.parse_args(arguments)
    set_up_logging()  # only errors of libraries
    print(machine(uses_gpu=options.device == "cuda"))
    print(
        f"{options.method} on {options.backbone}, {options.way}-way {options.shot}-shot, {options.query} queries "
        f"per class, {options.frames} frames of {options.size} pixels, {options.episodes} timed episodes, "
        f"{options.workers} workers, {'bf16' if options.amp else 'float32'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for section in options.sections:
            print(f"\n{section}", flush=True)
            SECTIONS[section](bench)


if __name__ == "__main__":
    run_command(main)
