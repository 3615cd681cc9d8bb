"""How much memory and arithmetic a training step takes with a method on a frozen ViT, compared with full fine-tuning.

    python benchmarks/memory_adapters.py                 5-way 1-shot and 5-shot of ViT-B/16, 5 queries per class

Counted as in benchmarks/memory.py, without computing anything: all tensors at the peak of the forward and backward pass
of one episode, with the weights and with Adam's moments of the trained parameters. "recomputed":
MODEL.ACTIVATION_CHECKPOINTING. TFLOP: 10^12 floating-point operations of matrix products, attention and
convolutions, forward and backward, without recomputation.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine
from benchmarks.memory import MOMENTS, VALUE, peak_of_step, without_values
from benchmarks.training import Bench
from models.base import parameter_count
from run.command import run_command
from utils.logs import set_up_logging

OUT = ROOT / "benchmarks" / "results" / "memory_adapters.md"
SHOTS = (1, 5)
RECOMPUTE = "MODEL.ACTIVATION_CHECKPOINTING=true"
KINDS = {"float32": (False, False), "bf16": (True, False), "bf16, recomputed": (True, True)}  # USE_AMP, RECOMPUTE
AIM = "MODEL.ADAPTER=aim"
RANDOM_SIDE = "MODEL.SIDE.INITIALISE=random"  # principal components take half a minute, no memory in a step
# Row -> method and changes to its config.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "OTAM, the whole tower trained": ("otam", ()),
    "OTAM, last 2 blocks trained": ("otam", ("MODEL.TRAINABLE=last_2",)),
    "D2ST-Adapter": ("d2st", ()),
    "D2ST-Adapter, last 6 blocks": ("d2st", ("MODEL.D2ST.BLOCKS=6", "MODEL.D2ST.TRAIN_TOKENS=false")),
    "OTAM with AIM's adapters": ("otam", (AIM,)),
    "OTAM with AIM's adapters, last 6 blocks": ("otam", (AIM, "MODEL.AIM.BLOCKS=6", "MODEL.AIM.TRAIN_TOKENS=false")),
    "TS-FSAR": ("tsfsar", (RANDOM_SIDE,)),
    # Without values, a random template cannot be picked.
    "EMP-Net": ("empnet", ("MODEL.RANDOM_TEMPLATE=false", "MODEL.MERGE_BEFORE=true")),
}


def row(name: str, bench: Bench) -> str:
    """Returns a line of the table: trained parameters, GB per number of shots and kind, TFLOP per number of shots."""
    bench.options.method, overrides = ROWS[name]
    learners = {}
    for recompute in (False, True):
        learners[recompute] = bench.learner(*overrides, *((RECOMPUTE,) if recompute else ()))
    trained = parameter_count(learners[False].model)
    fakes = {recompute: without_values(learner) for recompute, learner in learners.items()}
    cells, operations = [], []
    for shot in SHOTS:
        for amp, recompute in KINDS.values():
            learner = learners[recompute]
            learner.encoder.amp = amp
            train = learner.config.TRAIN.model_copy(update={"SHOT": shot})
            learner.config = learner.config.model_copy(update={"TRAIN": train})
            weights, peak = peak_of_step(learner, fakes[recompute])
            cells.append(f"{(weights + MOMENTS * VALUE * trained + peak) / 1e9:.1f}")
        learners[False].config = learner.config
        with FlopCounterMode(display=False) as counter:
            peak_of_step(learners[False], fakes[False])
        operations.append(f"{counter.get_total_flops() / 1e12:.1f}")
    return f"| {name} | {trained / 1e6:.2f} | {' | '.join([*cells, *operations])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, prints the table and writes it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B/16")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--query", type=int, default=5, help="per class")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows of the table")
    parser.add_argument("--out", type=Path, default=OUT, help="file for the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.method, options.shot = "otam", max(SHOTS)  # the data set has enough videos for the largest episode
    options.episodes, options.workers, options.device, options.amp, options.data = 1, 0, "cpu", False, None
    set_up_logging()  # only errors of libraries
    columns = [f"{shot}-shot, {kind}" for shot in SHOTS for kind in KINDS] + [f"TFLOP, {shot}-shot" for shot in SHOTS]
    lines = [
        f"GB of a training step on {options.backbone}, {options.way}-way with {options.query} queries per class, "
        f"{options.frames} frames of {options.size} pixels, one episode a step: weights, Adam and the peak of forward "
        f"and backward, counted without computing. {machine()}.",
        "",
        f"| method | trained, million | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        lines += [row(name, bench) for name in options.rows]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
