"""ZeRO stages 1 and 2 by DeepSpeed. Only this file and zero3.py import DeepSpeed.

`DeepSpeedEngine` is not used. We build one of DeepSpeed's optimizer wrappers for each pair of process group and dtype:
for dense parameters, for routers (which stay in fp32), and for experts (which have their own process group). Gradients
are summed in fp32 and never averaged. Norm, clipping, learning rates and checkpoints are ours, so they work
alike under `deepspeed` and `fsdp2`.

A wrapper flattens each parameter group into one buffer and partitions it across ranks. A rank's slice of a parameter is
a range of its flattened elements, which is at most 2 * dims - 1 blocks of the tensor.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import ConfigError
from parallel.comm.collectives import all_gather_single
from parallel.deepspeed.config import INSTALL, VERSION, Offload, ZeroConfig
from parallel.deepspeed.offload import PagedAdamW, on_host
from parallel.layout import EngineKind, Layout, Reduce
from parallel.mesh import MeshAxis, Meshes
from parallel.sharding import LocalShard, ShardBlock, ShardSpec

_REDUCED = ("use_multi_rank_bucket_allreduce", "allgather_bucket_size")
_GATHERED = tuple(
    f"stage3_{key}"
    for key in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
)
PASSED_KEYS = {1: _REDUCED, 2: (*_REDUCED, "overlap_comm"), 3: _GATHERED}
"""Stage -> keys of DeepSpeed's `zero_optimization` that `zero.extra` may set. `overlap_comm` is not allowed in stage 1,
where we remove the hooks that it needs. `round_robin_gradients` is not allowed: slices would get wrong names.
"""


def installed() -> str | None:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def check(
    layout: Layout, master: torch.dtype, moments: torch.dtype | None, muon: bool, routed: bool, float8: bool = False
) -> None:
    """Reject settings that do not work with DeepSpeed. `master`: the dtype of the master weights. `moments`: the dtype
    of the optimizer's moments, or None. `routed`: whether the model has routed experts.
    """
    if layout.engine is not EngineKind.deepspeed:
        return
    found, other = installed(), f"parallel.engine={EngineKind.fsdp2.value}"
    if found != VERSION:
        has = "is not installed" if found is None else f"{found} is not the tested version"
        raise ConfigError("parallel.engine", layout.engine, f"deepspeed {has}: {INSTALL}", [EngineKind.fsdp2.value])
    zero = layout.zero
    if zero.stage > 1 and layout.pp > 1:
        reason = "reduces gradients with every micro-batch, but a pipeline defers them to the end of its step"
        raise ConfigError("parallel.zero.stage", zero.stage, reason, [1])
    if zero.stage == 3:
        _check_stage_3(layout, routed, float8)
    if master is not torch.float32:
        reason = f"DeepSpeed keeps master weights in fp32, not {str(master).removeprefix('torch.')} ({other} can)"
        raise ConfigError("precision", None, reason, ["fp32", "bf16"])
    if layout.reduce_dtype is not Reduce.master:
        reason = f"DeepSpeed sums gradients in fp32 ({other} supports other dtypes)"
        raise ConfigError("parallel.reduce_dtype", layout.reduce_dtype, reason, ["master"])
    if muon:
        reason = f"needs whole matrices, but ZeRO splits them anywhere: set optimizer=adamw or {other}"
        raise ConfigError("optimizer.kind", "muon", reason)
    if zero.offload is Offload.nvme and moments is not torch.float32:
        reason = "supports AdamW's fp32 state only: set optimizer.kind=adamw and optimizer.moments=float32"
        raise ConfigError("parallel.zero.offload", zero.offload, reason, [Offload.none.value, Offload.cpu.value])
    if zero.nvme is not None and (path := Path(zero.nvme).expanduser()).exists() and not path.is_dir():
        raise ConfigError("parallel.zero.nvme", zero.nvme, "is not a directory")
    zero_section(zero)


def _check_stage_3(layout: Layout, routed: bool, float8: bool) -> None:
    fsdp2, stage = f"parallel.engine={EngineKind.fsdp2.value} shards parameters as well", "parallel.zero.stage"
    if routed:
        raise ConfigError(stage, 3, f"does not support routed experts; {fsdp2}, those of experts too", [1, 2])
    if layout.compile:
        raise ConfigError("parallel.compile", True, f"is untested with DeepSpeed's stage 3; {fsdp2}", [False])
    if float8:
        raise ConfigError(stage, 3, f"FP8 is untested with DeepSpeed's stage 3; {fsdp2}", [1, 2])


def zero_section(config: ZeroConfig) -> dict[str, Any]:
    """Make DeepSpeed's section `zero_optimization` from our configuration. DeepSpeed checks its values."""
    _imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for key in config.extra:
        if key not in PASSED_KEYS[config.stage]:
            why = "is set by Leviathan" if key in DeepSpeedZeroConfig.model_fields else "no such key"
            if any(key in keys for keys in PASSED_KEYS.values()):
                why = f"does not apply to stage {config.stage}"
            raise ConfigError(f"parallel.zero.extra.{key}", config.extra[key], why, list(PASSED_KEYS[config.stage]))
    section: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": config.bucket_size,
        "contiguous_gradients": True,
        "overlap_comm": False,
        **config.extra,
    }
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise ConfigError(f"parallel.zero.extra.{key}", config.extra.get(key), first["msg"]) from None
    return section


