"""Compare the FP8 kernels of Transformer Engine and PyTorch with the emulation on a GPU (`make test-gpu`).

These tests have not run yet.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from precision import fp8_emulated
from precision import transformer_engine as engine
from precision.config import Backend, Recipe
from precision.gemm import Groups
from precision.resolve import FLOAT8_LIBRARIES, unavailable
from tests.precision.test_te_on_cpu import make
from tests.test_gpu import run

pytestmark = pytest.mark.gpu

BY = [(backend, recipe) for backend in (Backend.te, Backend.torch) for recipe in FLOAT8_LIBRARIES[backend].RECIPES]
LARGEST_ERROR = 2e-3
"""Tolerated relative error against the emulation in bfloat16: sums differ in order and precision."""


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "make test-gpu needs a GPU"
    return torch.device("cuda", torch.cuda.current_device())


def can(backend: Backend, recipe: Recipe, device: torch.device) -> bool:
    """Return whether this GPU has kernels for the recipe, according to the library's documentation. If not, the tests
    below compare nothing.
    """
    capability = torch.cuda.get_device_capability(device)
    if recipe is Recipe.mxfp8:
        return (10, 0) <= capability < (12, 0)
    if recipe is Recipe.tensorwise:
        return capability >= (8, 9)
    return capability >= (9, 0) if backend is Backend.te else (9, 0) <= capability < (10, 0) or recipe is Recipe.rowwise


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draw rows of very different magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
    sizes[..., :3, :] = 0
    return (torch.randn(*shape, generator=generator) * sizes).to(device, dtype)


def results(products: Any, device: torch.device, experts: bool, run: Any = None) -> dict[str, Tensor]:
    """Return a matmul and its gradients: one matrix on rows that need padding, or experts, some without rows."""
    counts = [512, 0, 96, 1024, 32, 0, 192, 64]
    groups = Groups(torch.tensor(counts, device=device)) if experts else None
    rows, used = (sum(counts) + 64, sum(counts)) if experts else (1000, 1000)
    x = draw(device, rows, 1024).requires_grad_()
    w = draw(device, *([len(counts)] if experts else []), 768, 1024, dtype=torch.float32).requires_grad_()

    y = products.linear(x, w, groups) if run is None else run(products.linear, x, w, groups)
    grads = torch.autograd.grad(y, (x, w), draw(device, rows, 768))
    return {"y": y[:used].detach(), "x": grads[0][:used], "w": grads[1]}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        error = float((tensor - wanted[name]).float().norm() / wanted[name].float().norm())
        assert error < LARGEST_ERROR, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("backend, recipe", BY)
def test_recipes_with_kernels_are_available(backend, recipe, device):
    """The trial in `unavailable` gets the bytes, scales and matmul results of the emulation."""
    reasons = unavailable(backend, recipe, device)
    assert reasons == [] if can(backend, recipe, device) else reasons


@pytest.mark.parametrize("experts", [False, True], ids=["matrix", "experts"])
@pytest.mark.parametrize("backend, recipe", BY)
def test_products_and_gradients_equal_the_emulation(backend, recipe, experts, device):
    if not can(backend, recipe, device):
        return
    products = make(recipe, FLOAT8_LIBRARIES[backend])
    wanted = results(make(recipe, fp8_emulated), device, experts)
    close(results(products, device, experts), wanted)
    close(results(products, device, experts, partial(checkpoint, use_reentrant=False)), wanted)


@pytest.mark.parametrize("recipe", engine.RECIPES)
def test_only_the_counts_synchronise(recipe, device):
    if not can(Backend.te, recipe, device):
        return
    products = make(recipe)
    groups = Groups(torch.tensor([64, 0, 32, 96], device=device))
    x, w = draw(device, 192, 256).requires_grad_(), draw(device, 4, 128, 256).requires_grad_()
    grad = draw(device, 192, 128)
    products.linear(x, w, groups).backward(grad)  # allocates workspaces and reads the counts
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        products.linear(x, w, groups).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("backend", [Backend.te, Backend.torch])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_tiny_run_in_fp8(backend, recompute, tmp_path, small_corpus):
    options = [*small_corpus, f"parallel.recompute={recompute}"]
    plain = run(tmp_path, "bf16", *options, "precision=bf16")
    found = run(tmp_path, "fp8", *options, "precision=fp8", f"precision.backend={backend.value}")
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)


def test_a_run_in_fp8_equals_the_emulation(tmp_path, small_corpus):
    found = run(tmp_path, "te", *small_corpus, "precision=fp8")
    wanted = run(tmp_path, "reference", *small_corpus, "precision=fp8", "precision.backend=emulated")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
