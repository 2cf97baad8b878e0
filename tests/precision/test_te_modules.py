"""Run Transformer Engine's own `Linear` and `GroupedLinear` over the stub: they make the same calls of the extension as
the backend, with the same results.

This checks layouts, usages, flags, counts and formats against TE itself.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

from precision import transformer_engine as backend
from precision.config import Recipe
from precision.gemm import Groups
from tests.precision.test_te_on_cpu import COUNTS, D, E, F, draw, make
from tests.support.fakes.transformer_engine_stub import Extension, Product, Quantised, installed, sources, tree

TE = "transformer_engine.pytorch"
TRITON = ("triton", *(f"triton.{name}" for name in ("language", "language.core", "language.standard", "runtime")))
KERNELS = (f"{TE}.triton", *(f"{TE}.triton.{name}" for name in ("pad", "grouped_dbias_dscales", "permutation")))
NOT_HERE = (*TRITON, "triton.runtime.driver", *KERNELS, "einops", "nvdlfw_inspect", "nvdlfw_inspect.api")


class Anything(ModuleType):
    """Stands in for a module that TE imports but these recipes never use."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@dataclasses.dataclass
class Own:
    """TE's modules and the stub that records their calls."""

    extension: Extension
    linear: Any
    grouped: Any
    quantization: Any
    recipes: Any

    def quantizers(self, recipe: Any, mode: str, count: int) -> list[Any]:
        made = self.quantization.RecipeState.create(recipe, mode=mode, num_quantizers=count).make_quantizers()
        for quantizer in made:
            quantizer.internal = quantizer.optimize_for_gemm = True
        return list(made)


@pytest.fixture
def own(monkeypatch) -> Iterator[Own]:
    has_triton_package()  # torch caches the answer, so ask before the fake exists
    with installed() as extension:
        for name in NOT_HERE:
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, Anything(name))
        package = ModuleType(f"{TE}.module")
        package.__path__ = [str(sources() / "transformer_engine" / "pytorch" / "module")]
        sys.modules[f"{TE}.module"] = package
        base = sys.modules.pop(f"{TE}.module.base")
        gemms = sys.modules[f"{TE}.cpp_extensions"]
        vars(gemms).update({k: v for k, v in vars(sys.modules[f"{TE}.cpp_extensions.gemm"]).items() if k[0] != "_"})
        linear, grouped = (importlib.import_module(f"{TE}.module.{name}") for name in ("linear", "grouped_linear"))
        real = vars(sys.modules[f"{TE}.module.base"])
        assert {name: real[name] for name in vars(base) if name.startswith("_2X")} == {
            name: value for name, value in vars(base).items() if name.startswith("_2X")
        }
        for module in (linear, grouped):
            monkeypatch.setattr(module, "clear_tensor_data", lambda *tensors: None)
        monkeypatch.setattr(grouped, "get_device_compute_capability", lambda: (9, 0))
        monkeypatch.setattr(linear, "_check_fp8_reduce_and_update", lambda: False)
        recipes = sys.modules["transformer_engine.common.recipe"]
        yield Own(extension, linear, grouped, sys.modules[f"{TE}.quantization"], recipes)


