"""How much memory is free: on a GPU, or on this machine for this process, whose job or container may have a limit."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

# Of Linux, below each root one folder for every control group, which is what a container or a SLURM job is.
MEMORY_INFO, OWN_GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup")
GROUPS, GROUPS_OF_VERSION_1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the main memory; where the system does not tell, all of it."""
    if device.type == "cuda":
        # What PyTorch keeps of tensors that are gone is free too: after a training step that is most of the GPU.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return max(0, min([_free_on_machine(), *_free_in_groups()]))


def _free_on_machine() -> int:
    with contextlib.suppress(OSError):
        # Not what is free by itself: files that were read stay in memory until their place is needed.
        available = re.search(r"^MemAvailable: +([0-9]+) kB$", MEMORY_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if available:
            return int(available[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_groups() -> Iterator[int]:
    """What each group around this process has left; one without a limit, or that cannot be read, says nothing."""
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(GROUPS, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _left(GROUPS_OF_VERSION_1, path, *names)


def _left(root: Path, path: str, limit: str, usage: str, files: str) -> Iterator[int]:
    """Limit less usage of a group and of those it lies in; files that were read can go and are not counted as used."""
    group = root / path.lstrip("/")
    # In a container the path may be that of the host, where here is nothing: then the root is the container's group.
    while group.is_relative_to(root):
        # The limit is the word "max" where there is none.
        with contextlib.suppress(OSError, ValueError):
            of_files = re.search(rf"^{files} ([0-9]+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / usage).read_text()) - (int(of_files[1]) if of_files else 0)
            yield int((group / limit).read_text()) - used
        group = group.parent
