"""Resolve a precision configuration into GEMM backends, or report every reason why they are unavailable."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from core.errors import ConfigError
from precision import fp8_emulated, fp8_torch, transformer_engine
from precision.config import AttentionKind, Backend, Compute, KernelKind, PrecisionConfig, Products, Recipe
from precision.fp8_linear import Arithmetic, Float8Gemm
from precision.gemm import GemmBackend
from precision.native_gemm import NativeGemm
from precision.weight_copies import WeightClock


class Float8Library(Protocol):
    RECIPES: tuple[Recipe, ...]
    EXPERTS: str
    """How it multiplies experts, if that costs time."""

    def unavailable(self, recipe: Recipe, device: torch.device) -> list[str]:
        """Return every reason why this recipe is unavailable on this device, with the remedy; empty if available."""
        ...

    def arithmetic(self, recipe: Recipe, compute_dtype: torch.dtype) -> Arithmetic: ...

    def version(self) -> str: ...


FLOAT8_LIBRARIES: dict[Backend, Float8Library] = {
    Backend.te: transformer_engine,
    Backend.torch: fp8_torch,
    Backend.emulated: fp8_emulated,
}


@dataclass(frozen=True)
class LayerGemms:
    """The GEMM backends of one layer."""

    plain: GemmBackend
    float8: Callable[[Products, str], GemmBackend | None] = field(default=lambda products, name: None)
    kernels: KernelKind = KernelKind.torch
    attention: AttentionKind = AttentionKind.segments

    def of(self, products: Products, name: str) -> GemmBackend:
        """Return the backend of one module; `name` names the module in errors."""
        return self.float8(products, name) or self.plain


@dataclass(frozen=True)
class Precision:
    """GEMM backends of a run. `recipe`: the FP8 recipe, with `auto` resolved; None without FP8. `kernels` and
    `attention`: those of the configuration, with `auto` resolved.
    """

    config: PrecisionConfig
    recipe: Recipe | None = None
    kernels: KernelKind = KernelKind.torch
    attention: AttentionKind = AttentionKind.segments
    clock: WeightClock = field(default_factory=WeightClock, compare=False)
    """Ticks when an engine writes weights of the models that are made with these backends."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.config.compute_dtype

    @property
    def plain(self) -> LayerGemms:
        """Backends of the modules outside the layers."""
        return LayerGemms(NativeGemm(self.compute_dtype, self.clock), kernels=self.kernels, attention=self.attention)

    def at(self, layer: int, layers: int) -> LayerGemms:
        """Return the backends of layer number `layer` (from 0) out of `layers`."""
        recipe, config = self.recipe, self.config
        if recipe is None:
            return self.plain

        def float8(products: Products, name: str) -> GemmBackend | None:
            if not config.in_float8(products, layer, layers):
                return None
            arithmetic = FLOAT8_LIBRARIES[config.backend].arithmetic(recipe, config.compute_dtype)
            return Float8Gemm(arithmetic, f"layer {layer}, {name}")

        return replace(self.plain, float8=float8)

    def __str__(self) -> str:
        if self.recipe is None:
            return self.config.compute.value
        kinds = ", ".join(products.value for products in self.config.fp8_products)
        library = FLOAT8_LIBRARIES[self.config.backend]
        said = f"FP8 {self.recipe.value} by {library.version()} for {kinds}; the rest {self.config.compute.value}"
        slow = library.EXPERTS if Products.expert in self.config.fp8_products else ""
        return f"{said}; {slow}" if slow else said


CPU = torch.device("cpu")
_GROUPED = ((9, 0), (10, 0))
"""The compute capabilities for which torch 2.13's `grouped_mm` has kernels for all groups at once."""
VARLEN_SINCE = "2.12"
"""The first version of torch whose `varlen_attn` has `enable_gqa`; 2.11 has `window_size` only."""


def resolve(config: PrecisionConfig, device: torch.device = CPU, runs: bool = True) -> Precision:
    """Return the backends for `config` on `device`. Raises `ConfigError` with every reason if one is unavailable.

    `runs`: False if Triton's kernels need not run here, because tensors have no values.
    """
    return Precision(config, _recipe(config, device), _kernels(config, device, runs), _attention(config, device))


