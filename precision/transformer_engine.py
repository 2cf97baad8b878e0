"""FP8 by Transformer Engine: its quantizers and products, called as its own `Linear` and `GroupedLinear` call them.

This is the only file that imports it, and only inside functions: it is optional, and fails to import where there is no
GPU. It leans on names below TE's public modules, hence on one version; `tests/precision` hold this file against the
sources of that version, and `unavailable` holds it against the reference, on the device, before a run begins.

Experts share a scale with no one and go to one grouped product, with their counts on the host. What TE does not do is
notice an operand with inf: its kernels give that tile the scale 1 and saturate (NaN stays NaN).

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from precision.config import Recipe
from precision.fp8_emulated import EmulatedArithmetic
from precision.fp8_linear import Float8Gemm, Operand
from precision.fp8_tiles import Tiled
from precision.gemm import GemmBackend, Groups

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.mxfp8)
VERSION = "2.20.2"
INSTALL = f'pip install --no-build-isolation "transformer-engine[pytorch]=={VERSION}", with torch for CUDA there first'
_LARGEST_ERROR = 1e-2
"""Of a product against the emulated one, relative: bfloat16 rounds to 2^-9."""


@dataclass(frozen=True)
class QuantisedParts:
    """TE's storages of a quantised operand: one, or one for each expert. `shape` is that of the operand."""

    parts: tuple[Any, ...]
    shape: torch.Size

    def only_columns(self) -> QuantisedParts:
        kept = tuple(_twin(part) for part in self.parts)
        for part in kept:
            part.update_usage(rowwise_usage=False, columnwise_usage=True)
        return replace(self, parts=kept)

    def tensors(self) -> list[Tensor | None]:
        return [tensor for part in self.parts for tensor in _twin(part).prepare_for_saving()[0]]

    def restored(self, tensors: Sequence[Tensor | None]) -> QuantisedParts:
        kept, rest = tuple(_twin(part) for part in self.parts), list(tensors)
        for part in kept:
            rest = part.restore_from_saved(rest)
        return replace(self, parts=kept)


def _twin(part: Any) -> Any:
    """Another storage of the same tensors: TE's own methods to save and restore one change it."""
    twin = object.__new__(type(part))
    vars(twin).update(vars(part))
    return twin


