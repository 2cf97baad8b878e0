"""ZeRO stage 3 by DeepSpeed: parameters are sharded as well, and whole only while a module computes with them.

DeepSpeed's hooks gather, prefetch and release what a module needs in forward and backward passes, and collect gradients
in buckets. We sum gradients over ranks, because DeepSpeed would divide by their number. We also run the optimizer step,
because DeepSpeed's step computes its own norm and is silently skipped if the norm is NaN.

Each parameter's flattened elements are partitioned evenly over the ranks of fsdp. The last partition is padded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.head import TiedHead
from model.transformer import Transformer
from parallel.comm.collectives import reduce_scatter_single
from parallel.deepspeed.config import Offload, ParameterOffload
from parallel.deepspeed.offload import PagedAdamW, on_host
from parallel.deepspeed.zero12 import (
    FlatSlice,
    FrozenRange,
    OptimizerFactory,
    ZeroOptimizer,
    join,
    note,
    process_group,
    release_masters,
    zero_section,
)
from parallel.mesh import Meshes
from parallel.sharding import ShardSpec


class PartitionedSlice(FlatSlice):
    """A slice under stage 3, where DeepSpeed's wrapper keeps its flat buffers under other names."""

    @property
    def parameter(self) -> Tensor:
        return self.wrapper.fp32_partitioned_groups_flat[self.group]

    @property
    def gradients(self) -> Tensor:
        sizes = self.wrapper.fp16_partitioned_groups_flat_numel
        return self.wrapper.grad_partitions_flat_buffer.narrow(0, sum(sizes[: self.group]), sizes[self.group])


def partition(model: Transformer, meshes: Meshes, device: torch.device) -> None:
    """Partition every parameter of a model on the meta device over the ranks of fsdp. Only one parameter at a time is
    whole. Parameters have no values yet: the engine sets them.
    """
    join()
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed reads it
    from deepspeed import zero

    away = meshes.layout.zero.offload_parameters is ParameterOffload.cpu
    init = zero.Init(
        data_parallel_group=process_group(meshes.fsdp),
        mem_efficient_linear=False,  # True replaces F.linear in the whole process
        remote_device="cpu" if away else None,
    )
    number = 0
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            whole: Any = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, key, whole)
            init._convert_to_deepspeed_param(whole)
            whole.ds_id, number = number, number + 1  # DeepSpeed's own numbers may differ between ranks
            whole.partition()


