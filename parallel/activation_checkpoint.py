"""Recompute activations in the backward pass instead of keeping them (Chen et al. 2016).

`full` checkpoints whole layers. `selective` keeps what is dear, the results of matmuls, attention and exchanges, and
recomputes what follows from them by memory-bound steps: norms, the rows of experts, SwiGLU, gathered sequences, and
the first product of a shared expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from model.layers import GatedMLP
from model.moe import LocalDispatcher, MixtureOfExperts
from model.transformer import Layer
from model.vision.towers import Network
from parallel.layout import Recompute
from parallel.tensor_parallel import Gathered


def apply(model: Network, mode: Recompute, compiled: bool = False) -> None:
    """Recompute activations of a model's layers. Names of modules and parameters do not change.

    Layers of the vision encoder are recomputed whole in both modes. Keeping their matmuls and attention would keep most
    of their activations. In `compiled` layers, `selective` applies to the routed experts only: in the rest the compiler
    chooses by a minimal cut of its graph.
    """
    if mode is Recompute.none:
        return
    whole = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if model.vision is not None:
        for encoder_layer in model.vision.layers.values():
            encoder_layer.forward = partial(whole, encoder_layer.forward)
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        if mode is Recompute.full:
            layer.forward = partial(whole, layer.forward)  # type: ignore[method-assign]
        else:
            _select_experts(layer) if compiled else _select(layer)


def _select_experts(layer: Layer) -> None:
    """Mark what is recomputed of the routed experts of a layer."""
    remade, ffn = Remade(), layer.ffn
    if isinstance(ffn, MixtureOfExperts):
        _experts_again(remade, ffn)
        ffn.forward = partial(remade.run, ffn.forward)  # type: ignore[method-assign]


def _experts_again(remade: Remade, ffn: MixtureOfExperts) -> None:
    _swiglu_again(remade, ffn.experts)
    if isinstance(ffn.dispatch, LocalDispatcher):
        remade.wrap(ffn.dispatch.kernels, "permute")


def _select(layer: Layer) -> None:
    """Mark what a layer recomputes in its backward pass."""
    remade, ffn = Remade(), layer.ffn
    for norm in (layer.attention_norm, layer.ffn_norm):
        remade.wrap(norm, "forward", norm)
    parts: list[Any] = [layer.attention]
    if isinstance(ffn, MixtureOfExperts):
        parts += [] if ffn.shared is None else [ffn.shared]
        _experts_again(remade, ffn)
    else:
        parts.append(ffn)
    for part in parts:
        for compute in (part.forward, getattr(part, "first_half", None)):
            if isinstance(compute, Gathered):
                remade.wrap(compute, "gather")
        if isinstance(part, GatedMLP):
            _swiglu_again(remade, part)
    layer.forward = partial(remade.run, layer.forward)  # type: ignore[method-assign]


def _swiglu_again(remade: Remade, module: Any) -> None:
    if isinstance(module, GatedMLP) and module.kernels.joins:
        remade.wrap(module, "gate_and_up")
    for name in ("swiglu", "swiglu_halves"):
        remade.wrap(module.kernels, name)


class Remade:
    """Tensors that autograd does not keep: they are recomputed from kept tensors, bit by bit.

    A tensor is recomputed once for all operations that saved it, and freed after the last of them.
    """

    def __init__(self) -> None:
        self._makers: dict[int, tuple[StorageWeakRef, _Maker]] = {}

    def wrap(self, owner: Any, name: str, again: Callable[..., Tensor] | None = None) -> None:
        """Recompute the results of a method with `again`: by default with the method itself."""
        compute = getattr(owner, name)
        setattr(owner, name, partial(self._computed, compute, again or compute))

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run a layer's forward pass."""
        if not torch.is_grad_enabled():
            return forward(*args)
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return forward(*args)
        finally:
            self._makers.clear()

    def _computed(self, compute: Callable[..., Tensor], again: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        if torch.is_grad_enabled():
            # arguments may be recomputed tensors themselves
            kept = [self._pack(arg) if isinstance(arg, Tensor) else arg for arg in args]
            reference = StorageWeakRef(result.untyped_storage())  # keeps the key from being used again
            self._makers[reference.cdata] = reference, _Maker(partial(again, **kwargs), kept, result.dtype)
        return result

    def _pack(self, x: Tensor) -> Any:
        found = self._makers.get(x.untyped_storage()._cdata)
        if found is None or x.dtype is not found[1].dtype:
            return x.detach() if x.requires_grad and not x.is_leaf else x
        maker = found[1]
        maker.wanted += 1
        return _View(maker, x.shape, x.stride(), int(x.storage_offset()))


@dataclass
class _Maker:
    """Recomputes a tensor from kept arguments. `wanted`: how many saved views of it were not read yet."""

    compute: Callable[..., Tensor]
    args: list[Any]
    dtype: torch.dtype
    wanted: int = 0
    made: Tensor | None = None

    def take(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.compute(*(_unpack(arg) for arg in self.args))
        made, self.wanted = self.made, self.wanted - 1
        if self.wanted <= 0:
            self.made = None
        return made


@dataclass(frozen=True)
class _View:
    maker: _Maker
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(kept: Any) -> Any:
    return kept.maker.take().as_strided(kept.shape, kept.stride, kept.offset) if isinstance(kept, _View) else kept
