"""Free memory is what this process may still take: of the machine, of its container or job, of a GPU."""

from pathlib import Path

import pytest
import torch

from utils import free_memory as module
from utils.free_memory import free_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 2000 kB available, whose groups a test writes below the folder."""
    (tmp_path / "meminfo").write_text("MemTotal:        9000 kB\nMemFree:           10 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(module, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "GROUPS", tmp_path / "two")
    monkeypatch.setattr(module, "GROUPS_OF_VERSION_1", tmp_path / "one")
    return tmp_path


def write_group(folder: Path, version: int, limit: str, usage: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, files_name = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{files_name} {files}\nunevictable 0\n")


def test_memory_that_the_system_can_give_back_counts_as_free() -> None:
    assert free_memory(CPU) == 2000 * 1024


def test_all_memory_counts_as_free_where_the_system_does_not_tell(system: Path) -> None:
    (system / "meminfo").unlink()
    assert free_memory(CPU) >= 2**28


@pytest.mark.parametrize(("version", "line"), [(1, "4:cpu,memory:/job/step"), (2, "0::/job/step")])
def test_the_limit_of_a_job_holds_and_its_file_cache_counts_as_free(system: Path, version: int, line: str) -> None:
    root = system / {1: "one", 2: "two"}[version]
    (system / "cgroup").write_text(f"9:pids:/elsewhere\n{line}\n")
    write_group(root / "job" / "step", version, "max", usage=1, files=0)
    write_group(root / "job", version, "5000", usage=4000, files=3000)
    assert free_memory(CPU) == 4000


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:/of/the/host"), (2, "0::/of/the/host")])
def test_the_limit_of_a_container_holds_whose_path_is_that_of_the_host(system: Path, version: int, line: str) -> None:
    (system / "cgroup").write_text(f"{line}\n")
    write_group(system / {1: "one", 2: "two"}[version], version, "5000", usage=4500, files=0)
    assert free_memory(CPU) == 500


def test_a_group_above_its_limit_leaves_nothing(system: Path) -> None:
    (system / "cgroup").write_text("0::/\n")
    write_group(system / "two", 2, "5000", usage=6000, files=0)
    assert free_memory(CPU) == 0


def test_a_limit_above_the_memory_of_the_machine_changes_nothing(system: Path) -> None:
    (system / "cgroup").write_text("0::/\n")
    write_group(system / "two", 2, str(2**63 - 4096), usage=6000, files=0)
    assert free_memory(CPU) == 2000 * 1024


def test_what_pytorch_keeps_of_a_gpus_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"mem_get_info": (300, 9000), "memory_reserved": 8000, "memory_allocated": 1000}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 300 + 7000
