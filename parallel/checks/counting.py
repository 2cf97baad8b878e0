"""Count what a GPU would have to do, without one: launches, host synchronisations and bytes, on meta tensors.

`Counter` sees every operator below autograd. An operator that only makes a view or allocates memory launches nothing;
those in `_LAUNCHES` launch several kernels on a GPU; any other counts as one launch.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.checks.memory import Memory

_ALLOCATIONS = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "_reshape_alias", "set_", "_local_scalar_dense",
}  # fmt: skip
_LAUNCHES = {
    "sort": 11, "cumsum": 2, "rms_norm": 2, "rms_norm_backward": 5, "topk": 2, "dot": 2, "_grouped_mm": 2,
    "_varlen_attn": 2, "_varlen_attn_backward": 5,
}  # fmt: skip
"""Kernels of operators that launch more than one, from torch 2.13's sources for CUDA (read, not measured): a stable
radix sort of int64 keys with their values, eight passes and three preparations; a scan and its initialisation; a norm
and the cast of its gain; the gradients of its input and, in two steps, of its gain, with a cast before and one after; a
grouped matmul and the preparation of its pointers; flash attention and its random state; its backward pass with a
preparation, the conversion of dq, and the sums of dk and dv over the query heads of a group.
"""
_MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_FUSED_DEPTH = {"_fused_adamw_": 4, "_foreach_norm": 1}
"""Tensors that one element of a kernel over lists reads or writes; of others, the number of lists."""
_CHUNK, _CHUNKS, _TENSORS = 1 << 16, 320, (110, 64, 48, 36, 30)
"""Elements of a chunk; chunks and, by depth, tensors of a launch: torch's MultiTensorApply.cuh."""
_SYNCHRONISES = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "unique_dim", "equal"}


def _ones_on_host(x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=x.dtype)


class Counter(TorchDispatchMode):
    """Counts the operators that run under it: `launches` and `syncs` of each operator. `moved` [operator]: bytes
    of the operands and results of operators that launch kernels. `memory`: the tensors that were made and are still
    alive.

    A copy from meta tensors to the host gets the values that `values` returns: by default ones.
    """

    def __init__(self, values: Callable[[Tensor], Tensor] | None = None, memory: Memory | None = None) -> None:
        super().__init__()
        self.values = values or _ones_on_host
        self.launches: Counts[str] = Counts()
        self.syncs: Counts[str] = Counts()
        self.moved: Counts[str] = Counts()
        self.memory = memory or Memory()
        self._pinned: list[Tensor] = []
        self._patches = ExitStack()

    def __enter__(self) -> Counter:
        self._patches.enter_context(patch("core.memory.pinned", self._pin))
        self._patches.enter_context(_PythonValues(self.syncs))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        self._pinned.clear()

    def _pin(self, x: Tensor, device: torch.device) -> Tensor:
        self._pinned.append(x.clone())
        return self._pinned[-1]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the same operation on its local tensors
        kwargs = kwargs or {}
        name = operation._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and args[0].device.type == "meta":
            self.syncs[name] += 1
            return self.values(args[0]).item()
        if name == "_to_copy" and args[0].device.type == "meta" and _to_host(kwargs.get("device")):
            self.syncs[name] += 1
            return self.values(args[0])
        result = operation(*args, **kwargs)
        on_host = _on_host(args, result)
        if (name in _SYNCHRONISES and not on_host) or self._waits_for_copy(name, args, kwargs):
            self.syncs[name] += 1
        if not on_host and not _is_view(operation) and name not in _ALLOCATIONS:
            self.launches[name] += _launches(name, args)
            self.moved[name] += sum(tensor.nbytes for tensor in _tensors((args, kwargs, result)))
        self.memory.note(_tensors(result), _tensors((args, kwargs)))
        return result

    @property
    def live(self) -> int:
        return self.memory.live

    @property
    def peak(self) -> int:
        return self.memory.peak

    def forget(self, tensor: Tensor) -> None:
        """Count the memory of a tensor no longer."""
        self.memory.forget(tensor)

    def _waits_for_copy(self, name: str, args: Any, kwargs: Any) -> bool:
        """Return whether the host waits for a copy: one from the device, a blocking upload, or an upload from pageable
        memory. Indices on the host are such copies. The number of places that a mask selects is copied from the
        device, unless a single value is written to them.
        """
        given = [tensor.device.type for tensor in _tensors(args)]
        if name in ("index", "index_put", "index_put_"):
            indices = _tensors(args[1])
            selects = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
            counts = selects and (name == "index" or args[2].numel() != 1)
            return args[0].device.type == "meta" and (counts or "cpu" in [x.device.type for x in indices])
        if name == "copy_":
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            uploads = given == ["meta", "cpu"] and args[1].dim() > 0
            return given == ["cpu", "meta"] or (uploads and (waits or not self._is_pinned(args[1])))
        target = kwargs.get("device")
        uploads = name == "_to_copy" and given == ["cpu"] and target is not None and torch.device(target).type == "meta"
        return uploads and not (kwargs.get("non_blocking", False) and self._is_pinned(args[0]))

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == one.untyped_storage()._cdata for one in self._pinned)


class _PythonValues(TorchFunctionMode):
    """Counts the copies of Python's values to the device, of which PyTorch shows no operator."""

    def __init__(self, syncs: Counts[str]) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _MAKERS and result.device.type == "meta":
            data = [*args[function is Tensor.new_tensor :], (kwargs or {}).get("data")][0]
            self.syncs.update([] if isinstance(data, Tensor) else ["tensor"])
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == "meta":
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            self.syncs.update(["index by a list"] if any(isinstance(one, list) for one in index) else [])
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, Tensor)]


def _on_host(args: Any, result: Any) -> bool:
    """Return whether only tensors of the host take part. The device's are on meta."""
    return all(tensor.device.type != "meta" for tensor in (*_tensors(args), *_tensors(result)))


def _to_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _launches(name: str, args: Any) -> int:
    """Return the kernels of an operator. One over lists of tensors takes some tensors, and some chunks, at a time."""
    if not name.startswith(("_foreach_", "_fused_")):
        return _LAUNCHES.get(name, 1)
    lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
    tensors = lists[0]
    if any(isinstance(x, Tensor) and x.dtype is not tensors[0].dtype for x in args):  # torch then takes them one by one
        return len(tensors)
    most = _TENSORS[_FUSED_DEPTH.get(name, len(lists)) - 1]
    chunks = sum(-(-x.numel() // _CHUNK) for x in tensors)
    return max(-(-len(tensors) // most), -(-chunks // _CHUNKS)) + (name == "_foreach_norm")  # and its last sum


def _is_view(operation: Any) -> bool:
    returns = operation._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
