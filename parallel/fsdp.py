"""Sharded data parallelism with FSDP2: parameters, gradients and optimizer state are sharded.

Losses are sums over tokens divided by global counts, so gradients are summed over ranks and never averaged. Routed
experts are sharded over a mesh of their own, because expert parallelism already splits them over some of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import Shard

from model.head import TiedHead
from model.moe import Experts, MixtureOfExperts, Router
from model.transformer import Stack
from model.vision.towers import Network
from parallel.layout import GatherExperts, Layout, Reduce, ReduceEvery
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
    """Shard each layer and its experts, the embedding, the head, each layer of the vision encoder and the rest of the
    encoder, then the rest of each stack. With one rank the model stays as it is.

    Routers are not sharded: see `sharding.shard_specs`. Each unit gathers the next one ahead, because the host may stop
    in an MoE layer to read the numbers of its tokens, and would start the next gather with an empty queue.

    In a pipeline, parameters stay gathered between the micro-batches of a step, and gradients are reduced once. Without
    one, each micro-batch gathers parameters, and `reduce_within_step` decides when gradients are reduced. Experts may
    be gathered and reduced once per step there too (`GatherExperts`). Under bf16 compute, the gathered parameters are
    bf16.
    """
    if meshes.dense is None or meshes.sparse is None:
        return
    reduce = torch.bfloat16 if meshes.layout.reduce_dtype is Reduce.bfloat16 else precision.master_dtype
    narrow = precision.compute_dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(precision.compute_dtype if narrow else None, reduce)
    dims = {id(parameter): specs[name].fsdp_split.dim for name, parameter in model.named_parameters()}
    kept: dict[str, Any] = {"reshard_after_forward": False}
    keep = kept if meshes.layout.pp > 1 else {}
    whole_experts = meshes.layout.gather_experts is GatherExperts.step

    def shard(module: nn.Module, mesh: DeviceMesh, **keep: Any) -> None:
        placement = lambda parameter: Shard(dims[id(parameter)])  # noqa: E731
        whole = {p for part in module.modules() if isinstance(part, Router) for p in part.parameters()}
        unit = fully_shard(
            module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, ignored_params=whole, **keep
        )
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, which a factor alone would use

    for stack in stacks.values():
        for layer in stack.layers.values():
            if isinstance(layer.ffn, MixtureOfExperts):
                shard(layer.ffn.experts, meshes.sparse, **(kept if whole_experts else keep))
            shard(layer, meshes.dense, **keep)
        embedding, head = _ends(stack)
        if embedding is not None:
            shard(embedding, meshes.dense, **keep)
        if head is not None:
            shard(head, meshes.dense, **kept)  # its backward pass follows at once
        if stack.vision is not None:
            for one in (*stack.vision.layers.values(), stack.vision):
                shard(one, meshes.dense, **keep)
        shard(stack, meshes.dense, **keep)
        _gather_ahead(stack)
    if model.vision is not None and model.vision not in {stack.vision for stack in stacks.values()}:
        for one in (*model.vision.layers.values(), model.vision):
            shard(one, meshes.dense, **keep)
    for stack in stacks.values():
        for module in stack.modules():
            if keep or (whole_experts and isinstance(module, Experts)):
                _keep_quantised(module)


def _ends(stack: Stack) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the embedding and the head of a stack, as far as they are units. A tied embedding stays in the unit of the
    rest of the stack, where the head finds it gathered.
    """
    return (None, None) if isinstance(stack.head, TiedHead) else (stack.embedding, stack.head)


def _gather_ahead(stack: Stack) -> None:
    """Make each unit start the gather of the next one, in the forward and in the backward pass. The backward pass of
    the embedding does not read its table.
    """
    embedding, head = _ends(stack)
    layers: list[list[Any]] = [
        [layer, layer.ffn.experts] if isinstance(layer.ffn, MixtureOfExperts) else [layer]
        for layer in stack.layers.values()
    ]
    forward: list[list[Any]] = [[stack], [embedding], *layers, [head]]
    backward: list[list[Any]] = [[head], *reversed(layers)]
    for (unit, *_), following in pairwise(units for units in forward if units != [None]):
        unit.set_modules_to_forward_prefetch(following)
    for (unit, *_), following in pairwise(units for units in backward if units != [None]):
        unit.set_modules_to_backward_prefetch(following)
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)


def _keep_quantised(unit: nn.Module) -> None:
    """Keep the FP8 weights of a unit as long as its parameters stay gathered, which is all micro-batches of a step.
    Where each pass gathers parameters, each quantises what it reads, rows or columns, and keeps nothing.
    """
    group = unit._get_fsdp_state()._fsdp_param_group if isinstance(unit, FSDPModule) else None
    owners: list[Any] = [one._module_info.module for one in group.fsdp_params] if group is not None else []
    gemms = [owner.gemm for owner in owners if isinstance(getattr(owner, "gemm", None), Float8Gemm)]
    for gemm in gemms:
        gemm.weights.keep_while_gathered()
    if group is not None and gemms:
        vars(group)["_to_sharded"] = partial(_free, gemms, group._to_sharded)


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


