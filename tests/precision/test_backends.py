"""Available backends fulfil one contract. Unavailable backends give every reason why they are unavailable."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from model.init import initialise
from model.transformer import Transformer
from precision.config import Backend, Compute, PrecisionConfig, Products, Recipe
from precision.fp8_emulated import EmulatedArithmetic
from precision.fp8_linear import Float8Gemm, NotFinite
from precision.fp8_torch import TorchFloat8
from precision.gemm import GemmBackend, Groups
from precision.resolve import FLOAT8_LIBRARIES, Precision, resolve, slow_experts, unavailable
from tests.support.models import small

CPU = torch.device("cpu")
RECIPES = [recipe for recipe in Recipe if recipe is not Recipe.auto]
PAIRS = [(backend, recipe) for backend in FLOAT8_LIBRARIES for recipe in RECIPES]
HERE = [pair for pair in PAIRS if not unavailable(*pair, CPU)]
MISSING = [pair for pair in PAIRS if unavailable(*pair, CPU)]
ERROR = {Backend.native: 1e-2, Backend.te: 0.08, Backend.torch: 0.08, Backend.emulated: 0.08}
"""Tolerated relative error of a matmul against float64. E4M3 has three mantissa bits, E5M2 two."""
T, D, N, E = 48, 64, 96, 4
COUNTS = [32, 0, 64, 32]
MODEL = small(hidden_size=64, head_dim=16, dense_hidden_size=96, expert_hidden_size=64)


def config(backend: Backend, recipe: Recipe = Recipe.auto) -> PrecisionConfig:
    return PrecisionConfig(Compute.bfloat16, backend=backend, recipe=recipe)


def products(backend: Backend, recipe: Recipe = Recipe.auto) -> GemmBackend:
    return resolve(config(backend, recipe)).at(0, 1).of(Products.expert, "expert")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(params=[(Backend.native, Recipe.auto), *HERE], ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
def pair(request) -> tuple[Backend, Recipe]:
    return request.param


def test_linear_and_its_gradients(pair):
    backend, gemm = pair[0], products(*pair)
    x, w = draw(2, T // 2, D).bfloat16().requires_grad_(), draw(N, D, seed=1).requires_grad_()
    grad = draw(2, T // 2, N, seed=2).bfloat16()
    y = gemm.linear(x, w)
    assert y.shape == (2, T // 2, N) and y.dtype is torch.bfloat16
    y.backward(grad)
    assert x.grad.dtype is torch.bfloat16 and w.grad.dtype is torch.float32
    found = [y, x.grad, w.grad]
    assert torch.equal(gemm.input_gradient(grad, w).to(x.dtype), x.grad)
    assert torch.equal(gemm.weight_gradient(grad, x).to(w.dtype), w.grad)
    exact_x, exact_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    wanted = F.linear(exact_x, exact_w)
    wanted.backward(grad.double())
    for one, other in zip(found, [wanted, exact_x.grad, exact_w.grad], strict=True):
        assert 0 < relative(one, other) < ERROR[backend]


def grouped(gemm: GemmBackend, counts: list[int], beyond: int = 0) -> dict[str, Tensor]:
    """Return the result and gradients of unequal groups, with `beyond` rows of zeros after the last group."""
    rows = sum(counts)
    x = torch.cat([draw(rows, D), torch.zeros(beyond, D)]).bfloat16().requires_grad_()
    w = draw(len(counts), N, D, seed=1).requires_grad_()
    grad = torch.cat([draw(rows, N, seed=2), torch.zeros(beyond, N)]).bfloat16()
    groups = Groups(torch.tensor(counts))
    y = gemm.linear(x, w, groups)
    assert y.shape == (rows + beyond, N)
    y.backward(grad)
    assert torch.equal(gemm.input_gradient(grad, w, groups)[:rows].to(x.dtype), x.grad[:rows])
    assert torch.equal(gemm.weight_gradient(grad, x, groups).to(w.dtype), w.grad)
    return {"y": y[:rows].detach(), "x": x.grad[:rows], "w": w.grad}


def test_each_group_is_a_linear_layer(pair):
    gemm = products(*pair)
    found = grouped(gemm, COUNTS)
    assert not found["w"][1].any()
    x, grad, w = draw(sum(COUNTS), D).bfloat16(), draw(sum(COUNTS), N, seed=2).bfloat16(), draw(E, N, D, seed=1)
    begin = 0
    for expert, count in enumerate(COUNTS):
        rows = slice(begin, begin := begin + count)
        if count:
            one, weight = x[rows].clone().requires_grad_(), w[expert].clone().requires_grad_()
            y = gemm.linear(one, weight)
            y.backward(grad[rows])
            for name, alone in (("y", y), ("x", one.grad)):
                assert relative(found[name][rows], alone) < 1e-2  # a grouped kernel may round differently
            assert relative(found["w"][expert], weight.grad) < 1e-2


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 96, 0], [128, 32, 32, 96]])
def test_rows_beyond_the_last_group_change_nothing(pair, counts):
    gemm = products(*pair)
    plain, padded = grouped(gemm, counts), grouped(gemm, counts, beyond=3 * gemm.token_multiple)
    for name, wanted in plain.items():
        assert torch.equal(padded[name], wanted), name


@pytest.mark.parametrize("backend, recipe", HERE)
def test_activations_are_saved_as_bytes(backend, recipe):
    """Activations are only in autograd's saved tensors, where activation checkpointing and offloading find them."""
    kept: list[Tensor] = []
    gemm, x, w = products(backend, recipe), draw(64, D).bfloat16().requires_grad_(), draw(N, D, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = gemm.linear(x, w[None], Groups(torch.tensor([64])))
    size = sum(tensor.nbytes for tensor in kept) - 4 * N * D  # less the weight itself, in float32
    assert 64 * D <= size <= 64 * D * 1.25  # one byte each, and scales
    context: Any = y.grad_fn
    assert context.activation.tensors() and not any(tensor is not None for tensor in context.activation.tensors())


def test_parameters_do_not_depend_on_the_backend(pair):
    made = []
    for precision in (Precision(PrecisionConfig(Compute.bfloat16)), resolve(config(*pair))):
        one = Transformer(MODEL, precision)
        initialise(one, MODEL, seed=1)
        made.append(one)
    plain, other = (one.state_dict() for one in made)
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    tokens = torch.arange(48).view(1, 48)
    assert relative(made[1](tokens), made[0](tokens)) < 0.15


@pytest.mark.parametrize("backend, recipe", MISSING)
def test_unavailable_recipes_say_why(backend, recipe):
    with pytest.raises(ConfigError) as caught:
        resolve(config(backend, recipe))
    said = str(caught.value)
    reasons = unavailable(backend, recipe, CPU)
    assert said.startswith(f"precision.backend={backend.value}: cannot do {recipe.value} here: ") and reasons
    assert all(reason in said for reason in reasons)
    others = [other.value for other in FLOAT8_LIBRARIES if not unavailable(other, recipe, CPU)]
    assert said.endswith(f"; try {', '.join(others)} or native") and "emulated" in others


def test_the_emulation_has_every_recipe():
    assert {(Backend.emulated, recipe) for recipe in RECIPES} <= set(HERE)
    assert {backend for backend, _ in MISSING} == {Backend.te, Backend.torch}  # te needs a GPU


@pytest.mark.parametrize("recipe", [recipe for backend, recipe in HERE if backend is Backend.torch])
@pytest.mark.parametrize("operands", ["ordinary", "of very different magnitude"])
def test_the_emulation_equals_scaled_mm(recipe, operands):
    """Compare every matmul of a layer, forward and backward, with torch's kernels on the same bytes."""
    figures = []
    for kind in (TorchFloat8, EmulatedArithmetic):
        gemm = Float8Gemm(kind(recipe, torch.bfloat16), "here")
        spread = torch.exp(3 * draw(T, 1, seed=5)) if operands != "ordinary" else 1.0
        x, w = (draw(T, D) * spread).bfloat16().requires_grad_(), draw(N, D, seed=1).requires_grad_()
        y = gemm.linear(x, w)
        y.backward((draw(T, N, seed=2) * spread).bfloat16())
        figures.append([y, x.grad, w.grad])
    for one, other in zip(*figures, strict=True):
        assert relative(one, other) < 1e-3 and float((one == other).float().mean()) > 0.99


def test_the_comparison_with_scaled_mm_can_fail():
    class Broken(EmulatedArithmetic):
        def multiply(self, a, b):
            return super().multiply(a, b) * 1.01

    gemm = Float8Gemm(Broken(Recipe.rowwise, torch.bfloat16), "here")
    x, w = draw(T, D).bfloat16(), draw(N, D, seed=1)
    assert relative(gemm.linear(x, w), products(Backend.torch, Recipe.rowwise).linear(x, w)) > 1e-3


@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_an_infinite_operand_names_layer_and_role(where):
    gemm = resolve(config(Backend.emulated)).at(3, 8).of(Products.attention, "query")
    x, w = draw(T, D).bfloat16(), draw(N, D, seed=1).requires_grad_()
    grad = torch.ones(T, N, dtype=torch.bfloat16)
    (x if where == "activation" else grad)[5, 7] = torch.inf
    with pytest.raises(NotFinite, match=f"layer 3, query: the {where} has inf or NaN.*precision.backend=native"):
        gemm.linear(x, w).backward(grad)


def test_first_and_last_layers_may_stay_outside_fp8():
    precision = resolve(replace(config(Backend.emulated), bf16_first_layers=1, bf16_last_layers=2))
    in_float8 = [isinstance(precision.at(layer, 6).of(Products.expert, "expert"), Float8Gemm) for layer in range(6)]
    assert in_float8 == [False, True, True, True, False, False]


def test_auto_recipe_on_a_gpu(monkeypatch):
    wanted = {(8, 9): "tensorwise", (9, 0): "blockwise", (10, 0): "mxfp8", (10, 3): "mxfp8", (12, 0): "tensorwise"}
    for capability, recipe in wanted.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert Recipe.auto.on(torch.device("cuda")).value == recipe
    assert Recipe.auto.on(CPU) is Recipe.blockwise and Recipe.rowwise.on(torch.device("cuda")) is Recipe.rowwise


def test_without_gradients_no_columns_are_quantised(monkeypatch):
    seen = mock.Mock(side_effect=EmulatedArithmetic.quantise)
    monkeypatch.setattr(EmulatedArithmetic, "quantise", lambda *arguments: seen(*arguments))
    gemm, x, w = products(Backend.emulated), draw(T, D).bfloat16(), torch.nn.Parameter(draw(N, D, seed=1))
    with torch.no_grad():
        gemm.linear(x, w)
    gemm.linear(x, w)
    columns = [call.args[-1] for call in seen.call_args_list]
    assert columns == [False, False, True], "the weight is quantised once"


GROUPS = {"attention": Products.attention, "shared": Products.shared, "experts": Products.expert, "ffn": Products.dense}


@pytest.mark.parametrize("chosen", GROUPS.values())
def test_each_role_has_its_own_backend(chosen):
    """This test finds modules by name, which the package must not do. Router and head never use FP8."""
    made = Transformer(MODEL, resolve(replace(config(Backend.emulated), fp8_products=[chosen], bf16_first_layers=1)))
    gemms = {name: module.gemm for name, module in made.named_modules() if hasattr(module, "gemm")}
    assert len(gemms) == 1 + 4 * 4 + 2 * 3 + 2 * 3 + 2 * 2  # head, attention, dense, shared, experts
    for name, gemm in gemms.items():
        group = next((group for part, group in GROUPS.items() if part in name.split(".")), None)
        eight = group is chosen and not name.startswith("layers.0.")
        assert isinstance(gemm, Float8Gemm) == eight and (group is not None) == (name != "head"), name
    said = {getattr(gemm, "where", None) for gemm in gemms.values()} - {None}
    role = {"attention": "query", "shared": "shared_gate", "expert": "expert_down", "dense": "dense_gate"}[chosen.value]
    assert any(where.endswith(f", {role}") for where in said) and all(re.match(r"layer [1-3], ", w) for w in said)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"fp8_products": [Products.router]}, "fp8_products=router: the router must not be rounded to FP8"),
        ({"fp8_products": []}, "fp8_products: names no product"),
        ({"backend": Backend.te, "compute": Compute.float32}, "compute=float32: te needs bfloat16 activations"),
        ({"bf16_first_layers": -1}, "bf16_first_layers=-1: must not be negative"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(ConfigError) as caught:
        PrecisionConfig(**{"compute": Compute.bfloat16, "backend": Backend.emulated, **options})
    assert str(caught.value).startswith(said)


def test_a_gpu_without_grouped_matmuls_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = []
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        said.append(slow_experts(torch.device("cuda")))
    assert said[1] is said[2] is None and slow_experts(torch.device("cpu")) is None
    assert "on compute capability 8.0 " in said[0] and "12.0" in said[3] and "waits for the device" in said[0]
