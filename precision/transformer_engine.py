"""FP8 by Transformer Engine (TE): its quantizers and GEMMs, called as its own `Linear` and `GroupedLinear` call them.

Only this file imports TE, and only inside functions: TE is optional and does not import without a GPU. This file uses
names that are not public in TE and therefore needs one exact version. Tests (`tests/precision`) compare its calls with
the sources of that version. `unavailable` checks TE against the emulation on the device before a run begins.

Experts never share a scale. One call quantises the rows or matrices of all experts, and one grouped GEMM multiplies
them, with token counts on the host. Within these calls TE still launches kernels for each expert. TE does not detect
inf: its kernels give a tile with inf the scale 1 and saturate (NaN stays NaN).

Shapes: T tokens, D input size, F output size, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from core.errors import one_line
from precision.config import Recipe
from precision.fp8_emulated import EmulatedArithmetic
from precision.fp8_linear import LARGEST_ERROR, Float8Gemm, Operand
from precision.fp8_tiles import Tiled
from precision.gemm import Groups

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.mxfp8)
EXPERTS = (
    "experts wait for their token counts on the host, once per MoE layer: the grouped matmul that need not (cuBLASLt "
    "13.3 on Blackwell; on Hopper 13.5 for tensorwise, 13.6 for blockwise) is not used"
)
VERSION = "2.20.2"
INSTALL = f'pip install --no-build-isolation "transformer-engine[pytorch]=={VERSION}", after installing torch for CUDA'


@dataclass(frozen=True)
class QuantisedParts:
    """TE's storage of a quantised operand, or one storage per expert. `shape`: the shape of the operand."""

    parts: tuple[Any, ...]
    shape: torch.Size

    def only_columns(self) -> QuantisedParts:
        kept = tuple(_shallow_copy(part) for part in self.parts)
        for part in kept:
            part.update_usage(rowwise_usage=False, columnwise_usage=True)
        return replace(self, parts=kept)

    def tensors(self) -> list[Tensor | None]:
        return [tensor for part in self.parts for tensor in _shallow_copy(part).prepare_for_saving()[0]]

    def restored(self, tensors: Sequence[Tensor | None]) -> QuantisedParts:
        kept, rest = tuple(_shallow_copy(part) for part in self.parts), list(tensors)
        for part in kept:
            rest = part.restore_from_saved(rest)
        return replace(self, parts=kept)


def _shallow_copy(part: Any) -> Any:
    """Make a shallow copy of a storage, because TE's methods to save and restore a storage modify it."""
    copy = object.__new__(type(part))
    vars(copy).update(vars(part))
    return copy


