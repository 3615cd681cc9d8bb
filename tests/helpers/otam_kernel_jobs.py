"""Jobs of test_otam_kernel.py in separate processes, since Triton decides at its import how kernels run.

TRITON_INTERPRET=1 python tests/helpers/otam_kernel_jobs.py interpret cases.pt    runs the kernels on the CPU
python tests/helpers/otam_kernel_jobs.py compile                  compiles them for GPUs that may be absent
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import otam_kernel, otam_table
from models.matching import otam

TENSORS = {"_fill": ("table", "totals"), "_align": ("table", "totals", "weights", "shares")}


def interpret(path: Path) -> None:
    """Adds costs and gradient of the kernels to each case: distances, smoothing, both_directions and weights."""
    otam_table._steps_for = lambda table: otam_kernel  # type: ignore[assignment]
    cases = torch.load(path, weights_only=True)
    for case in cases:
        distances = case["distances"].requires_grad_()
        costs = otam(distances, case["smoothing"], case["both_directions"])
        (case["gradient"],) = torch.autograd.grad(costs, distances, case["weights"])
        case |= {"distances": distances.detach(), "costs": costs.detach()}
    torch.save(cases, path)


def compile_kernels() -> None:
    """Prints kernel, compute capability and size of the machine code, one line per kernel."""
    for name, tensors in TENSORS.items():
        for capability in (70, 80, 90):
            signature = dict.fromkeys(tensors, "*fp32") | {"matrices": "i32"}
            constants = {"ROWS": 8, "COLUMNS": 8, "BLOCK": otam_kernel.BLOCK}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=getattr(otam_kernel, name), signature=signature, constexprs=constants)
            target = GPUTarget("cuda", capability, 32)
            code = triton.compile(source, target=target, options={"num_warps": otam_kernel.WARPS})
            print(name, capability, len(code.asm["cubin"]))


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret(Path(sys.argv[2]))
    else:
        compile_kernels()
