"""OTAM's GPU kernels give the costs and gradients of the recursion; plain steps replace them where they cannot run.

The kernels run in Triton's interpreter, on the CPU; the tests marked gpu run what a GPU executes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import otam_table
from models.matching import otam
from tests.helpers.literal_distances import literal_otam
from tests.helpers.shipped import ROOT

SHAPES = [(8, 8), (1, 1), (1, 5), (5, 1), (3, 7), (16, 16), (8, 24)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run_job(*arguments: str, cache: Path, **environment: str) -> str:
    pytest.importorskip("triton")
    command = [sys.executable, "tests/helpers/otam_kernel_jobs.py", *arguments]
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(cache), **environment}
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def case_of(distances: Tensor, smoothing: float = 0.1, both_directions: bool = True) -> dict[str, Any]:
    weights = torch.randn(distances.shape[:-2], generator=torch.Generator().manual_seed(1))
    return {"distances": distances, "smoothing": smoothing, "both_directions": both_directions, "weights": weights}


def all_cases() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator)

    cases = {f"{rows}x{columns}": case_of(random(3, rows, columns)) for rows, columns in SHAPES}
    return cases | {
        "one direction": case_of(random(2, 3, 5, 6), 0.5, both_directions=False),
        "more matrices than a program takes": case_of(random(35, 2, 3, 3)),
        "transposed": case_of(random(4, 8, 6).mT, 0.5),
        "every other": case_of(random(4, 8, 8)[::2, :, ::2], both_directions=False),
        "far apart": case_of(torch.full((2, 16, 16), 2.0), 0.01),
        "equal": case_of(torch.zeros(2, 8, 8), 0.01),
    }


@pytest.fixture(scope="module")
def kernel_results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Returns all cases with the costs and gradients of the interpreted kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    cases = all_cases()
    torch.save(list(cases.values()), folder / "cases.pt")
    run_job("interpret", str(folder / "cases.pt"), cache=folder, TRITON_INTERPRET="1")
    return dict(zip(cases, torch.load(folder / "cases.pt", weights_only=True), strict=True))


@pytest.mark.parametrize("name", all_cases())
def test_kernel_costs_equal_the_literal_recursion(name, kernel_results):
    case = kernel_results[name]
    expected = [
        literal_otam(matrix, case["smoothing"])
        + (literal_otam(matrix.T, case["smoothing"]) if case["both_directions"] else 0)
        for matrix in case["distances"].flatten(0, -3)
    ]
    assert case["costs"].flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("name", all_cases())
def test_kernel_gradients_equal_plain_steps_in_double_precision(name, kernel_results):
    case = kernel_results[name]
    distances = case["distances"].double().requires_grad_()
    costs = otam(distances, case["smoothing"], case["both_directions"])
    (expected,) = torch.autograd.grad(costs, distances, case["weights"].double())
    tolerance = 1e-3 if name == "far apart" else 2e-5  # costs of 3200 smoothings in float32
    torch.testing.assert_close(case["gradient"].double(), expected, rtol=0, atol=tolerance)


def test_the_kernels_compile_for_old_and_new_gpus(tmp_path):
    lines = [line.split() for line in run_job("compile", cache=tmp_path).splitlines()]
    assert [(name, capability) for name, capability, _ in lines] == [
        (name, capability) for name in ("_fill", "_align") for capability in ("70", "80", "90")
    ]
    assert all(int(size) > 0 for _, _, size in lines)


def test_without_triton_plain_steps_are_used_and_logged(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "models.otam_kernel", raising=False)
    monkeypatch.delattr(models, "otam_kernel", raising=False)
    otam_table._kernels.cache_clear()
    assert otam_table._kernels() is None
    otam_table._kernels.cache_clear()
    assert "OTAM runs without its GPU kernel" in caplog.text
    assert "import of triton" in caplog.text


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", all_cases())
def test_costs_and_gradients_agree_on_gpu_and_cpu(name):
    case = all_cases()[name]
    results = []
    for device in ("cpu", "cuda"):
        distances = case["distances"].to(device).requires_grad_()
        costs = otam(distances, case["smoothing"], case["both_directions"])
        (gradient,) = torch.autograd.grad(costs, distances, case["weights"].to(device))
        results.append((costs.cpu(), gradient.cpu()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3 if name == "far apart" else 5e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_uses_kernels_for_float32_and_plain_steps_for_float64():
    pytest.importorskip("triton")
    table = torch.zeros(2, 2, 2, device="cuda")
    assert otam_table._steps_for(table).__name__ == "models.otam_kernel"
    assert otam_table._steps_for(table.double()) is otam_table
    assert otam_table._steps_for(table[:0]) is otam_table
