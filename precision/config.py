"""In which number formats a run computes and keeps its parameters, and who does its matrix products."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from core.errors import ConfigError, check_numbers


class Compute(Enum):
    """The number format of activations and matrix products."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class ParamDtype(Enum):
    """The number format in which parameters, gradients and optimizer state are kept."""

    master = "master"
    """float32, float64 under float64."""
    bfloat16 = "bfloat16"
    """Half the memory; updates smaller than 1/256 of a weight are lost."""


class Backend(Enum):
    """Who multiplies. `native`: PyTorch's products in the compute format, whichever that is. The others multiply in FP8
    what `float8` names: `te` Transformer Engine on Hopper and Blackwell, `torch` PyTorch's scaled products, `emulated`
    an exact emulation on any device, for tests and certificates.
    """

    native = "native"
    te = "te"
    torch = "torch"
    emulated = "emulated"


class Recipe(Enum):
    """Which elements of an operand share a scale; all are stateless.

    `blockwise`: 1x128 tiles of activations and gradients, 128x128 of weights, E4M3, powers of two (DeepSeek-V3, arXiv
    2412.19437, section 3.3.2). `tensorwise`: the whole operand, E4M3 forward and E5M2 for gradients (Micikevicius et
    al. 2022, arXiv 2209.05433). `rowwise`: each row of the product's contraction, E4M3. `mxfp8`: 32 elements, E4M3,
    E8M0 scales (OCP Microscaling Formats 1.0). `auto`: blockwise on Hopper and
    CPUs, mxfp8 on Blackwell (10.x), tensorwise on other GPUs.
    """

    auto = "auto"
    blockwise = "blockwise"
    tensorwise = "tensorwise"
    rowwise = "rowwise"
    mxfp8 = "mxfp8"

    def on(self, device: torch.device) -> Recipe:
        """This recipe, or what `auto` means on a device."""
        if self is not Recipe.auto:
            return self
        if device.type != "cuda":
            return Recipe.blockwise
        capability = torch.cuda.get_device_capability(device)
        if (10, 0) <= capability < (12, 0):
            return Recipe.mxfp8
        return Recipe.blockwise if (9, 0) <= capability < (10, 0) else Recipe.tensorwise

    @property
    def multiple(self) -> int:
        """What both dimensions of every operand must be multiples of."""
        return 32 if self is Recipe.mxfp8 else 16


class KernelKind(Enum):
    """Who moves tokens to experts and back and gates between their products: PyTorch, or kernels in Triton that pass
    over the data once (GPUs).
    """

    torch = "torch"
    triton = "triton"


class Products(Enum):
    """Groups of matrix products. FP8 is for the first four; the others stay in the compute format or wider."""

    attention = "attention"
    """Query, key, value and output projections."""
    dense = "dense"
    shared = "shared"
    expert = "expert"
    router = "router"
    head = "head"
    embedding = "embedding"


ELIGIBLE = (Products.attention, Products.dense, Products.shared, Products.expert)


@dataclass(frozen=True)
class PrecisionConfig:
    """`compute` is the format of activations, `param_dtype` that of what is kept: bfloat16 and master are bf16 products
    with fp32 master weights. Parameters and checkpoints are the same for every backend.
    """

    compute: Compute = Compute.float32
    param_dtype: ParamDtype = ParamDtype.master
    backend: Backend = Backend.native
    recipe: Recipe = Recipe.auto
    fp8_products: list[Products] = field(default_factory=lambda: list(ELIGIBLE))
    """The products that an FP8 backend does in FP8."""
    bf16_first_layers: int = 0
    """So many layers at the beginning stay in the compute format under an FP8 backend."""
    bf16_last_layers: int = 0
    kernels: KernelKind = KernelKind.torch

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("bf16_first_layers", "bf16_last_layers"))
        if self.param_dtype is ParamDtype.bfloat16 and self.compute is not Compute.bfloat16:
            reason = "would lose what wider products gain; add precision.compute=bfloat16"
            raise ConfigError("param_dtype", self.param_dtype, reason, [ParamDtype.master.value])
        for products in self.fp8_products:
            if products not in ELIGIBLE:
                reason = f"the {products.value} must not be rounded to FP8: leave it out"
                raise ConfigError("fp8_products", products, reason, [[kind.value for kind in ELIGIBLE]])
        if self.backend in (Backend.te, Backend.torch) and self.compute is not Compute.bfloat16:
            reason = f"{self.backend.value} takes and gives bfloat16: add precision=fp8 or precision.compute=bfloat16"
            raise ConfigError("compute", self.compute, reason, [Compute.bfloat16.value])
        if len(set(self.fp8_products)) < len(self.fp8_products):
            raise ConfigError("fp8_products", None, "names the same products twice")
        if self.uses_float8 and not self.fp8_products:
            raise ConfigError("fp8_products", None, "names no product: use precision.backend=native", [["expert"]])

    @property
    def uses_float8(self) -> bool:
        return self.backend is not Backend.native

    def in_float8(self, products: Products | None, layer: int, layers: int) -> bool:
        """Whether these products of a layer, counted from 0, are done in FP8."""
        inner = self.bf16_first_layers <= layer < layers - self.bf16_last_layers
        return self.uses_float8 and products in self.fp8_products and inner

    @property
    def compute_dtype(self) -> torch.dtype:
        return {
            Compute.bfloat16: torch.bfloat16,
            Compute.float32: torch.float32,
            Compute.float64: torch.float64,
        }[self.compute]

    @property
    def master_dtype(self) -> torch.dtype:
        """What parameters are kept in."""
        if self.param_dtype is ParamDtype.bfloat16:
            return torch.bfloat16
        return torch.float64 if self.compute is Compute.float64 else torch.float32
