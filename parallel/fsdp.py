"""Sharded data parallelism with FSDP2: parameters, gradients and optimizer state are sharded.

Losses are sums over tokens divided by global counts, so gradients are summed over ranks and never averaged. Routed
experts are sharded over a mesh of their own, because expert parallelism already splits them over some of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import Shard

from model.moe import Experts, MixtureOfExperts
from model.transformer import Stack
from model.vision.towers import Network
from parallel.layout import Reduce
from parallel.mesh import MeshAxis, Meshes
from parallel.sharding import ShardSpec
from precision.config import PrecisionConfig
from precision.fp8_linear import Float8Gemm


def apply(
    model: Network,
    stacks: Mapping[int, Stack],
    specs: Mapping[str, ShardSpec],
    meshes: Meshes,
    precision: PrecisionConfig,
) -> None:
    """Shard each layer and its experts, each layer of the vision encoder and the rest of the encoder, then the rest of
    each stack. With one rank the model stays as it is.

    In a pipeline, parameters stay gathered between the micro-batches of a step, and gradients are reduced once. Without
    one, each micro-batch gathers parameters and reduces gradients.

    Under bf16 compute, the gathered parameters are bf16, except those of routers. On one device routers use
    unrounded weights, so they must on many devices too.
    """
    if meshes.dense is None or meshes.sparse is None:
        return
    reduce = torch.bfloat16 if meshes.layout.reduce_dtype is Reduce.bfloat16 else precision.master_dtype
    narrow = precision.compute_dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(precision.compute_dtype if narrow else None, reduce)
    unrounded = MixedPrecisionPolicy(None, reduce, cast_forward_inputs=False)
    dims = {id(parameter): specs[name].fsdp_split.dim for name, parameter in model.named_parameters()}
    keep: dict[str, Any] = {"reshard_after_forward": False} if meshes.layout.pp > 1 else {}

    def shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        placement = lambda parameter: Shard(dims[id(parameter)])  # noqa: E731
        unit = fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, **keep)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, which a factor alone would use

    for stack in stacks.values():
        for layer in stack.layers.values():
            if isinstance(layer.ffn, MixtureOfExperts):
                if narrow:
                    shard(layer.ffn.router, meshes.dense, unrounded)
                shard(layer.ffn.experts, meshes.sparse, policy)
            shard(layer, meshes.dense, policy)
        if stack.vision is not None:
            for one in (*stack.vision.layers.values(), stack.vision):
                shard(one, meshes.dense, policy)
        shard(stack, meshes.dense, policy)
    if model.vision is not None and model.vision not in {stack.vision for stack in stacks.values()}:
        for one in (*model.vision.layers.values(), model.vision):
            shard(one, meshes.dense, policy)
    if keep:
        for stack in stacks.values():
            _keep_quantised(stack)


def _keep_quantised(stack: Stack) -> None:
    """Keep FP8 weights as long as the parameters stay gathered, which is all micro-batches of a step. Where each pass
    gathers parameters, each quantises what it reads, rows or columns, and keeps nothing.
    """
    for _, group in units(stack):
        owners = [parameter._module_info.module for parameter in group.fsdp_params] if group is not None else []
        gemms = [owner.gemm for owner in owners if isinstance(getattr(owner, "gemm", None), Float8Gemm)]
        for gemm in gemms:
            gemm.weights.keep_while_gathered()
        if gemms:
            group._to_sharded = partial(_free, gemms, group._to_sharded)


def _free(gemms: Sequence[Float8Gemm], to_sharded: Callable[[], None]) -> None:
    for gemm in gemms:
        gemm.weights.forget()
    to_sharded()


def release(stacks: Mapping[int, Stack]) -> None:
    """Free the parameters that a forward pass without a backward pass leaves gathered."""
    for stack in stacks.values():
        reshard(stack)


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters of a module."""
    for unit, _ in units(module):
        unit.reshard()


