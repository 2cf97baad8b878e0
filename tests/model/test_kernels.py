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
from model.kernels import TorchKernels, triton_loss
from model.kernels import triton as kernels
from precision.config import KernelKind, PrecisionConfig
from precision.resolve import resolve
from tests.conftest import ROOT
from tests.support.kernels.head_cases import FLAWS, STEPS
from tests.support.kernels.kernel_cases import BREAKS, CASES, GATES
from tests.support.kernels.loss_cases import LOSSES


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """Run the cases in a new process: Triton reads TRITON_INTERPRET at import, and torch.compile imports Triton."""
    assert importlib.util.find_spec("triton"), "the kernels' tests need Triton: pip install -e '.[dev]'"
    command = [sys.executable, "-m", "tests.support.kernels.kernel_cases"]
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


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("name", STEPS)
def test_heads_match_the_reference(interpreted, name, dtype):
    found = interpreted["heads"][f"{name}, {dtype}"]
    assert len(found) == 8
    assert {key: error for key, error in found.items() if not error < 2 * GATES[dtype]} == {}


@pytest.mark.parametrize("what", FLAWS)
def test_broken_heads_are_noticed(interpreted, what):
    found = interpreted["flawed"][what]
    assert max(found["q"], found["gradient"]) > 0.1


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_the_reference(interpreted, name, dtype):
    found = interpreted["losses"][f"{name}, {dtype}"]
    assert len(found) == 5 and {key: error for key, error in found.items() if not error < 2 * GATES[dtype]} == {}
    broken = interpreted["losses"]["broken"]
    assert broken["likeliest"] and broken["label"] > 0.1 and broken["gradient"] > 0.1, "the control"


POINTERS = {
    "logits",
    "x",
    "y",
    "rows",
    "tokens",
    "grad",
    "gate",
    "up",
    "out",
    "to_gate",
    "to_up",
    "qkv",
    "to_q",
    "to_k",
    "to_v",
}
FIXED = {
    "weights": "*fp32",
    "labels": "*i64",
    "likeliest": "*i64",
    "found": "*fp32",
    "source": "*i64",
    "place": "*i64",
    "is_padding": "*u8",
}
TABLES = {"rotation", "scale", "inverse", "largest", "exponentials", "label", "lse"}
"""Arguments in at least float32."""

PERMUTE = {"WIDTH": 5120, "K": 3, "SLOTS": 4, "BLOCK": 1024}
HEADS = {"H": 40, "G": 8, "K": 128, "HALVES": False, "BLOCK": 16, "EPS": 1e-5, "CONSTANT": 1.0}
LOSS = {"WIDTH": 8192, "BLOCK": 1024}
KERNELS = {
    "spread": PERMUTE,
    "spread y found": PERMUTE,
    "spread y found weights is_padding": PERMUTE,
    "collect": PERMUTE,
    "collect x found weights": PERMUTE,
    "swiglu": PERMUTE,
    "swiglu_backward": PERMUTE,
    "heads": HEADS | {"HALVES": True},
    "heads scale": HEADS,
    "heads_backward": HEADS,
    "heads_backward scale out inverse": HEADS | {"HALVES": True},
    "loss_sums": LOSS,
    "loss_sums likeliest": LOSS,
    "loss_gradient": LOSS,
}
"""Each entry has the name of a kernel and the arguments that are None, with its compile-time constants."""


WIDE = [pytest.param(dtype, 90, marks=pytest.mark.slow) for dtype in ("fp32", "fp64")]


@pytest.mark.parametrize("dtype, capability", [("bf16", 90), ("bf16", 100), *WIDE])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch, kernel, dtype, capability):
    """The compiler may reject code that the interpreter accepts. Machine code must have 16-byte loads and no spills."""
    import triton.language as tl
    from triton import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = KERNELS[kernel] | {"WIDE": tl.float64 if dtype == "fp64" else tl.float32}
    name, *missing = kernel.split()
    made = (
        *kernels._permute_kernels(),
        *kernels._swiglu_kernels(),
        kernels._heads_kernel(),
        kernels._heads_backward_kernel(),
        *triton_loss._loss_kernels(),
    )
    jitted = next(one for one in made if one.fn.__name__ == name)
    constants = {n: sizes.get(n) for n in jitted.arg_names if n in sizes or n in missing}
    fixed = FIXED | dict.fromkeys(TABLES, "*fp64" if dtype == "fp64" else "*fp32")
    types = {n: fixed.get(n, f"*{dtype}" if n in POINTERS else "i32") for n in jitted.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    even = [i for i, n in enumerate(jitted.arg_names) if types[n] not in ("constexpr", "*u8")]
    source = ASTSource(jitted, types, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    wide = r"ld\.global\.v2\.b64" if dtype == "fp64" else r"ld\.global\.v4\.b32"
    assert re.search(wide, compiled.asm["ptx"])
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(backends.__file__), "nvidia", "bin", "cuobjdump")
    used = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0", used), used


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


def test_the_norm_rounds_its_gain_in_both_passes():
    generator = torch.Generator().manual_seed(0)
    x, grad, gain = (torch.randn(*shape, generator=generator) for shape in ((8, 64), (8, 64), (64,)))
    rounded = gain.bfloat16().float()
    found, wanted = (norm_gradient(x.bfloat16(), one, grad.bfloat16()) for one in (gain, rounded))
    assert torch.equal(found, wanted)
    exact, other = (norm_gradient(x, one, grad) for one in (gain, rounded))
    assert not torch.equal(exact, other), "float32 rounds nothing"


def norm_gradient(x: Tensor, gain: Tensor, grad: Tensor) -> Tensor:
    x.requires_grad_()
    kernels.TritonKernels().rms_norm(x, gain, 1e-5).backward(grad)
    assert x.grad is not None
    found, x.grad = x.grad, None
    return found
