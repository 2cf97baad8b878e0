"""Run the code of one rank on meta tensors, which have shapes but no values, in a world of any size.

Integers that decide shapes, such as the numbers of tokens that experts get, are computed: a meta tensor of integers
that follows from known ones alone has known values, kept on the host. A collective gives a rank what it would get if
all ranks of the group handed over the same integers. Whatever else the host would read raises `UnknownValueError`.

The process group may be torch's fake one, which sends nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from core.errors import LeviathanError
from model.attention import segments
from parallel.checks.recorder import handed, reduction

META = torch.device("meta")
_INTEGERS = (torch.bool, torch.int32, torch.int64)
_SPLITS = {"output_split_sizes": "output", "input_split_sizes": "input"}
"""Arguments of an all-to-all, and the tensors whose rows they divide."""
_MOST = 1 << 24
"""Elements of a tensor up to which its values are computed."""


class UnknownValueError(LeviathanError):
    """The host reads a value of the device that does not follow from known integers."""


class MetaDevice(TorchDispatchMode):
    """Runs operations on meta tensors, and collectives that send nothing. Knows the integers: see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.UntypedStorage, Any]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the same operation on its local tensors
        options = kwargs or {}
        if operation.namespace == "c10d":
            return self._collective(operation, args, options)
        if operation.namespace == "aten" and operation.is_view:
            return operation(*args, **options)  # a view shares the storage, whose values are known or not
        name = operation.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device == META:
            return self.read(args[0]).item()
        if name == "_to_copy" and args[0].device == META and _is_host(options.get("device")):
            return self.read(args[0]).to(options.get("dtype") or args[0].dtype)
        result = _grouped_mm(args, options) if name == "_grouped_mm" else operation(*args, **options)
        self._follow(operation, args, options, result)
        return result

    def read(self, x: Tensor) -> Tensor:
        """Return a copy of the values on the host. Raises `UnknownValueError` if they are not known."""
        with _disable_current_modes():
            if (found := self._on_host(x)) is None:
                what = f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]} of the device"
                raise UnknownValueError(f"the host reads {what}, whose values are not computed")
            return found.clone()

    def write(self, x: Tensor, values: Tensor) -> None:
        """Set the known values of a tensor."""
        with _disable_current_modes():
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = (
                    torch.UntypedStorage(storage.nbytes()),
                    weakref.ref(storage, lambda _: self._known.pop(key, None)),
                )
            into = self._on_host(x)
            assert into is not None
            into.copy_(values)

    def _on_host(self, x: Any) -> Any:
        """Return the values of a tensor, or None if they are unknown. Anything else is returned as it is."""
        if isinstance(x, torch.device):
            return torch.device("cpu") if x == META else x
        if not isinstance(x, Tensor) or x.device != META:
            return x
        if (known := self._known.get(x.untyped_storage()._cdata)) is None:
            return None
        return torch.empty(0, dtype=x.dtype).set_(known[0], x.storage_offset(), x.shape, x.stride())

    def _follow(self, operation: Any, args: Any, options: Any, result: Any) -> None:
        """Compute the values of an operation's results on the host if they are integers and follow from known ones."""
        given, made = _tensors((args, options)), _tensors(result)
        written = _written(operation, args, options)
        changed = [x for x in (*made, *written) if x.device == META]
        if not changed or all(x.dtype not in _INTEGERS for x in changed):
            return
        known = all(x.device != META or x.untyped_storage()._cdata in self._known for x in given)
        if not known or any(x.dtype not in _INTEGERS or x.numel() > _MOST for x in changed):
            for x in written:
                self._known.pop(x.untyped_storage()._cdata, None)
            return
        found = operation(*tree_map(self._on_host, args), **tree_map(self._on_host, options))
        old = {x.untyped_storage()._cdata for x in given}
        for x, values in zip(made, _tensors(found), strict=True):
            if x.device == META and x.untyped_storage()._cdata not in old:
                self.write(x, values)

    def _collective(self, operation: Any, args: Any, options: Any) -> Any:
        """Issue a collective of empty tensors on the group, and set the integers that it would bring."""
        named = {a.name: value for a, value in zip(operation._schema.arguments, args, strict=False)} | options
        if all(x.device != META for x in _tensors(list(named.values()))):
            return operation(*args, **options)
        name = operation.overloadpacket.__name__.strip("_")
        _check_splits(named)
        result = operation(**{key: _stand_in(key, value) for key, value in named.items()})
        for x, values in self._brought(name, named, ProcessGroup.unbox(named["process_group"])):
            if values is None:
                self._known.pop(x.untyped_storage()._cdata, None)
            else:
                self.write(x, values.view(x.shape))
        return result

    def _brought(self, name: str, named: dict[str, Any], group: ProcessGroup) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what a collective writes, with its values, if all ranks hand over the same integers."""
        given, written = handed(name, named)
        source = self._on_host(given[0]) if len(given) == len(written) == 1 else None
        splits = {size for key in _SPLITS for size in named.get(key, ())}
        if source is not None and name == "allreduce" and reduction(named) in ("sum", "max", "min"):
            yield written[0], source * group.size() if reduction(named) == "sum" else source
        elif source is not None and name == "allgather_base":
            yield written[0], source.flatten().repeat(group.size())
        elif source is not None and name == "alltoall_base" and len(splits) <= 1:
            yield written[0], source.flatten().chunk(group.size())[group.rank()].repeat(group.size())
        elif name.startswith("recv") and all(x.numel() == 1 and x.dtype is torch.int32 for x in written):
            # torch's pipelines vote once on whether all stages were given their shapes, as ours are
            yield from ((x, torch.ones(1, dtype=torch.int32)) for x in written)
        else:
            yield from ((x, None) for x in written)


class _PythonIntegers(TorchFunctionMode):
    """Keeps the integers of tensors that are made of Python's values, of which PyTorch shows no operator."""

    def __init__(self, device: MetaDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and result.device == META and result.dtype in _INTEGERS:
            data = [*args, (kwargs or {}).get("data")][0]
            if not isinstance(data, Tensor):
                self.device.write(result, torch.tensor(data, dtype=result.dtype))
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _stand_in(name: str, value: Any) -> Any:
    """Return an argument of a collective with empty tensors on the host, and without the sizes of their parts."""
    if name in _SPLITS:
        return []
    return tree_map(lambda x: torch.empty(0, dtype=x.dtype) if isinstance(x, Tensor) else x, value)


def _check_splits(named: dict[str, Any]) -> None:
    """Raise the error of NCCL's process group for parts that do not make up a tensor."""
    for key, tensor in _SPLITS.items():
        if (sizes := named.get(key)) and sum(sizes) != len(named[tensor]):
            raise RuntimeError(f"{key} add up to {sum(sizes)} rows, but the {tensor} has {len(named[tensor])}")


def _grouped_mm(args: Any, options: Any) -> Tensor:
    """Return the result of a grouped matmul. Its kernels take float32 too, and its shape function does not."""
    x, w, dtype = args[0], args[1], args[0].dtype
    if dtype is torch.bfloat16 or x.device != META:
        return torch.ops.aten._grouped_mm.default(*args, **options)
    narrow = (one.to(torch.bfloat16) for one in (x, w))
    return torch.empty_like(torch.ops.aten._grouped_mm.default(*narrow, *args[2:], **options), dtype=dtype)


def _attention(kind: str, honest: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call the kernel of `F.scaled_dot_product_attention` that a device of this kind would. On meta tensors torch would
    compute and keep all scores.
    """
    mask, causal, grouped = options.get("attn_mask"), options.get("is_causal", False), options.get("enable_gqa", False)
    if kind == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    elif mask is None and q.dtype in (torch.bfloat16, torch.float16):
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    elif not grouped:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, q.requires_grad, 0.0, causal)
    else:
        return honest(q, k, v, **options)
    return found[0]


def _is_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _written(operation: Any, args: Any, options: Any) -> list[Tensor]:
    """Return the tensors that an operation writes, besides new ones."""
    arguments = operation._schema.arguments
    values = [*zip(arguments, args, strict=False), *((a, options[a.name]) for a in arguments if a.name in options)]
    return [x for a, value in values if a.alias_info is not None and a.alias_info.is_write for x in _tensors(value)]


class _Streams:
    """Stands in for `torch.cuda` of the meta device, where FSDP2 takes streams and events: those of `torch.cpu`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0


@contextmanager
def meta_device(kind: str = "cuda") -> Iterator[MetaDevice]:
    """Let FSDP2, attention and the fused AdamW run on meta tensors until the end of the block, with the kernels of a
    device of this kind.
    """
    backend: Any = ProcessGroup._get_backend
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagated(propagator: Any, schema: Any) -> Any:
        with _disable_current_modes():  # DTensor finds shapes on fake tensors of the whole size, which nobody allocates
            return propagate(propagator, schema)

    with (
        patch.object(torch, "meta", _Streams(), create=True),
        patch.object(ProcessGroup, "_get_backend", lambda group, device: backend(group, torch.device("cpu"))),
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated),
        patch.object(segments, "device_kind", lambda x: kind),
        patch.object(F, "scaled_dot_product_attention", partial(_attention, kind, F.scaled_dot_product_attention)),
        patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        fused_adamw_on_meta(),
        MetaDevice() as device,
        _PythonIntegers(device),
    ):
        yield device


@contextmanager
def fused_adamw_on_meta() -> Iterator[None]:
    """Let the fused AdamW, whose kernel has no shape function, run on meta tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_adamw_", lambda *given, **named: None, "Meta")
    try:
        with patch("torch.optim.adam._device_dtype_check_for_fused", lambda *given, **named: None):
            yield
    finally:
        library._destroy()