class Zero3(ZeroOptimizer):
    """Stage 3, for a model that `partition` has sharded."""

    def __init__(
        self,
        model: Transformer,
        groups: Sequence[dict[str, Any]],
        make: OptimizerFactory,
        prime: Callable[[torch.optim.Optimizer], None],
        specs: Mapping[str, ShardSpec],
        meshes: Meshes,
    ) -> None:
        """`groups`: torch's parameter groups, one role each. `make` builds their optimizer, `prime` its state."""
        self.config, self.meshes = meshes.layout.zero, meshes
        self.names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.reduced: set[Any] = set()
        self.wrapper = self._wrap(model, make([group for group in groups if group["params"]]))
        # each forward or backward pass gathers all parameters that are not kept whole
        passing = [parameter for parameter in self.names if not parameter.ds_persist]
        self.gathered = _bytes(passing)
        seen = {p: specs[name].info.role.is_vision for p, name in self.names.items()}
        blind = not any(p.requires_grad for p, is_vision in seen.items() if is_vision)
        self.gathered_back = _bytes(p for p in passing if not (blind and seen[p]))  # a frozen encoder has no such pass
        self.optimizer: torch.optim.Optimizer = self.wrapper.optimizer
        self.param_groups = self.optimizer.param_groups
        self._take_over(prime)
        self.slices = list(self._slices(specs))
        self.frozen = list(self._frozen(specs))
        self._attach(model)

    def _wrap(self, model: Transformer, optimizer: torch.optim.Optimizer) -> Any:
        from deepspeed import zero
        from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.utils.timer import NoopTimer

        away = None
        if self.config.offload_parameters is ParameterOffload.cpu:
            away = DeepSpeedZeroOffloadParamConfig(device="cpu", pin_memory=torch.cuda.is_available())
        section = {key.removeprefix("stage3_"): value for key, value in zero_section(self.config).items()}
        del section["stage"]
        wrapper = DeepSpeedZeroOptimizer_Stage3(
            model,
            optimizer,
            param_names=self.names,
            timers=NoopTimer(),
            ds_config=None,
            verbose=False,
            dp_process_group=process_group(self.meshes.fsdp),
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            clip_grad=0.0,
            offload_param_config=away,
            **section,
        )
        for number, module in enumerate(model.modules()):
            setattr(module, "ds_id", number)  # noqa: B010  numbered by us, as parameters are
        if isinstance(model.head, TiedHead) and model.embedding is not None:
            zero.register_external_parameter(model.head, model.embedding.weight)
        wrapper._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = self._sum_and_scatter
        wrapper.micro_step_id = 1  # add gradients to the buffer, which `step` clears; 0 would overwrite it
        return wrapper

    def _attach(self, model: Transformer) -> None:
        """Make autograd save references to parameters, not gathered weights. A saved view, such as a transposed weight,
        would stay alive after DeepSpeed's release. (DeepSpeed's remedy replaces F.linear in the whole process.)
        """
        saving = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

        def enter(*_: Any) -> None:
            note(self.meshes.fsdp, "parameters", self.gathered)
            saving.__enter__()

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(lambda *_: saving.__exit__(None, None, None), always_call=True)

    def _pack(self, tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base
        if owner not in self.names or owner.dtype != tensor.dtype:
            return tensor.detach()
        return owner, tensor.size(), tensor.stride(), tensor.storage_offset() - owner.storage_offset()

    def _take_over(self, prime: Callable[[torch.optim.Optimizer], None]) -> None:
        """Offload the flat buffers if configured, and give all to the optimizer. DeepSpeed would pass one at a time."""
        for index, buffer in enumerate(self.wrapper.fp32_partitioned_groups_flat):
            if self.config.offload is Offload.cpu:
                buffer.data = on_host(buffer.data)
            self.optimizer.param_groups[self.wrapper.sub_group_to_group_id[index]]["params"].append(buffer)
        if isinstance(self.optimizer, PagedAdamW):
            assert self.config.nvme is not None
            self.optimizer.page(Path(self.config.nvme).expanduser())
        prime(self.optimizer)

    def _slices(self, specs: Mapping[str, ShardSpec]) -> Iterator[PartitionedSlice]:
        for index, group in enumerate(self.wrapper.fp16_groups):
            at = 0
            for parameter in group:
                size, whole = parameter.partition_numel(), parameter.ds_numel
                start = min(size * self.meshes.fsdp.rank, whole)
                stop = min(start + size, whole)
                if start < stop:  # else this partition is only padding
                    yield PartitionedSlice(specs[self.names[parameter]], start, stop, at, self.wrapper, index)
                at += size

    def _frozen(self, specs: Mapping[str, ShardSpec]) -> Iterator[FrozenRange]:
        for parameter, name in self.names.items():
            start = min(parameter.partition_numel() * self.meshes.fsdp.rank, parameter.ds_numel)
            stop = min(start + parameter.partition_numel(), parameter.ds_numel)
            if not parameter.requires_grad and start < stop:
                yield FrozenRange(specs[name], start, stop, 0, parameter.ds_tensor.data, specs[name].is_owner)

    def _sum_and_scatter(self, parameters: Sequence[Any], _: torch.dtype) -> list[Tensor]:
        """Return this rank's partitions of a bucket's summed gradients, fp32. Replaces DeepSpeed's average."""
        axis, sizes = self.meshes.fsdp, [parameter.partition_numel() for parameter in parameters]
        self.reduced.update(parameters)
        whole = [parameter.grad.flatten().float() for parameter in parameters]
        joined = torch.cat([_padded_rows(one, axis.size, size) for one, size in zip(whole, sizes, strict=True)], dim=1)
        mine = joined[0]
        if axis.size > 1:
            axis.count("gradients", joined)
            mine = torch.empty_like(mine)
            reduce_scatter_single(mine, joined.view(-1), group=axis.group)
        return list(mine.split(sizes))

    def after_backward(self, last: bool) -> None:
        from deepspeed.runtime.zero import parameter_offload

        note(self.meshes.fsdp, "parameters", self.gathered_back)
        self.wrapper.independent_gradient_partition_epilogue()  # flush the buckets
        self.wrapper.parameter_offload.release_backward_leftovers()
        parameter_offload.FWD_MODULE_STACK.clear()  # recomputation leaves modules, and so their tensors, in it

    def reduce(self) -> None:
        self._check_gradients(self.reduced)
        self.reduced.clear()
        self.meshes.replicate.sum(self.wrapper.grad_partitions_flat_buffer, "gradients")
        self._sum_partial()

    def scale(self, factor: Tensor) -> None:
        self.wrapper.grad_partitions_flat_buffer.mul_(factor)

    def step(self) -> None:
        groups = {one.group: one for one in self.slices}  # omits groups of which this rank has only padding
        for one in groups.values():
            one.parameter.grad = one.gradients.to(one.parameter.device)
        self.optimizer.step()
        for one in groups.values():
            one.parameter.grad = None
        self.wrapper.grad_partitions_flat_buffer.zero_()
        self.spread()

    @torch.no_grad()
    def spread(self) -> None:
        wrapper = self.wrapper
        wrapper.parameter_offload.partition_all_parameters()  # drop whole copies of the old weights
        for narrow, master in zip(
            wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True
        ):
            narrow.copy_(master)
        release_masters(self.optimizer)
        if kept := wrapper.persistent_parameters:  # small parameters stay whole from step to step
            note(self.meshes.fsdp, "parameters", _bytes(kept))
            kept[0].all_gather(kept)


def _padded_rows(flat: Tensor, count: int, size: int) -> Tensor:
    """Return `flat` as `count` rows of `size` elements, padded with zeros at the end."""
    return (F.pad(flat, (0, count * size - len(flat))) if len(flat) < count * size else flat).view(count, size)


def _unpack(packed: Any) -> Tensor:
    """Return the saved tensor. If it is a parameter, it has been gathered again by now."""
    if isinstance(packed, Tensor):
        return packed
    owner, size, stride, offset = packed
    return owner.data.as_strided(size, stride, owner.storage_offset() + offset)


def _bytes(parameters: Any) -> int:
    """Return the number of bytes that this rank hands to the all-gather of these parameters."""
    return sum(parameter.partition_numel() * parameter.element_size() for parameter in parameters)
