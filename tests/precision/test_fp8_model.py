"""A model in FP8 in the arrangement of operations for GPUs: joint layers and recomputation change no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import layers
from model.attention.plan import ForwardContext
from model.init import initialise
from model.transformer import Transformer
from parallel import activation_checkpoint
from parallel.layout import Recompute
from precision.config import Backend, Compute, PrecisionConfig, Recipe
from precision.fp8_linear import Float8Gemm
from precision.resolve import resolve
from tests.model.test_gpu_path import JoiningKernels
from tests.support.models import small

MODEL = small(hidden_size=64, head_dim=32, dense_hidden_size=96, expert_hidden_size=64, num_layers=2)
POSITIONS = torch.cat([torch.arange(20), torch.arange(12)])[None]


def gradients(recipe: Recipe, recompute: Recompute = Recompute.none) -> dict[str, Tensor]:
    """Return the result and all gradients of a second micro-batch."""
    model = Transformer(MODEL, resolve(PrecisionConfig(Compute.float64, backend=Backend.emulated, recipe=recipe)))
    initialise(model.double(), MODEL, 1)
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = JoiningKernels()
    activation_checkpoint.apply(model, recompute)
    tokens = (torch.arange(32) * 7 % MODEL.vocab_size)[None]
    for _ in range(2):
        model.zero_grad()
        y = model(tokens, ForwardContext(POSITIONS, routed_tokens=1.0))
        y.mul(torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a tensor."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize("recipe", [recipe for recipe in Recipe if recipe is not Recipe.auto])
def test_joint_layers_change_no_result_of_a_model(recipe, monkeypatch):
    calls: list[Any] = []
    honest = Float8Gemm.joint
    monkeypatch.setattr(Float8Gemm, "joint", lambda *args: calls.append(args) or honest(*args))
    found = gradients(recipe)
    assert len(calls) == 2 * (2 + 2), "attention, and a dense or shared layer"
    monkeypatch.setattr(layers._Projection, "joins", False)
    wanted = gradients(recipe)
    # where matrices are stacked, sums are rounded elsewhere, which may move a later value to the next FP8 number
    assert difference(found, wanted) <= (1e-3 if recipe is Recipe.mxfp8 else 0)


def test_recomputation_changes_no_bit_in_float8():
    found = [gradients(Recipe.mxfp8, mode) for mode in Recompute]
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


def test_a_wrong_order_of_joint_layers_is_noticed(monkeypatch):
    honest = Float8Gemm.joint
    monkeypatch.setattr(Float8Gemm, "joint", lambda gemm, x, weights: honest(gemm, x, weights).flip(-1))
    found = gradients(Recipe.mxfp8)
    monkeypatch.undo()
    assert difference(found, gradients(Recipe.mxfp8)) > 0.1
