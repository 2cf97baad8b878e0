"""Number formats of computation and parameters, and the backend of the matmuls."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from core.errors import ConfigError, check_numbers

if TYPE_CHECKING:
    import torch


class Compute(Enum):
    """A floating-point format."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class ParamDtype(Enum):
    """Dtype of parameters, gradients and optimizer state."""

    master = "master"
    """float32; float64 if `compute` is float64."""
    bfloat16 = "bfloat16"
    """Halves the memory, but updates smaller than 1/256 of a weight are lost."""


class Backend(Enum):
    """Backend of the matmuls. `native`: PyTorch in the compute dtype. The others compute the matmuls of `fp8_products`
    in FP8. `te`: Transformer Engine on Hopper and Blackwell. `torch`: PyTorch's `scaled_mm`. `emulated`: an
    emulation of every recipe on any device, for tests and certificates.
    """

    native = "native"
    te = "te"
    torch = "torch"
    emulated = "emulated"


class Recipe(Enum):
    """The tiles into which an operand is divided. A tile has one scale, computed from its present values.

    `blockwise`: tiles of 1x128 for activations and gradients and of 128x128 for weights, E4M3, with powers of two as
    scales (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). `tensorwise`: the whole operand, E4M3 forward and E5M2 for
    gradients (Micikevicius et al. 2022, arXiv 2209.05433). `rowwise`: each row along the contracted dimension, E4M3.
    `mxfp8`: 32 elements along the contracted dimension, E4M3, with E8M0 scales (OCP Microscaling Formats 1.0). `auto`:
    blockwise on Hopper and CPUs, mxfp8 on Blackwell of compute capability 10.x and 11.x, tensorwise on other GPUs.
    """

    auto = "auto"
    blockwise = "blockwise"
    tensorwise = "tensorwise"
    rowwise = "rowwise"
    mxfp8 = "mxfp8"

    def on(self, device: torch.device) -> Recipe:
        """Return this recipe, with `auto` resolved for `device`."""
        if self is not Recipe.auto:
            return self
        if device.type != "cuda":
            return Recipe.blockwise
        import torch

        capability = torch.cuda.get_device_capability(device)
        if (10, 0) <= capability < (12, 0):
            return Recipe.mxfp8
        return Recipe.blockwise if (9, 0) <= capability < (10, 0) else Recipe.tensorwise

    @property
    def multiple(self) -> int:
        """Both dimensions of every operand must be multiples of this."""
        return 32 if self is Recipe.mxfp8 else 16

    @property
    def joint_multiple(self) -> int | None:
        """No scale spans two matrices [F, D] that are stacked along F, nor the gradients of their outputs, if F is a
        multiple of this. None if a scale spans all of F.
        """
        return {Recipe.blockwise: 128, Recipe.mxfp8: 32}.get(self)


class KernelKind(Enum):
    """Kernels of the memory-bound steps: norms, rotation, permutation of tokens by expert, and SwiGLU. `torch`:
    PyTorch's operations. `triton`: kernels that read and write the data once, on GPUs. `auto`: Triton's on GPUs.
    """

    auto = "auto"
    torch = "torch"
    triton = "triton"


class AttentionKind(Enum):
    """Kernels of attention. `varlen`: one call of flash attention for all documents of a micro-batch, on GPUs.
    `segments`: PyTorch's attention, for each part of a document. `auto`: `varlen` in bfloat16 on GPUs.
    """

    auto = "auto"
    varlen = "varlen"
    segments = "segments"


class Products(Enum):
    """Groups of matmuls. Only the first four may use FP8; the others use the compute dtype or a wider one."""

    attention = "attention"
    """Query, key, value and output projections."""
    dense = "dense"
    shared = "shared"
    expert = "expert"
    router = "router"
    head = "head"
    embedding = "embedding"
    vision = "vision"
    """All matrices of the vision encoder. Patches of 588 values fit no FP8 recipe."""


ELIGIBLE = (Products.attention, Products.dense, Products.shared, Products.expert)


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and backend of a run. `compute=bfloat16` alone gives bf16 matmuls with fp32 weights.

    Parameters and checkpoints have the same format with every backend.
    """

    compute: Compute = Compute.float32
    """Dtype of activations and matmuls: bfloat16 for GPUs, a wider one for CPUs and tests."""
    param_dtype: ParamDtype = ParamDtype.master
    """The optimizer's moments may have another: `optimizer.moments`."""
    backend: Backend = Backend.native
    recipe: Recipe = Recipe.auto
    """Used by FP8 backends only."""
    fp8_products: list[Products] = field(default_factory=lambda: list(ELIGIBLE))
    """Groups of matmuls that an FP8 backend computes in FP8."""
    bf16_first_layers: int = 0
    """Number of layers at the start of the model that keep the compute dtype under an FP8 backend."""
    bf16_last_layers: int = 0
    """Number of layers at the end of the model that keep the compute dtype under an FP8 backend."""
    kernels: KernelKind = KernelKind.auto
    attention: AttentionKind = AttentionKind.auto

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("bf16_first_layers", "bf16_last_layers"))
        if self.param_dtype is ParamDtype.bfloat16 and self.compute is not Compute.bfloat16:
            reason = "needs bfloat16 matmuls: add precision.compute=bfloat16"
            raise ConfigError("param_dtype", self.param_dtype, reason, [ParamDtype.master.value])
        for products in self.fp8_products:
            if products not in ELIGIBLE:
                reason = f"the {products.value} must not be rounded to FP8: remove it"
                raise ConfigError("fp8_products", products, reason, [[kind.value for kind in ELIGIBLE]])
        if self.backend in (Backend.te, Backend.torch) and self.compute is not Compute.bfloat16:
            reason = f"{self.backend.value} needs bfloat16 activations: add precision=fp8 or precision.compute=bfloat16"
            raise ConfigError("compute", self.compute, reason, [Compute.bfloat16.value])
        if len(set(self.fp8_products)) < len(self.fp8_products):
            raise ConfigError("fp8_products", None, "names the same products twice")
        if self.uses_float8 and not self.fp8_products:
            raise ConfigError("fp8_products", None, "names no product: use precision.backend=native", [["expert"]])

    @property
    def uses_float8(self) -> bool:
        return self.backend is not Backend.native

    def in_float8(self, products: Products | None, layer: int, layers: int) -> bool:
        """Return whether these matmuls of layer number `layer` (from 0) use FP8."""
        inner = self.bf16_first_layers <= layer < layers - self.bf16_last_layers
        return self.uses_float8 and products in self.fp8_products and inner

    @property
    def compute_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.compute.value)

    @property
    def master_dtype(self) -> torch.dtype:
        """Dtype of parameters and optimizer state."""
        import torch

        if self.param_dtype is ParamDtype.bfloat16:
            return torch.bfloat16
        return torch.float64 if self.compute is Compute.float64 else torch.float32
