"""Which part of every parameter this rank stores: its `ShardSpec`, for initialisation, norms, checkpoints and costs.

A rank's shard of a parameter is always one block of the whole tensor. Tensor or expert parallelism splits the tensor
first, so that the model holds a plain tensor of the smaller shape. FSDP2 then shards that tensor.

Ranks have different tokens, so the gradient of a shard is the sum over all ranks that compute with it. FSDP2 sums over
its mesh, and `sum_partial_gradients` over the axes in `ShardSpec.partial`.
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
from parallel.comm.world import World
from parallel.layout import EngineKind
from parallel.mesh import MeshAxis, Meshes

TENSOR_DIM = {
    Role.embedding: 0,
    Role.head: 0,
    Role.query: 0,
    Role.key: 0,
    Role.value: 0,
    Role.query_up: 0,
    Role.latent_up: 0,
    Role.attention_output: 1,
    Role.dense_gate: 0,
    Role.dense_up: 0,
    Role.dense_down: 1,
    Role.shared_gate: 0,
    Role.shared_up: 0,
    Role.shared_down: 1,
}
"""The dimension that tensor parallelism splits, by role. All other parameters are whole on every rank of tp."""
EXPERT_HIDDEN_DIM = 2  # gate_up [E, 2, F, D] and down [E, D, F]


@dataclass(frozen=True)
class Split:
    """A split of `dim` into `axis.size` equal parts. If the dimension does not divide evenly, the last parts are
    shorter or empty.
    """

    axis: MeshAxis
    dim: int


@dataclass(frozen=True)
class ShardBlock:
    """A block of a tensor: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, split: Split) -> ShardBlock:
        size = self.shape[split.dim]
        part = -(-size // split.axis.size)
        start = min(split.axis.rank * part, size)
        offset, shape = list(self.offset), list(self.shape)
        offset[split.dim] += start
        shape[split.dim] = min(part, size - start)
        return ShardBlock(tuple(offset), tuple(shape))


@dataclass(frozen=True)
class ShardSpec:
    """Where one parameter is stored.

    `splits` (TP and EP) leave the plain tensor that the model computes with. Of that tensor this rank keeps the part
    given by `fsdp_split`. Ranks along `replicas` keep the same part. `partial`: axes over which FSDP2 sums no gradient.
    """

    info: ParameterInfo
    splits: tuple[Split, ...]
    fsdp_split: Split
    replicas: tuple[MeshAxis, ...]
    partial: tuple[MeshAxis, ...] = ()

    @property
    def compute_block(self) -> ShardBlock:
        return _split_block(self.info, self.splits)

    @property
    def local_block(self) -> ShardBlock:
        return self.compute_block.shard(self.fsdp_split)

    @property
    def is_owner(self) -> bool:
        """Whether this rank is the one that counts and writes the block, of the ranks that keep it."""
        return all(axis.rank == 0 for axis in self.replicas)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the state that belongs to the parameter as a whole."""
        return self.is_owner and not any(self.local_block.offset)


@dataclass(frozen=True)
class LocalShard:
    """A block of a parameter, or of its gradient, that this rank keeps, and its values."""

    spec: ShardSpec
    block: ShardBlock
    values: Tensor


def shard_specs(infos: Mapping[str, ParameterInfo], model: ModelConfig, meshes: Meshes) -> dict[str, ShardSpec]:
    """Return where each parameter is stored. FSDP2 shards all parameters but the routers: they are small, compute in
    fp32, and would be one more collective per layer, so each rank keeps them whole and sums their gradients per step.
    """
    specs = {name: _spec(info, model, meshes) for name, info in infos.items()}
    if meshes.layout.engine is EngineKind.deepspeed:  # FSDP2 does not shard
        whole = Split(MeshAxis("whole"), 0)
        return {name: replace(spec, fsdp_split=whole) for name, spec in specs.items()}
    return specs


def _spec(info: ParameterInfo, model: ModelConfig, meshes: Meshes) -> ShardSpec:
    if info.role.is_logit:  # whole on every rank, and used for the rank's own pairs
        return ShardSpec(info, (), Split(MeshAxis("whole"), 0), (meshes.dp,), partial=(meshes.dp,))
    if info.role.is_expert:
        splits = tuple(s for s in (Split(meshes.ep, 0), Split(meshes.etp, EXPERT_HIDDEN_DIM)) if s.axis.size > 1)
        shape = _split_block(info, splits).shape
        # the first dimension that divides evenly, else 0: fewer experts than ranks would leave some ranks empty
        even = next((dim for dim, size in enumerate(shape) if size % meshes.efsdp.size == 0), 0)
        return ShardSpec(info, splits, Split(meshes.efsdp, even), (meshes.replicate,))
    dim = TENSOR_DIM.get(info.role)
    if info.role is Role.qk_norm and info.shape[0] != model.head_dim:
        dim = 0  # the gain spans all heads
    splits = () if dim is None or meshes.tp.size == 1 else (Split(meshes.tp, dim),)
    shared: tuple[MeshAxis, ...] = () if splits or meshes.tp.size == 1 else (meshes.tp,)
    if info.role is Role.embedding and model.tie_embeddings and meshes.ends.size > 1:
        shared += (meshes.ends,)
    if info.role.is_vision and meshes.layout.encodes_ahead:
        shared += (meshes.pp,)
    if info.role is Role.router and meshes.layout.engine is EngineKind.fsdp2:
        everywhere = (meshes.replicate, meshes.fsdp, *shared)
        return ShardSpec(info, (), Split(MeshAxis("whole"), 0), everywhere, partial=everywhere)
    return ShardSpec(info, splits, Split(meshes.fsdp, 0), (meshes.replicate, *shared), partial=shared)


def _split_block(info: ParameterInfo, splits: tuple[Split, ...]) -> ShardBlock:
    block = ShardBlock((0,) * len(info.shape), tuple(info.shape))
    for split in splits:
        block = block.shard(split)
    return block


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, with the same storage. A plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shards(model: nn.Module, specs: Mapping[str, ShardSpec]) -> Iterator[LocalShard]:
    """Yield this rank's blocks of a model's parameters. Their values are views of the parameters."""
    for name, parameter in model.named_parameters():
        part, block = local(parameter), specs[name].local_block
        assert part.shape == block.shape, f"{name}: {tuple(part.shape)} is not {block.shape}"
        if part.numel():
            yield LocalShard(specs[name], block, part)


def local_gradients(model: nn.Module, specs: Mapping[str, ShardSpec]) -> Iterator[LocalShard]:
    """Yield this rank's blocks of a model's gradients, without those of frozen parameters. Raises `ValueError` if
    another parameter has no gradient: a norm would omit it silently.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            raise ValueError(f"{name} has no gradient")
        yield LocalShard(specs[name], specs[name].local_block, local(parameter.grad))


@torch.no_grad()
def initialise(weights: Iterable[LocalShard], config: ModelConfig, seed: int) -> None:
    """Fill this rank's blocks of every parameter with initial values. The values are the same under every layout."""
    for one in weights:
        offset, shape = one.block.offset, one.block.shape
        one.values.copy_(initial_slice(one.spec.info, config, seed, offset, shape, one.values.device))


@torch.no_grad()
def fill(weights: Iterable[LocalShard], source: TensorSource) -> None:
    """Overwrite this rank's blocks of the parameters that `source` has. Other blocks are not read."""
    for one in weights:
        if one.spec.info.name in source.shapes:
            one.values.copy_(source.read(one.spec.info.name, one.block.offset, one.block.shape))


def whole_state(model: nn.Module, specs: Mapping[str, ShardSpec], world: World) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each parameter and persistent buffer of the whole model, sorted by name, on the CPU
    of rank 0. Other ranks get an empty tensor. All ranks must take all of them.
    """
    state = model.state_dict()
    for name in sorted({name for names in world.gather(list(state), "state") for name in names}):
        part = None
        if name in state and (name not in specs or specs[name].is_owner):
            values, spec = local(state[name]).detach().cpu(), specs.get(name)
            shape, offset = (values.shape, ()) if spec is None else (spec.info.shape, spec.local_block.offset)
            part = (tuple(shape), offset, values)
        parts = [one for one in world.to_main(part, "state") if one is not None]
        whole = torch.empty(parts[0][0], dtype=parts[0][2].dtype) if parts else torch.empty(0)
        for _, offset, values in parts:
            whole[tuple(slice(o, o + size) for o, size in zip(offset, values.shape, strict=False))] = values
        yield name, whole


@torch.no_grad()
def sum_partial_gradients(model: nn.Module, specs: Mapping[str, ShardSpec]) -> None:
    """Sum the gradients of parameters that several ranks of an axis use for different tokens, in one collective per
    axis. Call it once per step, after the last backward pass.
    """
    waiting: dict[MeshAxis, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        for axis in specs[name].partial:
            if axis.size > 1 and parameter.grad is not None and local(parameter.grad).numel():
                waiting.setdefault(axis, []).append(local(parameter.grad))
    for axis, gradients in waiting.items():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        axis.sum(flat, "gradients")
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