@dataclass(frozen=True)
class FlatRange:
    """This rank's range [start, stop) of a parameter's flattened elements. `at`: its start in a flat buffer."""

    spec: ShardSpec
    start: int
    stop: int
    at: int

    def of(self, buffer: Tensor) -> Iterator[tuple[ShardBlock, Tensor]]:
        """Yield the range as blocks of the whole tensor, each with a view of its elements in `buffer`."""
        at = self.at
        for block in blocks(self.spec.compute_block, self.start, self.stop):
            yield block, buffer.narrow(0, at, block.numel).view(block.shape)
            at += block.numel


@dataclass(frozen=True)
class FrozenRange(FlatRange):
    """A range of a frozen parameter, in the buffer `masters`: the model's own weights, which have the master dtype.
    `writes`: whether this rank saves it.
    """

    masters: Tensor
    writes: bool


@dataclass(frozen=True)
class FlatSlice(FlatRange):
    """A range of a trained parameter, in the buffers of `group`, a parameter group of DeepSpeed's wrapper."""

    wrapper: Any
    group: int

    @property
    def parameter(self) -> Tensor:
        """The flat buffer that the optimizer updates."""
        return self.wrapper.single_partition_of_fp32_groups[self.group]

    @property
    def gradients(self) -> Tensor:
        """The flat buffer of summed gradients, fp32. Valid between a reduction and a step."""
        return self.wrapper.averaged_gradients[self.group].flat_partition

    @property
    def masters(self) -> Tensor:
        """The flat buffer of fp32 weights."""
        return self.parameter.data

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state: flat buffers, and scalars of the whole group."""
        return self.wrapper.optimizer.state[self.parameter]


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class ZeroOptimizer(ABC):
    """An optimizer whose state DeepSpeed shards, and from stage 2 on its gradients. `step` applies the gradients that
    `reduce` has summed. `slices`: this rank's slices of all trained parameters. `frozen`: those of frozen parameters.
    """

    names: Mapping[nn.Parameter, str]
    slices: Sequence[FlatSlice]
    frozen: Sequence[FrozenRange]
    param_groups: list[dict[str, Any]]

    @abstractmethod
    def after_backward(self, last: bool) -> None:
        """Finish reducing a micro-batch's gradients, in stages 2 and 3. `last`: it is the last one of the step."""

    @abstractmethod
    def reduce(self) -> None:
        """Finish reducing the gradients of a step. This method, or the last `after_backward`, raises `ValueError` if a
        parameter has no gradient.
        """

    @abstractmethod
    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient, without copying the factor to the host."""

    @abstractmethod
    def step(self) -> None:
        """Update the master weights, and from them the model's parameters on all ranks. Drop the gradients."""

    @abstractmethod
    def spread(self) -> None:
        """Copy the master weights to the model's parameters on all ranks, after master weights were overwritten."""

    def weights(self) -> Iterator[LocalShard]:
        """Yield this rank's blocks of the fp32 master weights, and of the frozen weights."""
        for one in self.slices:
            yield from (LocalShard(one.spec, block, part) for block, part in one.of(one.masters))
        for still in self.frozen:
            yield from (LocalShard(still.spec, block, part) for block, part in still.of(still.masters))

    def gradients(self) -> Iterator[LocalShard]:
        """Yield this rank's blocks of the summed gradients. Valid between `reduce` and `step`."""
        for one in self.slices:
            yield from (LocalShard(one.spec, block, part) for block, part in one.of(one.gradients))

    def _check_gradients(self, there: Collection[nn.Parameter]) -> None:
        """Raise `ValueError` for a trained parameter without a gradient, which DeepSpeed would silently skip."""
        for parameter, name in self.names.items():
            if parameter.requires_grad and parameter not in there:
                raise ValueError(f"{name} has no gradient")

    def _sum_partial(self) -> None:
        """Sum this rank's slices of gradients over the axes whose ranks used a parameter for different tokens."""
        for one in self.slices:
            for axis in one.spec.partial:
                axis.sum(one.gradients.narrow(0, one.at, one.stop - one.start), "gradients")