class TransformerEngine:
    """`fp8_linear.Arithmetic` by Transformer Engine. A layout says how the operands A and B are contracted: "TN" uses
    the rows of both, "NN" the columns of A and the rows of B, and "NT" the columns of both. A is the weight, except for
    the weight gradient, where it is the activation.
    """

    def __init__(self, recipe: Recipe, compute_dtype: torch.dtype) -> None:
        from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling
        from transformer_engine.pytorch.module.base import _2X_ACC_DGRAD, _2X_ACC_FPROP, _2X_ACC_WGRAD
        from transformer_engine.pytorch.quantization import RecipeState

        self.recipe, self.compute_dtype = recipe, compute_dtype
        self.token_multiple, self.joint_multiple = recipe.multiple, recipe.joint_multiple
        if recipe is Recipe.mxfp8:
            scaling: Any = MXFP8BlockScaling()
            splits = _2X_ACC_FPROP, _2X_ACC_DGRAD, _2X_ACC_WGRAD
        else:
            scaling = Float8BlockScaling() if recipe is Recipe.blockwise else Float8CurrentScaling()
            products = scaling.fp8_gemm_fprop, scaling.fp8_gemm_dgrad, scaling.fp8_gemm_wgrad
            splits = tuple(product.use_split_accumulator for product in products)
        self.split_accumulator = dict(zip(("TN", "NN", "NT"), splits, strict=True))
        forward = RecipeState.create(scaling, mode="forward", num_quantizers=2)  # input, weight
        backward = RecipeState.create(scaling, mode="backward", num_quantizers=1)  # gradient of the output
        quantizers = [*forward.make_quantizers(), *backward.make_quantizers()]
        self.quantizers = dict(zip((Operand.activation, Operand.weight, Operand.gradient), quantizers, strict=True))
        for quantizer in quantizers:
            quantizer.internal = True  # return TE's storages instead of subclasses of Tensor
            quantizer.optimize_for_gemm = recipe is Recipe.mxfp8  # MXFP8 scales in the order in which GEMMs read them

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> QuantisedParts:
        import transformer_engine_torch as tex

        quantizer = self.quantizers[operand]
        # TE's kernels quantise columns in square tiles, or with one scale, only together with the rows
        beside = operand is Operand.weight or self.recipe is Recipe.tensorwise
        quantizer.set_usage(rowwise=rows or beside, columnwise=columns)
        if groups is None and x.dim() == 2:
            return QuantisedParts((quantizer(x),), x.shape)
        counts = [x.shape[1]] * len(x) if groups is None else groups.host
        used = x.flatten(0, -2)[: sum(counts)]
        return QuantisedParts(tuple(tex.split_quantize(used, counts, [quantizer] * len(counts))), x.shape)

    def forward(self, x: QuantisedParts, w: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(w, x, "TN", groups, (x.shape[0], w.shape[-2]))

    def input_gradient(self, grad: QuantisedParts, w: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(w, grad, "NN", groups, (grad.shape[0], w.shape[-1]))

    def weight_gradient(self, grad: QuantisedParts, x: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(x, grad, "NT", groups, (len(x.parts), grad.shape[-1], x.shape[-1]))

    def _product(
        self, a: QuantisedParts, b: QuantisedParts, layout: str, groups: Groups | None, shape: tuple[int, ...]
    ) -> Tensor:
        """Multiply. `shape`: shape of the joint result of all experts, rows [C, F or D] or matrices [E, F, D]."""
        from transformer_engine.pytorch.cpp_extensions import general_gemm, general_grouped_gemm

        split = self.split_accumulator[layout]
        options: dict[str, Any] = dict(layout=layout, grad=layout != "TN", use_split_accumulator=split)
        if groups is None:
            return general_gemm(a.parts[0], b.parts[0], out_dtype=self.compute_dtype, **options)[0]
        y = torch.empty(shape, dtype=self.compute_dtype, device=a.parts[0].device)
        is_rows = len(shape) == 2
        general_grouped_gemm(
            list(a.parts),
            list(b.parts),
            [y] if is_rows else list(y.unbind(0)),  # the matrix of an expert without rows becomes zero
            [None] * len(a.parts),
            self.compute_dtype,
            m_splits=groups.host,
            single_output=is_rows,
            **options,
        )
        return y


arithmetic = TransformerEngine


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    is_cuda = device.type == "cuda"
    reasons = [] if is_cuda else [f"Transformer Engine needs an NVIDIA GPU; the device is {device.type}"]
    if reasons := [*reasons, *_installation_problems()]:
        return reasons
    with torch.cuda.device(device):
        reason = _unsupported(recipe) or _trial_failure(recipe, str(device))
    return [reason] if reason else []


def _installation_problems() -> list[str]:
    installed = _installed()
    if installed is None:
        return [f"Transformer Engine is not installed: {INSTALL}"]
    wrong = []
    if installed.partition("+")[0] != VERSION:  # a build from source has +COMMIT after the version
        wrong.append(f"Transformer Engine {installed} is installed, but {VERSION} is needed: {INSTALL}")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # without its libraries: RuntimeError, OSError, AssertionError, FileNotFoundError
        wrong.append(f"Transformer Engine {installed} is installed but does not import ({one_line(error)}): {INSTALL}")
    return wrong


def _unsupported(recipe: Recipe) -> str | None:
    """Return TE's reason why the current device does not support a recipe, or None if it does."""
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available, is_mxfp8_available

    ask: Callable[..., tuple[bool, str]] = {
        Recipe.blockwise: is_fp8_block_scaling_available,
        Recipe.tensorwise: is_fp8_available,
        Recipe.mxfp8: is_mxfp8_available,
    }[recipe]
    available, reason = ask(return_reason=True)
    return None if available else f"{reason.rstrip('.')} (precision.recipe=auto selects a supported one)"


@cache
def _trial_failure(recipe: Recipe, device: str) -> str | None:
    """Try small operands and matmuls of each kind on this device. Return the first failure, or None if bytes and scales
    equal the emulation's and results differ by rounding only.
    """
    try:
        wrong = next(_differences(recipe, torch.device(device)), None)
        return wrong and f"{version()} computes {wrong} on {device} unlike the emulation: use another recipe"
    except Exception as error:  # any error here would also end the first step
        return f"{version()} fails on {device} ({one_line(error)}): use another recipe, CUDA release or cuDNN release"


def _differences(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """Yield the differences between Transformer Engine and the emulation: bytes and scales of operands, then results.
    The trial includes an expert without rows and rows without an expert.
    """
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16

    def operand(*shape: int) -> Tensor:
        """Return a random operand whose rows have very different magnitudes."""
        sizes = torch.randn(*shape[:-1], 1, generator=generator).mul(2).exp()
        return (torch.randn(*shape, generator=generator) * sizes).to(device, dtype)

    least = recipe.multiple  # the fewest rows of an expert
    groups = Groups(torch.tensor([3 * least, 0, least, 5 * least], device=device))
    x, grad = operand(11 * least, 256), operand(11 * least, 384)
    weights: list[tuple[Tensor, Groups | None]] = [(operand(384, 256), None), (operand(4, 384, 256), groups)]
    engine, emulation = TransformerEngine(recipe, dtype), EmulatedArithmetic(recipe, dtype)
    for quantizer in engine.quantizers.values():
        quantizer.optimize_for_gemm = False  # scales in row order, as the emulation has them
    for w, split in weights:
        operands = ((Operand.activation, x, split), (Operand.gradient, grad, split), (Operand.weight, w, None))
        for kind, tensor, among in operands:
            found = engine.quantise(tensor, kind, among, True, True)
            wanted = emulation.quantise(tensor, kind, among, True, True)
            yield from _byte_differences(recipe, kind, found, wanted)
    for w, split in weights:
        ours = _results(Float8Gemm(TransformerEngine(recipe, dtype), "a trial"), x, w, grad, split)
        exact = _results(Float8Gemm(emulation, "a trial"), x, w, grad, split)
        for name, result in ours.items():
            error = float((result.float() - exact[name].float()).norm() / exact[name].float().norm())
            if not error < LARGEST_ERROR:
                yield f"{name} of {'a matrix' if split is None else 'experts'} (off by {error:.1e})"


def _byte_differences(recipe: Recipe, operand: Operand, found: QuantisedParts, wanted: Tiled) -> Iterator[str]:
    for columns, matrices in ((False, wanted.rows), (True, wanted.columns)):
        for part, rows in zip(found.parts, matrices, strict=True):
            data, scale = _stored(recipe, part, columns)
            if data is None:
                continue  # with one scale, Blackwell's GEMMs read columns without a transposed copy
            inverse = rows.inverse_scale
            if recipe is Recipe.mxfp8:
                inverse = (inverse.view(torch.int32) >> 23).to(torch.uint8)
            scale = scale[: inverse.shape[0], : inverse.shape[1]]
            if not (torch.equal(data, rows.data.view(torch.uint8)) and torch.equal(scale, inverse)):
                yield f"bytes or scales for the {'columns' if columns else 'rows'} of the {operand.value}"


def _stored(recipe: Recipe, part: Any, columns: bool) -> tuple[Tensor | None, Tensor]:
    """Return bytes and padded inverse scales in the order of `precision.fp8_tiles.QuantisedRows`."""
    kept, side = part.get_metadata(), "columnwise" if columns else "rowwise"
    if recipe is Recipe.tensorwise:
        return kept["data_transpose" if columns else "data"], kept["fp8_scale_inv"].reshape(1, 1)
    data, scale = kept[f"{side}_data"], kept[f"{side}_scale_inv"]
    if recipe is Recipe.mxfp8:
        return (data.t(), scale.t()) if columns else (data, scale)
    return data, scale if kept["is_2D_scaled"] else scale.t()


def _results(products: Float8Gemm, x: Tensor, w: Tensor, grad: Tensor, groups: Groups | None) -> dict[str, Tensor]:
    """Compute a matmul and its gradients, without the rows that belong to no expert."""
    with torch.enable_grad():
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = products.linear(x, w, groups)
        grads = torch.autograd.grad(y, (x, w), grad)
    used = len(x) if groups is None else sum(groups.host)
    return {"products": y.detach()[:used], "gradients of inputs": grads[0][:used], "gradients of weights": grads[1]}


def version() -> str:
    return f"Transformer Engine {_installed() or '(not installed)'}"


def _installed() -> str | None:
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
