"""Where every parameter lies: the one registry that initialisation, norms, checkpoints and byte counts ask.

A rank's part of a parameter is always one block of the whole tensor: tensor or expert parallelism cuts it first (the
model then holds a plain tensor of the smaller shape and never learns that there is more), FSDP2 cuts what is left.

Every rank has tokens of its own, so the gradient of a part is the sum over all ranks that hold it. FSDP2 sums over its
mesh; `sum_copies` sums over the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.init import initial_slice
from model.roles import ParameterInfo, Role
from model.tensor_source import TensorSource
from parallel.layout import EngineKind
from parallel.mesh import MeshAxis, Meshes

_TENSOR_DIM = {
    Role.embedding: 0,
    Role.head: 0,
    Role.query: 0,
    Role.key: 0,
    Role.value: 0,
    Role.attention_output: 1,
    Role.dense_gate: 0,
    Role.dense_up: 0,
    Role.dense_down: 1,
    Role.shared_gate: 0,
    Role.shared_up: 0,
    Role.shared_down: 1,
}
"""The dimension that tensor parallelism cuts, by role; what is not here every rank of tp has whole."""
_EXPERT_WIDTH_DIM = 2  # gate_up [E, 2, F, D] and down [E, D, F]


@dataclass(frozen=True)
class Split:
    """`dim` is cut into `axis.size` parts of equal size, the last ones shorter where it does not divide."""

    axis: MeshAxis
    dim: int


@dataclass(frozen=True)
class ShardBlock:
    """Where a part begins in the whole tensor, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def cut(self, split: Split) -> ShardBlock:
        size = self.shape[split.dim]
        part = -(-size // split.axis.size)
        start = min(split.axis.rank * part, size)
        offset, shape = list(self.offset), list(self.shape)
        offset[split.dim] += start
        shape[split.dim] = min(part, size - start)
        return ShardBlock(tuple(offset), tuple(shape))


@dataclass(frozen=True)
class ShardSpec:
    """One parameter's place.

    `splits` make the plain tensor that the model computes with, `storage` (FSDP2's cut of it) what this rank keeps.
    Ranks along `copies` keep the same; along `partial` they also have gradients still to be summed.
    """

    info: ParameterInfo
    splits: tuple[Split, ...]
    storage: Split
    copies: tuple[MeshAxis, ...]
    partial: tuple[MeshAxis, ...] = ()

    @property
    def computed(self) -> ShardBlock:
        return _cut(self.info, self.splits)

    @property
    def stored(self) -> ShardBlock:
        return self.computed.cut(self.storage)

    @property
    def is_owner(self) -> bool:
        """Whether this rank is the one, among those that keep the same part, to count or write it."""
        return all(axis.rank == 0 for axis in self.copies)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one for what belongs to the parameter as a whole."""
        return self.is_owner and not any(self.stored.offset)


@dataclass(frozen=True)
class LocalShard:
    """A block of a parameter, or of its gradient, that this rank keeps, and its values."""

    spec: ShardSpec
    block: ShardBlock
    values: Tensor


def shard_specs(infos: Mapping[str, ParameterInfo], model: ModelConfig, meshes: Meshes) -> dict[str, ShardSpec]:
    """The place of every parameter of the whole model, by name."""
    specs = {name: _spec(info, model, meshes) for name, info in infos.items()}
    if meshes.layout.engine is EngineKind.deepspeed:  # whole on every data-parallel rank
        whole = Split(MeshAxis("whole"), 0)
        return {name: replace(spec, storage=whole) for name, spec in specs.items()}
    return specs


def _spec(info: ParameterInfo, model: ModelConfig, meshes: Meshes) -> ShardSpec:
    if info.role.is_expert:
        splits = tuple(s for s in (Split(meshes.ep, 0), Split(meshes.etp, _EXPERT_WIDTH_DIM)) if s.axis.size > 1)
        storage = Split(meshes.efsdp, _storage_dim(_cut(info, splits), meshes.efsdp))
        return ShardSpec(info, splits, storage, (meshes.replicate,))
    if info.role is Role.embedding and model.tie_embeddings and meshes.ends.size > 1:
        alone = _dense_spec(info, model, meshes)
        return replace(alone, copies=(*alone.copies, meshes.ends), partial=(*alone.partial, meshes.ends))
    return _dense_spec(info, model, meshes)


def _dense_spec(info: ParameterInfo, model: ModelConfig, meshes: Meshes) -> ShardSpec:
    dim = _TENSOR_DIM.get(info.role)
    if info.role is Role.qk_norm and info.shape[0] != model.head_dim:
        dim = 0  # the gain spans all heads
    if dim is None or meshes.tp.size == 1:
        copies = (meshes.replicate, meshes.tp)
        return ShardSpec(info, (), Split(meshes.fsdp, 0), copies, partial=(meshes.tp,) if meshes.tp.size > 1 else ())
    return ShardSpec(info, (Split(meshes.tp, dim),), Split(meshes.fsdp, 0), (meshes.replicate,))


def _cut(info: ParameterInfo, splits: tuple[Split, ...]) -> ShardBlock:
    block = ShardBlock((0,) * len(info.shape), tuple(info.shape))
    for split in splits:
        block = block.cut(split)
    return block


def _storage_dim(block: ShardBlock, axis: MeshAxis) -> int:
    """The first dimension that divides: with fewer experts than ranks, cutting them would leave ranks with nothing."""
    return next((dim for dim, size in enumerate(block.shape) if size % axis.size == 0), 0)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def initialise(weights: Iterable[LocalShard], config: ModelConfig, seed: int) -> None:
    """Fill this rank's blocks of every parameter; the same model under every layout."""
    for one in weights:
        offset, shape = one.block.offset, one.block.shape
        one.values.copy_(initial_slice(one.spec.info, config, seed, offset, shape, one.values.device))


@torch.no_grad()
def fill(weights: Iterable[LocalShard], source: TensorSource) -> None:
    """Overwrite this rank's blocks of every parameter by what `source` has there; nothing else is read."""
    for one in weights:
        one.values.copy_(source.read(one.spec.info.name, one.block.offset, one.block.shape))


def stored(model: nn.Module, specs: Mapping[str, ShardSpec]) -> Iterator[LocalShard]:
    """What this rank keeps of a model's parameters, sharing storage with them."""
    for name, parameter in model.named_parameters():
        part = local(parameter)
        assert part.shape == specs[name].stored.shape, f"{name}: {tuple(part.shape)} is not {specs[name].stored.shape}"
        if part.numel():
            yield LocalShard(specs[name], specs[name].stored, part)


@torch.no_grad()
def sum_copies(model: nn.Module, specs: Mapping[str, ShardSpec]) -> None:
    """Complete the gradients of parameters that several ranks of an axis use for different tokens, in one collective.

    To be called once per step, after the last backward pass.
    """
    waiting: dict[MeshAxis, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        for axis in specs[name].partial:
            if parameter.grad is not None and local(parameter.grad).numel():
                waiting.setdefault(axis, []).append(local(parameter.grad))
    for axis, gradients in waiting.items():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        axis.sum(flat, "gradients")
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