def scaling(own: Own, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    names = {Recipe.blockwise: "Float8BlockScaling", Recipe.tensorwise: "Float8CurrentScaling"}
    found = getattr(own.recipes, names.get(recipe, "MXFP8BlockScaling"))()
    state = own.quantization.FP8GlobalStateManager
    monkeypatch.setattr(state, "get_fp8_recipe", classmethod(lambda cls: found))
    return found


def names() -> list[str]:
    """Return the names of the options that `_GroupedLinear.forward` unpacks, in order."""
    nodes = [node for node in ast.walk(tree(f"{TE}.module.grouped_linear")) if isinstance(node, ast.Assign)]
    (unpacked,) = (node.targets[0] for node in nodes if ast.unparse(node.value) == "non_tensor_args")
    return [ast.unparse(name) for name in unpacked.elts]  # type: ignore[attr-defined]


def grouped_by_itself(own: Own, recipe: Any, x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    forward, backward = own.quantizers(recipe, "forward", 3 * E), own.quantizers(recipe, "backward", 2 * E)
    for quantizer in forward[1::3]:
        quantizer.optimize_for_gemm = recipe.mxfp8()
    options: dict[str, Any] = dict.fromkeys(names(), False) | {"is_grad_enabled": True}
    none = [None] * E
    options |= {"is_first_microbatch": None, "fp8": True, "wgrad_store": None, "activation_dtype": torch.bfloat16}
    options |= {"input_quantizers": forward[0::3], "weight_quantizers": forward[1::3]}
    options |= {"output_quantizers": none, "grad_input_quantizers": none, "grad_weight_quantizers": none}
    options |= {"grad_output_quantizers": backward[0::2], "weight_workspaces": none, "skip_fp8_weight_update": None}
    leaves = [matrix.clone().requires_grad_() for matrix in w]
    biases = [torch.empty(0)] * E
    counts = torch.tensor(COUNTS)
    y, _ = own.grouped._GroupedLinear.apply(x, counts, tuple(options.values()), None, None, *leaves, *biases)
    grad_x, *grads = torch.autograd.grad(y, (x, *leaves), grad)
    return [y.detach(), grad_x, torch.stack(grads)]


def matrix_by_itself(own: Own, recipe: Any, x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    inputs, weights, _ = own.quantizers(recipe, "forward", 3)
    gradients, _ = own.quantizers(recipe, "backward", 2)
    weights.optimize_for_gemm = recipe.mxfp8()
    split = recipe.mxfp8() or recipe.fp8_gemm_dgrad.use_split_accumulator
    fields = dataclasses.fields(own.linear.LinearFwdArgs)
    options = {field.name: False if "bool" in str(field.type) else None for field in fields}
    options |= {"weight": w, "inp": x, "input_requires_grad": True, "weight_requires_grad": True, "fp8": True}
    options |= {"input_quantizer": inputs, "weight_quantizer": weights, "grad_output_quantizer": gradients}
    options |= {"activation_dtype": torch.bfloat16, "is_grad_enabled": True, "tp_size": 1}
    options |= {"dgrad_use_split_accumulator": split, "wgrad_use_split_accumulator": split}
    options |= {"is_first_microbatch": None, "skip_fp8_weight_update": None}
    y, *_ = own.linear._Linear.apply(w, x, None, own.linear.LinearFwdArgs(**options))
    return [y.detach(), *torch.autograd.grad(y, (x, w), grad)]


def by_us(recipe: Recipe, x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    products = make(recipe)
    y = products.linear(x, w, None if w.dim() == 2 else Groups(torch.tensor(COUNTS)))
    return [y.detach(), *torch.autograd.grad(y, (x, w), grad)]


def comparable(calls: list[Any]) -> tuple[list[Product], list[Quantised]]:
    """Return the matmuls, and how activations and gradients were quantised. Omit weights: TE quantises experts one by
    one, the backend all in one call. The order of scales (`optimize_for_gemm`) matters only for MXFP8.
    """
    operands = [c for c in calls if isinstance(c, Quantised) and c.shape not in ((F, D), (E * F, D))]
    plain = [replace(c, optimize_for_gemm=c.optimize_for_gemm and c.quantizer == "MXFP8Quantizer") for c in operands]
    return [c for c in calls if isinstance(c, Product)], plain


@pytest.mark.parametrize("experts", [False, True], ids=["matrix", "experts"])
@pytest.mark.parametrize("recipe", backend.RECIPES)
def test_the_same_calls_and_results(recipe, experts, own, monkeypatch):
    rows = sum(COUNTS)
    x, grad = draw(rows, D).requires_grad_(), draw(rows, F)
    w = draw(E, F, D) if experts else draw(F, D)
    theirs = grouped_by_itself if experts else matrix_by_itself
    wanted = theirs(own, scaling(own, recipe, monkeypatch), x, w.clone().requires_grad_(), grad)
    calls = comparable(own.extension.calls)
    own.extension.calls.clear()
    found = by_us(recipe, x, w.clone().requires_grad_(), grad)
    assert comparable(own.extension.calls) == calls and len(calls[0]) == 3 and len(calls[1]) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