class TransformerEngine:
    """`fp8_linear.Arithmetic` by Transformer Engine. Its products are named by which dimensions are contracted:
    "TN" the rows of both operands, "NN" the columns of A with the rows of B, "NT" the columns of both; A is the weight,
    or the activation for the weight's gradient.
    """

    def __init__(self, recipe: Recipe, compute_dtype: torch.dtype) -> None:
        from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling
        from transformer_engine.pytorch.module.base import _2X_ACC_DGRAD, _2X_ACC_FPROP, _2X_ACC_WGRAD
        from transformer_engine.pytorch.quantization import RecipeState

        self.recipe, self.compute_dtype, self.token_multiple = recipe, compute_dtype, recipe.multiple
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
            quantizer.internal = True  # bare storages: no subclasses of Tensor
            quantizer.optimize_for_gemm = recipe is Recipe.mxfp8  # its scales come in the order that products read

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> QuantisedParts:
        import transformer_engine_torch as tex

        quantizer = self.quantizers[operand]
        # TE's kernels make the columns of square tiles and of whole tensors only beside their rows
        beside = operand is Operand.weight or self.recipe is Recipe.tensorwise
        quantizer.set_usage(rowwise=rows or beside, columnwise=columns)
        if groups is not None:
            parts = tex.split_quantize(x[: sum(groups.host)], groups.host, [quantizer] * len(groups.host))
        else:
            parts = [quantizer(matrix) for matrix in (x if x.dim() == 3 else [x])]
        return QuantisedParts(tuple(parts), x.shape)

    def forward(self, x: QuantisedParts, w: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(w, x, "TN", groups, (x.shape[0], w.shape[-2]))

    def input_gradient(self, grad: QuantisedParts, w: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(w, grad, "NN", groups, (grad.shape[0], w.shape[-1]))

    def weight_gradient(self, grad: QuantisedParts, x: QuantisedParts, groups: Groups | None) -> Tensor:
        return self._product(x, grad, "NT", groups, (len(x.parts), grad.shape[-1], x.shape[-1]))

    def _product(
        self, a: QuantisedParts, b: QuantisedParts, layout: str, groups: Groups | None, shape: tuple[int, ...]
    ) -> Tensor:
        """`shape`: of what experts give together: all their rows, or a matrix each."""
        from transformer_engine.pytorch.cpp_extensions import general_gemm, general_grouped_gemm

        backward, split = layout != "TN", self.split_accumulator[layout]
        if groups is None:
            y: Tensor = general_gemm(
                a.parts[0],
                b.parts[0],
                out_dtype=self.compute_dtype,
                layout=layout,
                use_split_accumulator=split,
                grad=backward,
            )[0]
            return y
        y = torch.empty(shape, dtype=self.compute_dtype, device=a.parts[0].device)
        is_rows = len(shape) == 2
        general_grouped_gemm(
            list(a.parts),
            list(b.parts),
            [y] if is_rows else list(y.unbind(0)),  # a matrix of an expert without rows becomes zero
            [None] * len(a.parts),
            self.compute_dtype,
            layout=layout,
            m_splits=groups.host,
            grad=backward,
            use_split_accumulator=split,
            single_output=is_rows,
        )
        return y


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    is_cuda = device.type == "cuda"
    reasons = [] if is_cuda else [f"Transformer Engine needs an NVIDIA GPU, and this is the {device.type}"]
    reasons += _installation()
    if reasons:
        return reasons
    with torch.cuda.device(device):
        reason = _refusal(recipe) or _tried(recipe, str(device))
    return [reason] if reason else []


def _installation() -> list[str]:
    """What is wrong with the installed package."""
    installed = _installed()
    if installed is None:
        return [f"Transformer Engine is not installed: {INSTALL}"]
    wrong = []
    if installed.partition("+")[0] != VERSION:  # what is built from source carries its commit after the version
        wrong.append(f"Transformer Engine {installed} is installed, and only {VERSION} is known to fit: {INSTALL}")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # without its libraries: RuntimeError, OSError, AssertionError, FileNotFoundError
        wrong.append(f"Transformer Engine {installed} is installed and does not import ({_line(error)}): {INSTALL}")
    return wrong


def _refusal(recipe: Recipe) -> str | None:
    """TE's own reason against a recipe on the current device."""
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available, is_mxfp8_available

    ask: Callable[..., tuple[bool, str]] = {
        Recipe.blockwise: is_fp8_block_scaling_available,
        Recipe.tensorwise: is_fp8_available,
        Recipe.mxfp8: is_mxfp8_available,
    }[recipe]
    available, reason = ask(return_reason=True)
    return None if available else f"{reason.rstrip('.')} (precision.recipe=auto takes what the GPU has)"


@cache
def _tried(recipe: Recipe, device: str) -> str | None:
    """What is wrong with small operands and products of each kind on this device; None where bytes and scales are those
    of the reference and products differ by rounding: what has not been proven must not train.
    """
    try:
        wrong = next(_differences(recipe, torch.device(device)), None)
        return wrong and f"{version()} gives other {wrong} on {device} than the reference does: use another recipe"
    except Exception as error:  # whatever it is would also end the first step
        return (
            f"{version()} fails on {device} ({_line(error)}): use another recipe, or another release of CUDA or cuDNN"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _differences(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """Of Transformer Engine from the reference: bytes and scales of operands, then results, experts without rows and
    rows without an expert among them.
    """
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16

    def operand(*shape: int) -> Tensor:
        """Rows of very different size."""
        sizes = torch.randn(*shape[:-1], 1, generator=generator).mul(2).exp()
        return (torch.randn(*shape, generator=generator) * sizes).to(device, dtype)

    least = recipe.multiple  # as few rows as an expert may have
    groups = Groups(torch.tensor([3 * least, 0, least, 5 * least], device=device))
    x, grad = operand(11 * least, 256), operand(11 * least, 384)
    weights: list[tuple[Tensor, Groups | None]] = [(operand(384, 256), None), (operand(4, 384, 256), groups)]
    engine, reference = TransformerEngine(recipe, dtype), EmulatedArithmetic(recipe, dtype)
    for quantizer in engine.quantizers.values():
        quantizer.optimize_for_gemm = False  # for scales in plain order
    for w, split in weights:
        for kind, tensor, among in (
            (Operand.activation, x, split),
            (Operand.gradient, grad, split),
            (Operand.weight, w, None),
        ):
            found = engine.quantise(tensor, kind, among, True, True)
            wanted = reference.quantise(tensor, kind, among, True, True)
            yield from _other_bytes(recipe, kind, found, wanted)
    for w, split in weights:
        ours = _results(Float8Gemm(TransformerEngine(recipe, dtype), dtype, "a trial"), x, w, grad, split)
        exact = _results(Float8Gemm(reference, dtype, "a trial"), x, w, grad, split)
        for name, result in ours.items():
            error = float((result.float() - exact[name].float()).norm() / exact[name].float().norm())
            if not error < _LARGEST_ERROR:
                yield f"{name} of {'a matrix' if split is None else 'experts'} (off by {error:.1e})"


def _other_bytes(recipe: Recipe, operand: Operand, found: QuantisedParts, wanted: Tiled) -> Iterator[str]:
    for columns, matrices in ((False, wanted.rows), (True, wanted.columns)):
        for part, rows in zip(found.parts, matrices, strict=True):
            data, scale = _kept(recipe, part, columns)
            if data is None:
                continue  # Blackwell multiplies the columns of a whole tensor without a copy of them
            inverse = rows.inverse_scale
            if recipe is Recipe.mxfp8:
                inverse = (inverse.view(torch.int32) >> 23).to(torch.uint8)
            scale = scale[: inverse.shape[0], : inverse.shape[1]]
            if not (torch.equal(data, rows.data.view(torch.uint8)) and torch.equal(scale, inverse)):
                yield f"bytes or scales for the {'columns' if columns else 'rows'} of the {operand.value}"


def _kept(recipe: Recipe, part: Any, columns: bool) -> tuple[Tensor | None, Tensor]:
    """Bytes and inverse scales in the order of `precision.fp8_tiles.QuantisedRows`, the scales with padding."""
    kept, side = part.get_metadata(), "columnwise" if columns else "rowwise"
    if recipe is Recipe.tensorwise:
        return kept["data_transpose" if columns else "data"], kept["fp8_scale_inv"].reshape(1, 1)
    data, scale = kept[f"{side}_data"], kept[f"{side}_scale_inv"]
    if recipe is Recipe.mxfp8:
        return (data.t(), scale.t()) if columns else (data, scale)
    return data, scale if kept["is_2D_scaled"] else scale.t()


def _results(products: Float8Gemm, x: Tensor, w: Tensor, grad: Tensor, groups: Groups | None) -> dict[str, Tensor]:
    """A product and its gradients, without rows that belong to no expert."""
    with torch.enable_grad():
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = products.linear(x, w) if groups is None else products.grouped_linear(x, w, groups)
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


def make(recipe: Recipe, compute_dtype: torch.dtype, where: str) -> GemmBackend:
    return Float8Gemm(TransformerEngine(recipe, compute_dtype), compute_dtype, where)
