"""Training and evaluation in several processes; with one process, the functions here do nothing.

torchrun starts R processes, gives each its rank r through the environment, and ends all if one ends with an error.
DistributedDataParallel is not used: it hooks into `forward`, while methods have `encode` and `training_losses`, and it
expects the same number of backward passes in every process, while the episodes of a step may not be a multiple of R.
Summing the gradients before each step is sufficient.

GPU tensors are sent by NCCL, all others by gloo.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

Item = TypeVar("Item")

# Long, since the others wait while rank 0 opens every video once. torchrun, not this limit, detects a dead process.
MAX_WAIT = timedelta(hours=6)
WAIT_FOR_MESSAGE = timedelta(seconds=10)

_store: dist.Store | None = None  # usable even while a process ends


# --- the processes ----------------------------------------------------------------------------------------


def start() -> None:
    """Connects the processes that torchrun started (WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT)."""
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    store, this_rank, size = next(rendezvous("env://", timeout=MAX_WAIT))
    _store = dist.PrefixStore(f"start_{_starts_before()}", store)  # torchrun keeps the store when it restarts
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=MAX_WAIT, world_size=size, rank=this_rank, store=_store)


def stop() -> None:
    """Disconnects from the other processes; may be called at any time."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Returns the number of this process among the processes of all machines, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Returns the number of this process among those of its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Returns the number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Returns whether this is the process that logs and writes files."""
    return rank() == 0


def is_restart() -> bool:
    """Returns whether torchrun restarted these processes after one of them had ended with an error."""
    return _starts_before() > 0


def _starts_before() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def report(message: str, exit_code: int) -> int:
    """Prints once why a run ends, although an error of one process makes the others fail too.

    The other processes wait until it is printed, since torchrun ends all of them when one has ended.

    Args:
        message: why this process ends.
        exit_code: its exit code.

    Returns:
        the exit code of the first failure, the same for all, since torchrun reports any of them.
    """
    if _store is None:
        print(message, file=sys.stderr)
        return exit_code
    try:
        if _store.add("failures", 1) == 1:
            print(message, file=sys.stderr, flush=True)
            _store.set("reported", str(exit_code))
            return exit_code
        _store.wait(["reported"], WAIT_FOR_MESSAGE)
        return int(_store.get("reported"))
    except RuntimeError:  # the store ended with its process: report twice rather than never
        print(message, file=sys.stderr, flush=True)
        return exit_code


# --- work and results -------------------------------------------------------------------------------------


def share(episodes: range) -> range:
    """Returns the episodes i of this process, those with i mod R = r; the step of `episodes` is 1."""
    first = episodes.start + (rank() - episodes.start) % world_size()
    return range(first, episodes.stop, world_size())


def from_main(make: Callable[[], Item]) -> Item:
    """Returns the result of `make`, which only rank 0 calls, on every process."""
    if world_size() == 1:
        return make()
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def any_process(value: bool) -> bool:
    """Returns whether `value` is true on any process; the same answer everywhere."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.uint8)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for the GPU
    return bool(box)


def gather(item: Item) -> list[Item]:
    """Returns the values of all processes in order of rank; the same list everywhere."""
    if world_size() == 1:
        return [item]
    gathered: list[Item] = [item] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def gather_in_order(items: Sequence[Item]) -> list[Item]:
    """Joins the shares of items 0 .. n-1: process r has items r, r + R, ... (see `share`)."""
    parts = gather(items)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def gather_rows(rows: Tensor) -> Tensor:
    """Joins rows r, r + R, ... of a tensor, [n, *F] on each process -> all rows [R * n, *F], the same everywhere."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


# --- weights ----------------------------------------------------------------------------------------------


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over all processes; a missing gradient counts as zero.

    A parameter without a gradient on any process keeps none, so that the optimizer skips it as with one process (weight
    decay, for example, would change it).
    """
    if world_size() == 1:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for the GPU
    used = [parameter for parameter, has in zip(parameters, has_gradient.tolist(), strict=True) if has]
    if not used:
        return
    total = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(total)
    for parameter, gradient in zip(used, total.split([p.numel() for p in used]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(gradient.view_as(parameter))  # keeps the memory format, which fused optimizers rely on


def sum_of_all(value: Tensor) -> Tensor:
    """Sums a tensor over all processes, on its device; the host does not wait for it."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replaces each floating-point buffer by its mean over all processes.

    The running statistics of a batch norm cover only the episodes of its process; training does not read them, but
    validation and checkpoints do. The mean is computed in float64, in which equal float32 values keep their value.
    """
    if world_size() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            total = buffer.double()
            dist.all_reduce(total)
            buffer.copy_(total / world_size())


@torch.no_grad()
def copy_weights_from_main(module: nn.Module) -> None:
    """Copies the parameters and buffers of rank 0 to every process."""
    if world_size() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        value = tensor.contiguous()
        dist.broadcast(value, src=0)
        tensor.copy_(value)
