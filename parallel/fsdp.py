"""Sharded data parallelism with FSDP2: parameters, gradients and optimizer state live as shards.

Losses are sums over tokens divided by global counts, so gradients are summed over ranks, never averaged. Routed experts
are sharded over a mesh of their own: expert parallelism has cut them over some of the ranks already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import Shard

from model.moe import MixtureOfExperts
from model.transformer import Stack, Transformer
from parallel.comm.collectives import all_gather_single
from parallel.layout import Reduce
from parallel.mesh import MeshAxis, Meshes
from parallel.sharding import ShardSpec
from precision.config import PrecisionConfig


def apply(
    model: Transformer,
    stacks: Mapping[int, Stack],
    specs: Mapping[str, ShardSpec],
    meshes: Meshes,
    precision: PrecisionConfig,
) -> None:
    """Shard each layer and its experts, then what is left of each stack. Without a mesh the model stays as it is.

    In a pipeline parameters stay gathered between the micro-batches of a step, and gradients are reduced once: each
    micro-batch would gather and reduce them again otherwise.

    In bfloat16 the gathered copies are bf16. Routers are gathered in the master format: they score in fp32 on one
    device and must not be rounded first on many.
    """
    if meshes.dense is None or meshes.sparse is None:
        return
    reduce = torch.bfloat16 if meshes.layout.reduce_dtype is Reduce.bfloat16 else precision.master_dtype
    narrow = precision.compute_dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(precision.compute_dtype if narrow else None, reduce)
    unrounded = MixedPrecisionPolicy(None, reduce, cast_forward_inputs=False)
    dims = {id(parameter): specs[name].storage.dim for name, parameter in model.named_parameters()}

    def shard(module: nn.Module, mesh: DeviceMesh, axis: MeshAxis, policy: MixedPrecisionPolicy) -> None:
        place = lambda parameter: Shard(dims[id(parameter)])  # noqa: E731
        keep: dict[str, Any] = {"reshard_after_forward": False} if meshes.layout.pp > 1 else {}
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=place, **keep)
        _sum_and_count(sharded, axis, meshes.replicate)

    for stack in stacks.values():
        for layer in stack.layers.values():
            if isinstance(layer.ffn, MixtureOfExperts):
                if narrow:
                    shard(layer.ffn.router, meshes.dense, meshes.fsdp, unrounded)
                shard(layer.ffn.experts, meshes.sparse, meshes.efsdp, policy)
            shard(layer, meshes.dense, meshes.fsdp, policy)
        shard(stack, meshes.dense, meshes.fsdp, policy)


def release(stacks: Mapping[int, Stack]) -> None:
    """Drop the copies that a forward pass without a backward pass leaves gathered."""
    for stack in stacks.values():
        for module in stack.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class GradientSum:
    """Where the gradient of one module's `weight` is summed over micro-batches until FSDP2 reduces it: in the format of
    that reduction, as FSDP2 itself does with gradients that autograd brings.
    """

    def __init__(self, owner: nn.Module, stored: FSDPParam | None) -> None:
        self.owner, self.stored = owner, stored

    def add(self, gradient: Tensor) -> None:
        weight: Any = self.owner.weight
        gradient = gradient.view_as(weight)
        if self.stored is None or self.stored.reduce_dtype in (None, weight.dtype):
            format = weight.grad_dtype or weight.dtype  # DeepSpeed's copies in bf16 have gradients in fp32
            weight.grad = gradient.to(format) if weight.grad is None else weight.grad.add_(gradient)
        elif self.stored.unsharded_accumulated_grad is None:
            self.stored.unsharded_accumulated_grad = gradient.to(self.stored.reduce_dtype)
        else:
            self.stored.unsharded_accumulated_grad.add_(gradient)


def gradient_sums(stack: nn.Module) -> dict[nn.Module, GradientSum]:
    """Of every module under `stack` that owns a weight."""
    stored: dict[nn.Module, FSDPParam] = {}
    for module in stack.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group is not None else ():
            stored[parameter._module_info.module] = parameter
    return {module: GradientSum(module, stored.get(module)) for module in stack.modules() if hasattr(module, "weight")}


def _sum_and_count(module: FSDPModule, axis: MeshAxis, replicate: MeshAxis) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, which a factor alone would use
    module.set_custom_all_gather(_CountedAllGather(axis))
    module.set_all_reduce_hook(partial(_count_reduced, axis, replicate))


class _CountedAllGather(AllGather):
    """FSDP2's own all-gather, with its bytes counted."""

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if self.axis.size > 1:
            self.axis.count("parameters", input_tensor)
        return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def _count_reduced(axis: MeshAxis, replicate: MeshAxis, shard: Tensor) -> None:
    """FSDP2 calls this with each group's reduced shard: the reduce-scatter was handed one such per rank."""
    if axis.size > 1:
        axis.traffic.bytes[axis.name, "gradients"] += shard.numel() * shard.element_size() * axis.size
    if replicate.size > 1:
        replicate.count("gradients", shard)