class Zero12(ZeroOptimizer):
    """Stages 1 and 2: one of DeepSpeed's optimizer wrappers per process group and dtype."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: OptimizerFactory,
        prime: Callable[[torch.optim.Optimizer], None],
        names: Mapping[nn.Parameter, str],
        specs: Mapping[str, ShardSpec],
        meshes: Meshes,
    ) -> None:
        """`groups`: torch's parameter groups, one role each. `make` builds an optimizer for a subset
        of them, and `prime` creates that optimizer's state.
        """
        self.config, self.meshes, self.names, self.prime = meshes.layout.zero, meshes, names, prime
        self.reduced: set[nn.Parameter] = set()
        join()
        sets: dict[tuple[str, torch.dtype], list[dict[str, Any]]] = {}
        for group in groups:
            if not group["params"]:  # a frozen role
                continue
            first = group["params"][0]
            expert = specs[names[first]].info.role.is_expert
            sets.setdefault(("efsdp" if expert else "fsdp", first.dtype), []).append(group)
        self.wrappers = [(getattr(meshes, axis), self._wrap(some, make, axis)) for (axis, _), some in sets.items()]
        self.slices = [one for _, wrapper in self.wrappers for one in self._slices(wrapper, specs)]
        self.param_groups = [group for _, wrapper in self.wrappers for group in wrapper.optimizer.param_groups]
        self.frozen = [self._whole(specs[n], p) for p, n in names.items() if not p.requires_grad]

    def _whole(self, spec: ShardSpec, parameter: nn.Parameter) -> FrozenRange:
        axis = self.meshes.efsdp if spec.info.role.is_expert else self.meshes.fsdp
        return FrozenRange(spec, 0, parameter.numel(), 0, parameter.data.view(-1), spec.is_owner and axis.rank == 0)

    def _wrap(self, groups: list[dict[str, Any]], make: OptimizerFactory, axis: str) -> Any:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        section = {key: value for key, value in zero_section(self.config).items() if key != "stage"}
        wrapper = DeepSpeedZeroOptimizer(
            make(groups),
            param_names=self.names,
            timers=NoopTimer(),
            optimizer_params={},
            verbose=False,
            dp_process_group=process_group(getattr(self.meshes, axis)),
            partition_grads=self.config.stage == 2,
            gradient_average=False,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            clip_grad=0.0,
            check_grad_overflow=False,
            compute_grad_norm=False,
            **section,
        )
        self._offload(wrapper)
        self.prime(wrapper.optimizer)  # or DeepSpeed's first step leaves empty states behind
        if self.config.stage == 1:  # `reduce` reduces once a step, so remove the hooks of the backward pass
            for hook in wrapper._grad_acc_hooks:
                hook.remove()
            wrapper._grad_acc_hooks.clear()
            for parameter in _parameters(wrapper):
                parameter.grad_dtype = torch.float32  # autograd itself sums micro-batches in fp32
        else:
            for parameter in _parameters(wrapper):
                parameter.register_post_accumulate_grad_hook(self.reduced.add)
        return wrapper

    def _offload(self, wrapper: Any) -> None:
        """Move the master weights off the device. Their moments are then created in the same memory or files."""
        if self.config.offload is Offload.cpu:
            for buffer in wrapper.single_partition_of_fp32_groups:
                buffer.data = on_host(buffer.data)
        elif self.config.offload is Offload.nvme:
            assert self.config.nvme is not None
            wrapper.optimizer.page(Path(self.config.nvme).expanduser())

    def _slices(self, wrapper: Any, specs: Mapping[str, ShardSpec]) -> Iterator[FlatSlice]:
        for index, group in enumerate(wrapper.bit16_groups):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:  # None: this rank has no element of it
                    ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
                    spec, stop = specs[self.names[parameter]], ours.start + ours.numel
                    yield FlatSlice(spec, ours.start, stop, theirs.start, wrapper, index)
                    parameter._hp_mapping = None  # else the buffers from which masters were moved stay alive

    def after_backward(self, last: bool) -> None:
        """Stage 2: reduce a micro-batch's gradients and add them to this rank's slices."""
        if last:
            self._check_gradients(self.reduced)
            self.reduced.clear()
        for axis, wrapper in self.wrappers:
            note(axis, "gradients", _gradient_bytes(wrapper))
            wrapper.set_gradient_accumulation_boundary(last)
            wrapper.independent_gradient_partition_epilogue()

    def reduce(self) -> None:
        """Finish the reductions over ranks. In stage 1, `grad` holds fp32 sums over micro-batches until here."""
        if self.config.stage == 1:
            self._check_gradients({parameter for parameter in self.names if parameter.grad is not None})
        for axis, wrapper in self.wrappers:
            if self.config.stage == 1:
                note(axis, "gradients", _gradient_bytes(wrapper))
                wrapper.backward_epilogue()  # fp32 `grad` of bf16 parameters becomes `grad_accum`, without a copy
                wrapper.reduce_gradients(pipeline_parallel=True)
            for index, held in wrapper.averaged_gradients.items():
                if getattr(held, "flat_partition", None) is None:  # make them one flat buffer per group
                    wrapper.averaged_gradients[index] = _holder(wrapper.flatten(held))
            for buffer in _gradient_buffers(wrapper):
                self.meshes.replicate.sum(buffer, "gradients")
        if self.config.stage == 2:
            self._sum_partial()

    def scale(self, factor: Tensor) -> None:
        for _, wrapper in self.wrappers:
            for buffer in _gradient_buffers(wrapper):
                buffer.mul_(factor)

    def step(self) -> None:
        for axis, wrapper in self.wrappers:
            note(axis, "parameters", _partition_bytes(wrapper))
            if self.config.offload is not Offload.none:
                for index, held in wrapper.averaged_gradients.items():
                    wrapper.averaged_gradients[index] = _holder(held.flat_partition.to("cpu"))
            wrapper.step()
            release_masters(wrapper.optimizer)

    def spread(self) -> None:
        for axis, wrapper in self.wrappers:
            note(axis, "parameters", _partition_bytes(wrapper))
            wrapper.update_lp_params()
            release_masters(wrapper.optimizer)


def blocks(whole: ShardBlock, start: int, stop: int) -> Iterator[ShardBlock]:
    """Express elements [start, stop) of the flattened block as blocks of the same tensor, in flat order."""
    for offset, shape in _ranges(whole.shape, start, stop):
        yield ShardBlock(tuple(a + b for a, b in zip(whole.offset, offset, strict=True)), shape)


def _ranges(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows

    def within(row: int, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        yield from (((row, *o), (1, *s)) for o, s in _ranges(shape[1:], begin - row * inner, end - row * inner))

    yield from within(first - 1, start, min(stop, first * inner))
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last:
        yield from within(last, last * inner, stop)


def _imported() -> Any:
    """Import DeepSpeed for the accelerator of this machine, without its log lines. `DS_ACCELERATOR` is removed again,
    because a job that this process submits may run on a machine with GPUs.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    given = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    finally:
        if given is None:
            del os.environ["DS_ACCELERATOR"]
    return deepspeed


