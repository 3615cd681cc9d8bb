"""`run.py --profile N`: a trace of N training steps, and what in them costs most."""

import logging
from collections.abc import Iterable
from itertools import islice

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from run.checkpoints import TRACE_SUFFIX
from run.main_run import Learner
from run.meter import Meter
from run.solver import Solver
from run.training_step import TrainingStep
from utils import distributed
from utils.checkpoint import LAST
from utils.errors import UserError
from utils.files import new_file

WARM_UP_STEPS = 1  # compiles, chooses kernels, starts the workers
COSTLIEST = 5

logger = logging.getLogger(__name__)


def write_profile(learner: Learner, steps: int) -> None:
    """Traces `steps` optimizer steps after a warm-up, writes the trace into the run directory, prints a table.

    The trace is JSON as chrome://tracing, ui.perfetto.dev and TensorBoard's profiler plugin open it. The steps are
    those of a training from the start; nothing of them is kept.

    Raises:
        UserError: the run directory holds a run, the config only tests, or what training can raise.
    """
    config, total = learner.config, WARM_UP_STEPS + steps
    if not config.trains:
        raise UserError(
            "--profile traces training steps, and this run has none: set TEST.ONLY_TEST=false and a "
            "TRAIN.TRAIN_EPISODES above 0, for a method that trains"
        )
    if (learner.directory / LAST).is_file():
        raise UserError(
            f"--profile traces a training from the start, but {learner.directory} holds a run: name another "
            "CHECKPOINT.CHECKPOINT_DIR for the trace"
        )
    distributed.from_main(lambda: learner.files.claim(resume=False))
    size = config.TRAIN.TASKS_PER_BATCH
    schedule = max(config.TRAIN.TRAIN_EPISODES, total * size)
    solver = Solver(learner.model, config.SOLVER, schedule, config.TRAIN.CLIP_GRAD)
    meter = Meter(learner.device)
    step = TrainingStep(learner.model, learner.encoder, solver, meter, learner.text["train"], config)
    episodes = iter(learner.training_episodes(range(total * size)))
    learner.model.train()
    on_gpu = learner.device.type == "cuda"

    def make_steps(first: int, count: int) -> None:
        for start in range(first * size, (first + count) * size, size):
            group = range(start, start + size)
            step(group, islice(episodes, len(distributed.share(group))))
        step.watch.raise_if_nonfinite()  # waits for the GPU too

    make_steps(0, WARM_UP_STEPS)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        make_steps(WARM_UP_STEPS, steps)
    if distributed.is_main():
        path = new_file(learner.directory, "profile", TRACE_SUFFIX)
        profiler.export_chrome_trace(str(path))
        print(costliest(profiler.key_averages(), on_gpu, steps))
        logger.info("trace of %d steps: %s (open it in ui.perfetto.dev or TensorBoard)", steps, path)


def costliest(averages: Iterable[FunctionEventAvg], on_gpu: bool, steps: int) -> str:
    """A table of the operations with the most time of their own, on the GPU if there is one."""

    def own_time(event: FunctionEventAvg) -> float:  # in microseconds
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # The profiler lists a GPU's kernels too, and gives their time to the operations that launched them a second time.
    operations = [event for event in averages if event.device_type == DeviceType.CPU]
    whole = sum(own_time(event) for event in operations)
    lines = [f"{'ms a step':>10} {'share':>7} {'calls':>7}  own time on the {'GPU' if on_gpu else 'CPU'}"]
    for event in sorted(operations, key=own_time, reverse=True)[:COSTLIEST]:
        milliseconds = own_time(event) / 1000 / steps
        share = 100 * own_time(event) / max(whole, 1)
        lines.append(f"{milliseconds:10.2f} {share:6.1f}% {event.count / steps:7.0f}  {event.key}")
    return "\n".join(lines)
