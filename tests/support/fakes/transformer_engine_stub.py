"""Transformer Engine on the CPU: its own Python over a stub of its compiled extension.

The recipes, quantizers, storages, `general_gemm` and `general_grouped_gemm` come from the wheel. The stub computes with
`precision.fp8_tiles`, records its calls, and rejects what the compiled extension rejects (according to the C++ sources
of 2.20.2). Values that must not be read are NaN: padding of scales, and rows beyond the experts' counts. The stub
cannot show that the compiled extension and cuBLAS compute the same.

The wheel (1.2 MB, pure Python) is downloaded once from the package registry and unpacked in pytest's cache. It is not
installed, because the tests of "not installed" would change, and because it cannot be imported without its libraries.

Shapes: R rows, K contracted elements.
"""

from __future__ import annotations

import ast
import enum
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import precision.transformer_engine as backend
from precision.config import Recipe
from precision.fp8_emulated import EmulatedArithmetic
from precision.fp8_tiles import E4M3, E5M2, WHOLE, QuantisedRows, Tiling, quantise

KEPT = Path(__file__).resolve().parents[3] / ".pytest_cache" / f"transformer-engine-{backend.VERSION}"


def sources() -> Path:
    """Return the folder with the package `transformer_engine`. Download it once; fail the test if that fails."""
    if not KEPT.exists():
        KEPT.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT.parent) as scratch:
            _fetch(Path(scratch))
            (Path(scratch) / "unpacked").rename(KEPT)
    return KEPT


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder]
    done = subprocess.run([*command, f"transformer-engine=={backend.VERSION}"], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"these tests need Transformer Engine from the package registry: {done.stderr[-500:]}")
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "unpacked", "zip")


@cache
def tree(module: str) -> ast.Module:
    path = sources().joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


class DType(enum.Enum):
    kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 0, 2, 4, 5, 6, 7, 8, 10

    def __int__(self) -> int:
        return int(self.value)