def reduce_within_step(module: nn.Module, layout: Layout, last: bool) -> None:
    """Set what the next backward pass of a step reduces and frees; `last`: it is that of the last micro-batch.

    See `ReduceEvery` and `GatherExperts`.
    """
    if not isinstance(module, FSDPModule):
        return
    match layout.reduce_every:
        case ReduceEvery.micro_batch:
            # FSDP2 keeps what is not summed over the replicas yet in the dtype of the reduction
            module.set_requires_all_reduce(last or layout.reduce_dtype is Reduce.bfloat16)
        case ReduceEvery.step:
            module.set_requires_gradient_sync(last)
    for part in module.modules() if layout.gather_experts is GatherExperts.step else ():
        if isinstance(part, Experts):
            assert isinstance(part, FSDPModule)
            part.set_requires_gradient_sync(last)
            part.set_reshard_after_backward(last)


def units(stack: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each FSDP2 module under `stack` and its parameter group, or None for a module without own parameters."""
    for module in stack.modules():
        if isinstance(module, FSDPModule):
            yield module, module._get_fsdp_state()._fsdp_param_group


def count_traffic(roots: Iterable[nn.Module], meshes: Meshes) -> None:
    """Count the bytes of FSDP2's collectives as they are issued.

    No hook of torch is used, and FSDP2's communication objects are not replaced, so `set_symm_mem` works. With an
    all-reduce hook, torch runs the work that follows a reduction on another stream and does not order it before the
    next reduction: a race on gradients (torch 2.13, _fsdp_collectives.py).
    """
    for root in roots:
        for module, group in units(root):
            axis = meshes.efsdp if isinstance(module, Experts) else meshes.fsdp
            if group is not None and axis.size > 1:
                group.unshard = partial(_counted_unshard, group, group.unshard, axis)
            if group is not None:
                group.post_backward = partial(_counted_reduction, group, group.post_backward, axis, meshes.replicate)


def _counted_unshard(group: Any, unshard: Any, axis: MeshAxis, async_op: bool = False) -> None:
    pending = group._all_gather_result is not None
    unshard(async_op)
    result = group._all_gather_result
    if result is not None and not pending:
        sizes = zip(result.param_all_gather_input_numels, result.param_all_gather_input_dtypes, strict=True)
        axis.note("parameters", sum(n * d.itemsize for some, kinds in sizes for n, d in zip(some, kinds, strict=True)))


def _counted_reduction(group: Any, post_backward: Any, axis: MeshAxis, replicate: MeshAxis, *unused: Any) -> None:
    """Count what the reduce-scatter of a unit is handed, and its result if an all-reduce over the replicas follows.

    Shards are padded to equal sizes. No buffer is referenced here: FSDP2 frees one reduction's before the next begins.
    """
    reduced = [parameter for parameter in group.fsdp_params if group.reduce_grads and _has_gradient(parameter)]
    post_backward(*unused)
    sizes = (p._sharded_param_data.numel() * (p.reduce_dtype or p.orig_dtype).itemsize for p in reduced)
    if size := sum(sizes):
        if axis.size > 1:
            axis.add_bytes("gradients", size * axis.size)
        if replicate.size > 1 and group.all_reduce_grads:
            replicate.add_bytes("gradients", size)


def _has_gradient(parameter: FSDPParam) -> bool:
    return _whole_gradient(parameter) is not None


def _whole_gradient(parameter: FSDPParam) -> Tensor | None:
    if parameter.unsharded_accumulated_grad is not None or not hasattr(parameter, "_unsharded_param"):
        return parameter.unsharded_accumulated_grad
    return parameter._unsharded_param.grad


def before_reductions(roots: Iterable[nn.Module], see: Callable[[list[Tensor]], None]) -> None:
    """Let `see` have the whole gradients of each unit after each of its backward passes, before they are reduced."""

    def seen(group: Any, post_backward: Any, *unused: Any) -> None:
        see([x for one in group.fsdp_params if (x := _whole_gradient(one)) is not None])
        post_backward(*unused)

    for root in roots:
        for _, group in units(root):
            if group is not None:
                group.post_backward = partial(seen, group, group.post_backward)


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
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    sharded = {one._module_info.module: one for one in parameters if one._module_info.param_name == "weight"}
    return {module: GradientSum(module, sharded.get(module)) for module in stack.modules() if hasattr(module, "weight")}