def join() -> None:
    """Let DeepSpeed use the existing process group. Without one, create a group of this process alone."""
    deepspeed = _imported()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if deepspeed.comm.comm.cdb is None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles its own collectives
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    deepspeed.comm.comm.cdb.all_gather_function = all_gather_single  # DeepSpeed's own choice makes torch warn


def process_group(axis: MeshAxis) -> dist.ProcessGroup:
    """Return the process group over which DeepSpeed partitions. An axis has none only in a world of one rank."""
    assert axis.group is not None or dist.get_world_size() == 1, f"{axis.name} has no group"
    group = axis.group or dist.group.WORLD
    assert group is not None
    return group


def _parameters(wrapper: Any) -> Iterator[nn.Parameter]:
    for group in wrapper.bit16_groups:
        yield from group


def _gradient_bytes(wrapper: Any) -> int:
    """Return the bytes that this rank hands to the reduction of gradients, in fp32."""
    return 4 * sum(parameter.numel() for parameter in _parameters(wrapper))


def _partition_bytes(wrapper: Any) -> int:
    """Return the bytes that this rank hands to the all-gather of parameters."""
    return sum(p.numel() for p in wrapper.single_partition_of_fp32_groups) * next(_parameters(wrapper)).element_size()


def _holder(buffer: Tensor) -> Any:
    """Wrap a flat buffer in DeepSpeed's holder of a group's gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    return GradPartitionBufferGroup([buffer], buffer)


def release_masters(optimizer: torch.optim.Optimizer) -> None:
    """Free the host memory of master weights in mapped files, after they were copied to the model."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.release()


def _gradient_buffers(wrapper: Any) -> Iterator[Tensor]:
    for held in wrapper.averaged_gradients.values():
        yield held.flat_partition


def note(axis: MeshAxis, purpose: str, size: int) -> None:
    """Count a collective that DeepSpeed issues, with `size` bytes from this rank."""
    if axis.size > 1:
        axis.note(purpose, size)