def reduce_after(module: nn.Module, last: bool) -> None:
    """Set whether the next backward pass is the `last` of a step: only then gradients are reduced, and parameters are
    freed.
    """
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last)
        module.set_requires_gradient_sync(last)


def units(stack: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each FSDP2 module under `stack` and its parameter group, or None for a module without own parameters."""
    for module in stack.modules():
        if isinstance(module, FSDPModule):
            yield module, module._get_fsdp_state()._fsdp_param_group


def count_traffic(roots: Iterable[nn.Module], meshes: Meshes) -> None:
    """Count the bytes of FSDP2's collectives as they are issued. Parameters must have storage already.

    torch's all-reduce hook is not used. With a hook, torch runs the work that follows a reduction on another stream and
    does not order it before the next reduction: a race on gradients (torch 2.13, _fsdp_collectives.py). FSDP2's
    communication objects are not replaced, so `set_symm_mem` works.
    """
    for root in roots:
        for module, group in units(root):
            axis = meshes.efsdp if isinstance(module, Experts) else meshes.fsdp
            if group is not None and axis.size > 1:
                group.unshard = partial(_counted_unshard, group, group.unshard, axis)
            for parameter in group.fsdp_params if group is not None else ():
                if not parameter.sharded_param.requires_grad:
                    continue
                count = partial(_count_reduced, parameter, axis, meshes.replicate)
                parameter.sharded_param.register_post_accumulate_grad_hook(count)


def _counted_unshard(group: Any, unshard: Any, axis: MeshAxis, async_op: bool = False) -> None:
    if group._all_gather_result is None and not group.is_unsharded:
        elements = ((p._sharded_param_data.numel(), p.param_dtype or p.orig_dtype) for p in group.fsdp_params)
        axis.note("parameters", sum(count * dtype.itemsize for count, dtype in elements))
    unshard(async_op)


def _count_reduced(parameter: FSDPParam, axis: MeshAxis, replicate: MeshAxis, _: Tensor) -> None:
    """Count the bytes of a gradient when FSDP2 has added it to a parameter's shard. Each rank handed the
    reduce-scatter a padded shard for every rank.
    """
    size = parameter._sharded_param_data.numel() * (parameter.reduce_dtype or parameter.orig_dtype).itemsize
    for reduced, handed in ((axis, size * axis.size), (replicate, size)):
        if reduced.size > 1:
            reduced.add_bytes("gradients", handed)


class GradientSum:
    """Sums the gradient of one module's `weight` over micro-batches until FSDP2 reduces it, in the dtype of that
    reduction. FSDP2 does the same with gradients that autograd computes.
    """

    def __init__(self, owner: nn.Module, sharded: FSDPParam | None) -> None:
        self.owner, self.sharded = owner, sharded

    def add(self, gradient: Tensor) -> None:
        weight: Any = self.owner.weight
        gradient = gradient.view_as(weight)
        if self.sharded is None or self.sharded.reduce_dtype in (None, weight.dtype):
            format = weight.grad_dtype or weight.dtype  # DeepSpeed's bf16 parameters have fp32 gradients
            weight.grad = gradient.to(format) if weight.grad is None else weight.grad.add_(gradient)
        elif self.sharded.unsharded_accumulated_grad is None:
            self.sharded.unsharded_accumulated_grad = gradient.to(self.sharded.reduce_dtype)
        else:
            self.sharded.unsharded_accumulated_grad.add_(gradient)


def gradient_sums(stack: nn.Module) -> dict[nn.Module, GradientSum]:
    """Return a `GradientSum` for every module under `stack` that owns a weight."""
    groups = [group for _, group in units(stack) if group is not None]
    sharded = {parameter._module_info.module: parameter for group in groups for parameter in group.fsdp_params}
    return {module: GradientSum(module, sharded.get(module)) for module in stack.modules() if hasattr(module, "weight")}
