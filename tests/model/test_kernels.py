"""Test Triton's and PyTorch's MoE kernels without a GPU: run Triton's in its interpreter, and compile them.

tests/test_gpu.py has the same cases on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from model.kernels import TorchKernels
from model.kernels import triton as kernels
from precision.config import KernelKind, PrecisionConfig
from precision.resolve import resolve
from tests.conftest import ROOT
from tests.support.kernel_cases import BREAKS, CASES, GATES


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """Run the cases in a new process: Triton reads TRITON_INTERPRET at import, and torch.compile imports Triton."""
    assert importlib.util.find_spec("triton"), "the kernels' tests need Triton: pip install -e '.[dev]'"
    command = [sys.executable, "-m", "tests.support.kernel_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("side", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(interpreted, name, side):
    found = interpreted["cases"][name][side]
    assert len(found) == 15
    assert {key: error for key, error in found.items() if error > GATES[CASES[name].dtype]} == {}


@pytest.mark.parametrize("side", ["torch", "triton"])
@pytest.mark.parametrize("what", BREAKS)
def test_broken_kernels_are_noticed(interpreted, what, side):
    assert max(interpreted["broken"][what][side].values()) > 0.1


POINTERS = {"x", "y", "rows", "tokens", "grad", "gate", "up", "out", "to_gate", "to_up"}
FIXED = {"weights": "*fp32", "found": "*fp32", "source": "*i64", "place": "*i64", "is_padding": "*u8"}


KERNELS = ["spread", "spread y found", "spread y found weights is_padding", "collect", "collect x found weights"]
KERNELS += ["swiglu", "swiglu_backward"]
"""Each entry has the name of a kernel and the arguments that are None."""


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch, kernel, dtype):
    """The compiler may reject code that the interpreter accepts. Hopper machine code must have 16-byte loads."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, *missing = kernel.split()
    made = (*kernels._permute_kernels(), *kernels._swiglu_kernels())
    kernel = next(one for one in made if one.fn.__name__ == name)
    sizes = {"WIDTH": 5120, "K": 3, "SLOTS": 4, "BLOCK": 1024, "WIDE": tl.float64 if dtype == "fp64" else tl.float32}
    constants = {n: sizes.get(n) for n in kernel.arg_names if n in sizes or n in missing}
    types = {n: FIXED.get(n, f"*{dtype}" if n in POINTERS else "i32") for n in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    even = [i for i, n in enumerate(kernel.arg_names) if types[n] not in ("constexpr", "*u8")]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    wide = r"ld\.global\.v2\.b64" if dtype == "fp64" else r"ld\.global\.v4\.b32"
    assert re.search(wide, compiled.asm["ptx"])


def test_unavailable_kernels_are_rejected_with_a_fix(monkeypatch):
    chosen = PrecisionConfig(kernels=KernelKind.triton)
    with pytest.raises(ConfigError, match=r"precision.kernels=triton: Triton's kernels run on GPUs only; try torch"):
        resolve(chosen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"precision.kernels=triton: Triton is not installed: pip install triton"):
        resolve(chosen, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_swiglu_equals_autograd_to_the_bit(dtype):
    def plain(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    both = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    grad = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    fused = TorchKernels().swiglu_halves
    for way in (fused, torch.compile(fused, backend="aot_eager", fullgraph=True)):
        assert torch.equal(way(both), plain(both))
        found, wanted = (torch.autograd.grad(f(both), both, grad)[0] for f in (way, plain))
        assert torch.equal(found, wanted) and found.abs().min() > 0