def _recipe(config: PrecisionConfig, device: torch.device) -> Recipe | None:
    if not config.uses_float8:
        return None
    recipe = config.recipe.on(device)
    if reasons := unavailable(config.backend, recipe, device):
        backend = config.backend
        others = [other.value for other in FLOAT8_LIBRARIES if not unavailable(other, recipe, device)]
        known = [one.value for one in FLOAT8_LIBRARIES[backend].RECIPES if not unavailable(backend, one, device)]
        reason = f"cannot do {recipe.value} here: {'; '.join(reasons)}"
        reason += f"; it can do {', '.join(known)}" if known else ""
        raise ConfigError("precision.backend", backend, reason, [*others, "native"])
    return recipe


def _kernels(config: PrecisionConfig, device: torch.device, runs: bool) -> KernelKind:
    if config.kernels is KernelKind.auto and device.type != "cuda":
        return KernelKind.torch
    if runs and config.kernels is not KernelKind.torch and (reason := no_triton(device)):
        raise ConfigError("precision.kernels", config.kernels, reason, [KernelKind.torch.value])
    return KernelKind.torch if config.kernels is KernelKind.torch else KernelKind.triton


def _attention(config: PrecisionConfig, device: torch.device) -> AttentionKind:
    if not wants_varlen(config, device):
        return AttentionKind.segments
    if reason := no_varlen(config, device):
        raise ConfigError("precision.attention", config.attention, reason, [AttentionKind.segments.value])
    return AttentionKind.varlen


def wants_varlen(config: PrecisionConfig, device: torch.device) -> bool:
    """Return whether flash attention of varying lengths is asked for: by name, or by `auto` in bfloat16 on a GPU."""
    if config.attention is AttentionKind.auto:
        return device.type == "cuda" and config.compute is Compute.bfloat16
    return config.attention is AttentionKind.varlen


def no_varlen(config: PrecisionConfig, device: torch.device) -> str | None:
    """Return why flash attention of varying lengths cannot run, or None."""
    if device.type != "cuda":
        return "flash attention of varying lengths runs on GPUs only"
    if config.compute is not Compute.bfloat16:
        return f"flash attention has no {config.compute.value}: add precision.compute=bfloat16"
    if torch.__version__ < VARLEN_SINCE:
        missing = f"torch {torch.__version__} has no flash attention of varying lengths with grouped heads"
        return f"{missing}: pip install 'torch>={VARLEN_SINCE}'"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"flash attention needs a GPU of compute capability 8.0 or later; this one has {found[0]}.{found[1]}"
    return None


def slow_experts(device: torch.device) -> str | None:
    """Return why the matmuls of experts in bfloat16 are slow on a device, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(device)
    if found in _GROUPED:
        return None
    slow = "PyTorch multiplies one expert at a time and waits for the device in each MoE layer"
    return f"on compute capability {found[0]}.{found[1]} {slow}; it has grouped kernels for 9.0 and 10.0"


def no_triton(device: torch.device) -> str | None:
    """Return why a device cannot run Triton's kernels, or None. Triton's interpreter, for tests, runs anywhere."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels run on GPUs only"
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if device.type == "cuda" and torch.cuda.is_available() and not found:
        return "Triton needs a C compiler: install gcc, or set CC"
    return None


def no_compilation(device: torch.device) -> str | None:
    """Return why torch.compile cannot compile for a device, or None."""
    if device.type == "cuda":
        return no_triton(device)
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler: install g++, or set CXX to one that runs"
    return None


def unavailable(backend: Backend, recipe: Recipe, device: torch.device) -> list[str]:
    """Return every reason why an FP8 backend lacks a recipe on a device; empty if available."""
    library = FLOAT8_LIBRARIES[backend]
    if recipe not in library.RECIPES:
        return [f"{backend.value} supports {', '.join(known.value for known in library.RECIPES)}"]
    return library.unavailable(recipe, device)


def availability(device: torch.device) -> dict[str, dict[str, list[str]]]:
    """Return the reasons why each recipe of each backend is unavailable; empty if it is available."""
    recipes = [recipe for recipe in Recipe if recipe is not Recipe.auto]
    return {b.value: {recipe.value: unavailable(b, recipe, device) for recipe in recipes} for b in FLOAT8_LIBRARIES}
