"""`run.py --profile N`: writes a trace of N training steps and prints their most expensive operations."""

import logging

from torch.profiler import ProfilerActivity, profile

from run.main_run import Learner
from run.run_directory import TRACE_SUFFIX, TrainingState
from utils import distributed
from utils.checkpoint import LAST
from utils.errors import UserError
from utils.files import new_file

WARM_UP_STEPS = 1  # compiles, chooses kernels, starts the workers
MAX_ROWS = 5

logger = logging.getLogger(__name__)


def write_profile(learner: Learner, steps: int) -> None:
    """Traces `steps` optimizer steps after a warm-up, writes the trace to the run directory, and prints a table.

    The trace is JSON for chrome://tracing, ui.perfetto.dev and TensorBoard's profiler plugin. The traced steps are the
    first of a training run; their result is not saved.

    Raises:
        UserError: the run directory contains a run, the config has no training, or training fails.
    """
    config, directory, size = learner.config, learner.directory, learner.config.TRAIN.TASKS_PER_BATCH
    if not config.trains:
        raise UserError(
            "--profile traces training steps, but this run has none: set TEST.ONLY_TEST=false and TRAIN.TRAIN_EPISODES "
            "above 0, for a method that trains"
        )
    if (directory.path / LAST).is_file():
        raise UserError(
            f"--profile traces the first steps of a run, but {directory.path} contains a run: set another "
            "CHECKPOINT.CHECKPOINT_DIR for the trace"
        )
    distributed.from_main(lambda: directory.claim(resume=False))
    step = learner.training_step(TrainingState.new(learner.model, learner.device, config))
    episodes = iter(learner.training_episodes(range((WARM_UP_STEPS + steps) * size)))
    learner.model.train()

    def make_steps(first: int, last: int) -> None:
        for start in range(first * size, last * size, size):
            step(range(start, start + size), episodes)
        step.watch.raise_if_nonfinite()  # waits for the GPU too

    make_steps(0, WARM_UP_STEPS)
    on_gpu = learner.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        make_steps(WARM_UP_STEPS, WARM_UP_STEPS + steps)
    if distributed.is_main():
        path = new_file(directory.path, "profile", TRACE_SUFFIX)
        profiler.export_chrome_trace(str(path))
        own_time = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=own_time, row_limit=MAX_ROWS))
        logger.info("trace of %d steps: %s (open it in ui.perfetto.dev or TensorBoard)", steps, path)