GEMMS = [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
GRADS = [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("INPUT", "OUTPUT")]
FORMATS = {7: E4M3, 8: E5M2}
PLAIN = {4: torch.float32, 6: torch.bfloat16}


@dataclass(frozen=True)
class Quantised:
    """A recorded call that quantised an operand. `splits`: rows of each expert; None without experts."""

    quantizer: str
    shape: tuple[int, ...]
    format: torch.dtype
    rowwise: bool
    columnwise: bool
    block_scaling_dim: int | None
    internal: bool
    optimize_for_gemm: bool
    splits: Any = None


@dataclass(frozen=True)
class Product:
    layout: str
    grad: bool
    use_split_accumulator: bool
    m_splits: Any = None
    single_output: bool | None = None


@dataclass
class Extension:
    """Replaces `transformer_engine_torch`. `transposes`: store the columns of one-scale tensors, as on Hopper."""

    transposes: bool = True
    calls: list[Any] = field(default_factory=list)
    sabotage: Any = None
    """A function that changes the result of each matmul, or None."""

    def quantised(self) -> list[Quantised]:
        return [call for call in self.calls if isinstance(call, Quantised)]

    def products(self) -> list[Product]:
        return [call for call in self.calls if isinstance(call, Product)]

    def quantize(self, tensor: Tensor, quantizer: Any, output: Any = None, noop_flag: Any = None) -> Any:
        assert output is None and noop_flag is None
        self._note(tensor, quantizer, None)
        return self._storage(tensor, quantizer, quantizer.storage_metadata(tensor.dtype)["nontensor_kwargs"])

    def split_quantize(
        self, tensor: Tensor, sections: list[int], quantizers: list[Any], disable_bulk_allocation: bool = False
    ) -> list[Any]:
        assert type(sections) is list and all(type(count) is int for count in sections)
        assert len(sections) == len(quantizers) and sum(sections) <= len(tensor)
        self._note(tensor, quantizers[0], sections)
        parts = zip(tensor[: sum(sections)].split(sections), quantizers, strict=True)
        return [self._storage(x, one, one.storage_metadata(torch.float32)["nontensor_kwargs"]) for x, one in parts]

    def _note(self, x: Tensor, quantizer: Any, splits: Any) -> None:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype is torch.bfloat16
        kind, dim = type(quantizer).__name__, getattr(quantizer, "block_scaling_dim", None)
        usage = quantizer.rowwise_usage, quantizer.columnwise_usage
        flags = quantizer.internal, quantizer.optimize_for_gemm
        self.calls.append(Quantised(kind, tuple(x.shape), FORMATS[int(quantizer.dtype)], *usage, dim, *flags, splits))

    def _storage(self, x: Tensor, quantizer: Any, options: dict[str, Any]) -> Any:
        """Quantise into tensors of TE's shapes. Elements that are not written are NaN."""
        whole, square = "CurrentScaling" in type(quantizer).__name__, getattr(quantizer, "block_scaling_dim", 1) == 2
        assert quantizer.internal and (quantizer.rowwise_usage or quantizer.columnwise_usage)
        assert quantizer.rowwise_usage or not (whole or square), "columns alone: the kernel also writes rows"
        tensors = {
            name: torch.full(shape, 255 if dtype is torch.uint8 else torch.nan, dtype=dtype)
            for name, (shape, dtype) in quantizer.inner_tensor_specs(x.shape).items()
        }
        for columns in (False, True):
            data_name, scale_name = _names(quantizer, columns)
            if data_name not in tensors:
                continue
            rows = quantise(x.mT if columns else x, _tiling(quantizer))
            is_turned = columns and "MXFP8" in type(quantizer).__name__
            data = rows.data.view(torch.uint8)
            tensors[data_name].copy_(data.mT if is_turned else data)
            _put(tensors[scale_name], rows.inverse_scale, quantizer, columns)
        cls = quantizer.storage_metadata(x.dtype)["cls"]
        names = {kwarg: tensors.get(attribute) for attribute, kwarg in cls._INNER_TENSORS}
        return cls(**names, **options)

    def generic_gemm(self, *args: Any, **options: Any) -> tuple[Tensor, None, None, None]:
        a, transa, b, transb, out, quantizer, dtype, bias, _, gelu, _, grad, _, _, accumulate, split = args
        assert out is None and quantizer is None and bias is None and not gelu and not accumulate
        assert options["comm_overlap"] is None and options["alpha"] == 1.0 and options["beta"] == 0.0
        self.calls.append(Product(_layout(transa, transb), grad, split))
        return self._multiply(a, transa, b, transb, PLAIN[int(dtype)]), None, None, None

    def te_general_grouped_gemm(self, *args: Any) -> Any:
        a, transa, b, transb, out, dtype, m_splits, bias, *_, accumulate, split, _ = args
        single, grad = args[9], args[11]
        assert type(m_splits) is list and all(type(count) is int for count in m_splits) and not accumulate
        assert len(a) == len(b) == len(m_splits) and len(out) == (1 if single else len(a))
        self.calls.append(Product(_layout(transa, transb), grad, split, m_splits, single))
        results = [self._multiply(x, transa, y, transb, PLAIN[int(dtype)]) for x, y in zip(a, b, strict=True)]
        if single:
            whole = torch.cat(results)
            assert [len(part) for part in results] == m_splits and whole.shape[1:] == out[0].shape[1:]
            out[0].fill_(torch.nan)[: len(whole)].copy_(whole)
            return bias
        for place, result in zip(out, results, strict=True):
            assert place.shape == result.shape and place.is_contiguous()
            place.copy_(result)
        return bias

    def _multiply(self, a: Any, transa: bool, b: Any, transb: bool, dtype: torch.dtype) -> Tensor:
        left, right = _rows(b, transb), _rows(a, not transa)
        (count, length), other = left.data.shape, right.data.shape[0]
        assert length == right.data.shape[1], "contracted dimensions differ"
        assert length % 16 == 0 and other % 16 == 0 and (transb or count % 8 == 0), "no kernel for these dimensions"
        assert left.tiling.rows != 128 or right.tiling.rows != 128 or left.tiling.columns == WHOLE, "both are 2D"
        if not (count and length and other):
            return torch.zeros(count, other, dtype=dtype)
        y = EmulatedArithmetic(Recipe.blockwise, dtype).multiply(left, right)
        return y if self.sabotage is None else self.sabotage(y)


def _tiling(quantizer: Any) -> Tiling:
    name, form = type(quantizer).__name__, FORMATS[int(quantizer.dtype)]
    if "Block" in name:
        assert quantizer.amax_epsilon == 0
        return Tiling({1: 1, 2: 128}[quantizer.block_scaling_dim], 128, form, quantizer.force_pow_2_scales)
    if "MXFP8" in name:
        assert not quantizer.with_2d_quantization
        return Tiling(1, 32, form, exponents=True)
    assert not quantizer.force_pow_2_scales and not quantizer.with_amax_reduction
    return Tiling(WHOLE, WHOLE, form)


def _names(quantizer: Any, columns: bool) -> tuple[str, str]:
    if "CurrentScaling" in type(quantizer).__name__:
        return "_transpose" if columns else "_data", "_scale_inv"
    side = "_columnwise" if columns else "_rowwise"
    return f"{side}_data", f"{side}_scale_inv"


def _put(place: Tensor, inverse: Tensor, quantizer: Any, columns: bool) -> None:
    name = type(quantizer).__name__
    if "CurrentScaling" in name:
        place.copy_(inverse.reshape(-1)[:1]) if inverse.numel() else None
        return
    if "MXFP8" in name:
        inverse = inverse.view(torch.int32) >> 23
    is_turned = columns if "MXFP8" in name else quantizer.block_scaling_dim == 1
    inverse = inverse.mT if is_turned else inverse
    place[: inverse.shape[0], : inverse.shape[1]] = inverse
    if "MXFP8" in name and quantizer.optimize_for_gemm:
        place.copy_(place.flip(0))  # stands for the swizzled order


def _rows(storage: Any, columns: bool) -> QuantisedRows:
    """Return the rows or columns of an operand that a matmul reads. Raise if they are missing."""
    name, form = type(storage).__name__, FORMATS[int(storage._fp8_dtype)]
    if name == "Float8TensorStorage":
        has_columns = storage._transpose is not None and not storage._transpose_invalid
        data = storage._transpose if columns and has_columns else storage._data
        assert data is not None and (has_columns or not columns or not backend_transposes()), "no such data"
        data = data.mT.contiguous() if columns and not has_columns else data
        return QuantisedRows(data.view(form), storage._scale_inv.reshape(1, 1), Tiling(WHOLE, WHOLE, form))
    data = storage._columnwise_data if columns else storage._rowwise_data
    scale = storage._columnwise_scale_inv if columns else storage._rowwise_scale_inv
    assert data is not None and scale is not None, "no such data"
    if name == "MXFP8TensorStorage":
        scale = scale.flip(0) if storage._with_gemm_swizzled_scales else scale
        data, scale = (data.mT, scale.mT) if columns else (data, scale)
        how = Tiling(1, 32, form, exponents=True)
        scale = torch.where(scale > 0, scale.int() << 23, 0x400000).to(torch.int32).view(torch.float32)
    else:
        how = Tiling(128 if storage._is_2D_scaled else 1, 128, form, powers_of_two=True)
        scale = scale if storage._is_2D_scaled else scale.mT
    tall, wide = -(-data.shape[0] // how.rows), -(-data.shape[1] // how.columns)
    return QuantisedRows(data.contiguous().view(form), scale[:tall, :wide], how)


def backend_transposes() -> bool:
    return bool(sys.modules["transformer_engine_torch"].extension.transposes)


def _layout(transa: bool, transb: bool) -> str:
    return ("T" if transa else "N") + ("T" if transb else "N")


def _compiled(extension: Extension) -> ModuleType:
    """Return the module `transformer_engine_torch`. Names that it lacks exist but cannot be called."""

    class Module(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": None})

    module: Any = Module("transformer_engine_torch")
    module.DType, module.extension = DType, extension
    module.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", GEMMS, start=0)
    module.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", GRADS, start=0)
    for name in ("quantize", "split_quantize", "generic_gemm", "te_general_grouped_gemm"):
        setattr(module, name, lambda *args, name=name, **options: getattr(module.extension, name)(*args, **options))
    return module


def _package(name: str, **members: Any) -> ModuleType:
    """Return a package with the wheel's modules but not its `__init__`, which would load missing libraries."""
    module = ModuleType(name)
    module.__path__ = [str(sources().joinpath(*name.split(".")))]
    vars(module).update(members)
    return module


def _constants(module: str, prefix: str) -> dict[str, Any]:
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree(module).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.startswith(prefix)
    }


_loaded: dict[str, ModuleType] = {}


def _load() -> None:
    """Import the wheel's modules once. Only `installed` puts them into `sys.modules`."""
    before, te = set(sys.modules), "transformer_engine.pytorch"
    base = _package(f"{te}.module.base", **_constants(f"{te}.module.base", "_2X_ACC"))
    stubs = {
        "transformer_engine": _package("transformer_engine"),
        "transformer_engine.common": _package("transformer_engine.common", decode_cudnn_version=None),
        te: _package(te),
        f"{te}.export": _package(f"{te}.export", is_in_onnx_export_mode=lambda: False, assert_warmed_up=None),
        f"{te}.cpp_extensions": _package(f"{te}.cpp_extensions"),
        f"{te}.module": _package(f"{te}.module", base=base),
        f"{te}.module.base": base,
        "transformer_engine_torch": _compiled(Extension()),
    }
    sys.modules.update(stubs)
    try:
        names = ("tensor", "quantization", "cpp_extensions.gemm", "tensor.storage.float8_tensor_storage", "utils")
        _, quantization, gemm, storage, _ = (importlib.import_module(f"{te}.{name}") for name in names)
        for name in ("general_gemm", "general_grouped_gemm"):
            setattr(stubs[f"{te}.cpp_extensions"], name, getattr(gemm, name))
        for name in ("fp8", "mxfp8", "fp8_block_scaling"):
            setattr(quantization, f"_{name.upper()}_SUPPORT", (True, ""))
            setattr(stubs[te], f"is_{name}_available", getattr(quantization, f"is_{name}_available"))
        gemm.get_sm_count, gemm._empty_tensor = lambda: 1, lambda: torch.empty(0)
        gemm.get_cublas_workspace = lambda device, ub, grouped: [torch.empty(1)] if grouped else torch.empty(1)
        for module in (storage, importlib.import_module(f"{te}.tensor.float8_tensor")):
            module.is_non_tn_fp8_gemm_supported = lambda: not backend_transposes()
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("transformer_engine"):
                _loaded[name] = sys.modules.pop(name)


@contextmanager
def installed(**options: Any) -> Iterator[Extension]:
    """Make Transformer Engine importable and available to the backend."""
    if not _loaded:
        _load()
    extension, asked = Extension(**options), backend.unavailable
    _loaded["transformer_engine_torch"].extension = extension
    kept = {name: module for name, module in sys.modules.items() if name.startswith("transformer_engine")}
    sys.modules.update(_loaded)
    backend.unavailable = lambda recipe, device: []
    try:
        yield extension
    finally:
        backend.unavailable = asked
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update(kept)
