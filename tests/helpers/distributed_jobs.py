"""Jobs of test_distributed.py for two processes.

python tests/helpers/distributed_jobs.py jobs.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from episodes.dataset import BadClips
from run import run_directory
from run.main_run import Learner
from run.meter import Meter
from run.run_directory import RunDirectory, TrainingState
from run.solver import Solver
from tests.helpers.processes import launch
from utils import distributed
from utils.checkpoint import LAST
from utils.config import load_config
from utils.schema import SolverOptions

CPU = torch.device("cpu")


def main(jobs_file: Path) -> None:
    """Runs the jobs in order; process 0 writes the results of the parts into `parts.json` beside the jobs."""
    distributed.start()
    parts = {**try_parts(), "seen_after_save": try_save(jobs_file.parent / "saved")}
    if distributed.is_main():
        (jobs_file.parent / "parts.json").write_text(json.dumps(parts), encoding="utf-8")
    for job in json.loads(jobs_file.read_text(encoding="utf-8")):
        run_job(job)
    distributed.stop()


def run_job(job: dict[str, Any]) -> None:
    """Trains and tests, or trains until a number of episodes is saved and stops there.

    Every process except the first gets a different run directory, which must not change.
    """
    directory = Path(job["directory"])
    if not distributed.is_main():
        directory = directory.with_name(f"{directory.name}_of_process_{distributed.rank()}")
    learner = Learner(load_config(job["config"], [f"CHECKPOINT.CHECKPOINT_DIR={directory}"]).config)
    if job["stop_after"]:
        train_until(learner, job["stop_after"])
        return
    if not learner.config.TEST.ONLY_TEST:
        learner.train()
    learner.test()


def train_until(learner: Learner, episodes: int) -> None:
    """Trains until the checkpoint after so many episodes is written.

    Stop before the last two steps: with a cosine schedule, the last one has the learning rate 0 and changes nothing.
    """
    save = learner.directory.save

    def save_and_stop(name: str, state: TrainingState) -> None:
        save(name, state)
        if name == LAST and state.episode == episodes:
            raise KeyboardInterrupt

    learner.directory.save = save_and_stop  # type: ignore[method-assign]
    try:
        learner.train()
    except KeyboardInterrupt:
        return
    raise AssertionError(f"nothing was saved after {episodes} episodes")


def try_parts() -> dict[str, Any]:
    """Returns the result of each function of utils/distributed.py on two processes."""
    rank = distributed.rank()
    order = distributed.gather_in_order([f"item {i}" for i in distributed.share(range(5))])
    few = distributed.gather_in_order([f"item {i}" for i in distributed.share(range(1))])
    rows = distributed.gather_rows(torch.tensor([[float(rank)], [2.0 + rank]]))

    both, second, unused = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    both.grad = torch.full((2, 2), 1.0 + rank)
    if rank == 1:
        second.grad = torch.full((2, 2), 5.0)
    distributed.sum_gradients([both, second, unused])

    nested = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last).weight
    nested.grad = torch.ones_like(nested) if rank == 1 else None
    distributed.sum_gradients([nested])

    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(10.0 * rank)  # type: ignore[union-attr, operator]
    norm.register_buffer("constant", torch.tensor(float("-inf")))
    distributed.average_buffers(norm)

    linear = nn.Linear(1, 1)
    nn.init.constant_(linear.weight, 3.0 + rank)
    distributed.copy_weights_from_main(linear)
    return {
        "order": order,
        "few": few,
        "rows": rows.tolist(),
        "gradients": [None if p.grad is None else p.grad.flatten().tolist() for p in (both, second, unused)],
        "same_memory_format": distributed.gather(nested.grad.stride() == nested.stride()),  # type: ignore[union-attr]
        "sum": distributed.gather(distributed.sum_of_all(torch.tensor(1.0 + rank)).item()),
        "mean": norm.running_mean.item(),  # type: ignore[union-attr, operator]
        "constant": str(norm.constant.item()),
        "weights": distributed.gather(linear.weight.item()),
        "from_main": distributed.gather(distributed.from_main(lambda: f"made by {rank}")),
    }


def try_save(directory: Path) -> list[bool]:
    """Returns whether each process finds a slowly written file, as it must before any of them may end."""
    write = run_directory.save_checkpoint

    def write_slowly(path: Path, content: dict[str, Any]) -> None:
        time.sleep(1)
        path.parent.mkdir()
        write(path, content)

    config = load_config("configs/clipspm/demo.yaml", [f"CHECKPOINT.CHECKPOINT_DIR={directory}"]).config
    files = RunDirectory(config, data={})
    state = TrainingState(nn.Linear(1, 1), Solver(nn.Linear(1, 1), SolverOptions(), 1), Meter(CPU), BadClips(0))  # type: ignore[arg-type]
    run_directory.save_checkpoint = write_slowly
    try:
        files.save(LAST, state)
    finally:
        run_directory.save_checkpoint = write
    return distributed.gather((directory / LAST).is_file())


if __name__ == "__main__":
    launch(main, Path(sys.argv[1]))
