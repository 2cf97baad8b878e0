"""ZeRO by DeepSpeed: sharded optimizer state, and gradients, behind names and slices. Only this file and zero3.py, for
parameters that are sharded as well, import it.

DeepSpeed's engine is not used. Its optimizer wrapper is built once for every process group and number format (dense
parameters, routers, which stay in fp32, and experts, which have ranks of their own), and told to do less than it would:
gradients are summed, never averaged, in fp32; norm, clipping, learning rates and checkpoints are ours. So nothing of
it is global, and a layout means the same under both engines.

A wrapper strings the parameters of a group together and gives each rank one piece of the string: what a rank has of a
parameter is a range of its flattened elements, which is at most 2 * dims - 1 blocks of the tensor.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
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
"""Stage -> keys of DeepSpeed's `zero_optimization` that `zero.extra` may set; the others are ours to decide. (Overlap
in stage 1 would leave the sums to hooks that we take away; round robin would give slices other parameters' names.)
"""


def installed() -> str | None:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def check(
    layout: Layout, master: torch.dtype, moments: torch.dtype | None, muon: bool, routed: bool, float8: bool = False
) -> None:
    """Refuse what is not right under DeepSpeed, and say what is. `master`: the format in which weights are updated;
    `moments`: that of the optimizer's state, None where there is none; `routed`: whether there are routed experts.
    """
    if layout.engine is not EngineKind.deepspeed:
        return
    found, other = installed(), f"parallel.engine={EngineKind.fsdp2.value}"
    if found != VERSION:
        has = "is not installed" if found is None else f"{found} is another version than was tested"
        raise ConfigError("parallel.engine", layout.engine, f"deepspeed {has}: {INSTALL}", [EngineKind.fsdp2.value])
    zero = layout.zero
    if zero.stage > 1 and layout.pp > 1:
        reason = "reduces gradients with every micro-batch, which a pipeline puts off to the end of its step"
        raise ConfigError("parallel.zero.stage", zero.stage, reason, [1])
    if zero.stage == 3:
        _check_stage_3(layout, routed, float8)
    if master is not torch.float32:
        reason = f"would keep master weights in {str(master).removeprefix('torch.')}, DeepSpeed's are fp32; or {other}"
        raise ConfigError("precision", None, reason, ["fp32", "bf16"])
    if layout.reduce_dtype is not Reduce.master:
        raise ConfigError(
            "parallel.reduce_dtype", layout.reduce_dtype, f"gradients are summed in fp32 here; or {other}", ["master"]
        )
    if muon:
        reason = f"needs whole matrices, and ZeRO cuts them anywhere: optimizer=adamw, or {other}"
        raise ConfigError("optimizer.kind", "muon", reason)
    if zero.offload is Offload.nvme and moments is not torch.float32:
        reason = "is for AdamW's fp32 state: optimizer.kind=adamw and moments=float32"
        raise ConfigError("parallel.zero.offload", zero.offload, reason, [Offload.none.value, Offload.cpu.value])
    if zero.nvme is not None and (path := Path(zero.nvme).expanduser()).exists() and not path.is_dir():
        raise ConfigError("parallel.zero.nvme", zero.nvme, "is no directory")
    zero_section(zero)


def _check_stage_3(layout: Layout, routed: bool, float8: bool) -> None:
    fsdp2 = f"parallel.engine={EngineKind.fsdp2.value} shards parameters as well"
    if routed:
        reason = f"is for models without routed experts; {fsdp2}, for mixtures of experts too"
        raise ConfigError("parallel.zero.stage", 3, reason, [1, 2])
    if layout.compile:
        raise ConfigError("parallel.compile", True, f"was not tried with DeepSpeed's stage 3; {fsdp2}", [False])
    if float8:
        reason = f"FP8 was not tried with DeepSpeed's stage 3; {fsdp2}"
        raise ConfigError("parallel.zero.stage", 3, reason, [1, 2])


def zero_section(config: ZeroConfig) -> dict[str, Any]:
    """The section `zero_optimization` of a DeepSpeed configuration, made from ours and checked by DeepSpeed."""
    _imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for key in config.extra:
        if key not in PASSED_KEYS[config.stage]:
            why = "is set by ours" if key in DeepSpeedZeroConfig.model_fields else "no such key"
            if key in {one for keys in PASSED_KEYS.values() for one in keys}:
                why = f"is nothing to stage {config.stage}"
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
class FlatSlice:
    """This rank's range [start, stop) of a parameter's flattened elements, at `at` in its group's string."""

    spec: ShardSpec
    start: int
    stop: int
    at: int
    wrapper: Any
    group: int

    @property
    def parameter(self) -> Tensor:
        """The string that the optimizer updates."""
        return self.wrapper.single_partition_of_fp32_groups[self.group]

    @property
    def gradients(self) -> Tensor:
        """The string of summed gradients, fp32; between a reduction and a step."""
        return self.wrapper.averaged_gradients[self.group].flat_partition

    def of(self, string: Tensor) -> Iterator[tuple[ShardBlock, Tensor]]:
        """The range as blocks of the whole tensor, sharing the string's storage."""
        at = self.at
        for block in blocks(self.spec.compute_block, self.start, self.stop):
            yield block, string.narrow(0, at, block.numel).view(block.shape)
            at += block.numel

    @property
    def masters(self) -> Tensor:
        """The string of fp32 weights."""
        return self.parameter.data

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's: strings, and scalars of the whole group."""
        return self.wrapper.optimizer.state[self.parameter]

    @property
    def gradient(self) -> Tensor:
        """This range of the summed gradients, flat."""
        return self.gradients.narrow(0, self.at, self.stop - self.start)


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class ZeroOptimizer(ABC):
    """What DeepSpeed makes of one optimizer's groups. To be used like an optimizer whose `step` updates what `reduce`
    has summed; `slices` are what this rank has.
    """

    slices: Sequence[FlatSlice]

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def after_backward(self, last: bool) -> None:
        """Stages 2 and 3, after every micro-batch: complete the sum of what it brought."""

    @abstractmethod
    def reduce(self) -> None:
        """Complete the gradients of a step. This, or the last `after_backward`, raises `ValueError` where a parameter
        has none.
        """

    @abstractmethod
    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient, without asking the device for the factor."""

    @abstractmethod
    def step(self) -> None:
        """Update the masters and the copies that the model computes with; drop the gradients."""

    @abstractmethod
    def spread(self) -> None:
        """After masters were written: bring the model's copies up to date on all ranks."""

    def weights(self) -> Iterator[LocalShard]:
        """This rank's blocks of the fp32 weights."""
        for one in self.slices:
            yield from (LocalShard(one.spec, block, part) for block, part in one.of(one.masters))

    def gradients(self) -> Iterator[LocalShard]:
        """This rank's blocks of the summed gradients; between `reduce` and `step`."""
        for one in self.slices:
            yield from (LocalShard(one.spec, block, part) for block, part in one.of(one.gradients))

    def _sum_partial(self) -> None:
        """Where several ranks have the same range for different tokens."""
        for one in self.slices:
            for axis in one.spec.partial:
                axis.sum(one.gradient, "gradients")


class Zero12(ZeroOptimizer):
    """Stages 1 and 2: DeepSpeed's wrappers, as one."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: OptimizerFactory,
        prime: Callable[[torch.optim.Optimizer], None],
        names: Mapping[nn.Parameter, str],
        specs: Mapping[str, ShardSpec],
        meshes: Meshes,
    ) -> None:
        """`groups`: torch's, one role each. `make`: an optimizer of some of them; `prime` puts its state in place."""
        self.config, self.meshes, self.names, self.prime = meshes.layout.zero, meshes, names, prime
        self.reduced: set[nn.Parameter] = set()
        join()
        sets: dict[tuple[str, torch.dtype], list[dict[str, Any]]] = {}
        for group in groups:
            first = group["params"][0]
            expert = specs[names[first]].info.role.is_expert
            sets.setdefault(("efsdp" if expert else "fsdp", first.dtype), []).append(group)
        self.wrappers = [(getattr(meshes, axis), self._wrap(some, make, axis)) for (axis, _), some in sets.items()]
        self.slices = [one for _, wrapper in self.wrappers for one in self._slices(wrapper, specs)]

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
        self._move(wrapper)
        self.prime(wrapper.optimizer)  # DeepSpeed's first step leaves empty states behind otherwise
        if self.config.stage == 1:  # the reduction is ours to start: nothing happens in the backward pass
            for hook in wrapper._grad_acc_hooks:
                hook.remove()
            wrapper._grad_acc_hooks.clear()
            for parameter in _parameters(wrapper):
                parameter.grad_dtype = torch.float32  # autograd itself sums micro-batches in fp32
        else:
            for parameter in _parameters(wrapper):
                parameter.register_post_accumulate_grad_hook(self.reduced.add)
        return wrapper

    def _move(self, wrapper: Any) -> None:
        """Bring masters, and with them all state that is made for them, to where they shall be."""
        if self.config.offload is Offload.cpu:
            for string in wrapper.single_partition_of_fp32_groups:
                string.data = on_host(string.data)
        elif self.config.offload is Offload.nvme:
            assert self.config.nvme is not None
            wrapper.optimizer.page(Path(self.config.nvme).expanduser())

    def _slices(self, wrapper: Any, specs: Mapping[str, ShardSpec]) -> Iterator[FlatSlice]:
        for index, group in enumerate(wrapper.bit16_groups):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:  # None: no element of it is here
                    ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
                    spec, stop = specs[self.names[parameter]], ours.start + ours.numel
                    yield FlatSlice(spec, ours.start, stop, theirs.start, wrapper, index)
                    parameter._hp_mapping = None  # it holds on to masters that were moved

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for _, wrapper in self.wrappers for group in wrapper.optimizer.param_groups]

    def after_backward(self, last: bool) -> None:
        """What a micro-batch brought is summed over ranks and added to this rank's share."""
        if last:
            self._check_gradients(self.reduced)
            self.reduced.clear()
        for axis, wrapper in self.wrappers:
            note(axis, "gradients", 4 * sum(parameter.numel() for parameter in _parameters(wrapper)))
            wrapper.set_gradient_accumulation_boundary(last)
            wrapper.independent_gradient_partition_epilogue()

    def reduce(self) -> None:
        """Stage 1: `grad` holds fp32 sums over micro-batches."""
        if self.config.stage == 1:
            self._check_gradients({parameter for parameter in self.names if parameter.grad is not None})
        for axis, wrapper in self.wrappers:
            if self.config.stage == 1:
                note(axis, "gradients", 4 * sum(parameter.numel() for parameter in _parameters(wrapper)))
                wrapper.backward_epilogue()  # fp32 `grad` of bf16 parameters becomes `grad_accum`, without a copy
                wrapper.reduce_gradients(pipeline_parallel=True)
            _flatten(wrapper)
            for string in _gradients(wrapper):
                self.meshes.replicate.sum(string, "gradients")
        if self.config.stage == 2:
            self._sum_partial()

    def _check_gradients(self, there: Collection[nn.Parameter]) -> None:
        """One that is missing would be left out silently."""
        for parameter, name in self.names.items():
            if parameter not in there:
                raise ValueError(f"{name} has no gradient")

    def scale(self, factor: Tensor) -> None:
        for _, wrapper in self.wrappers:
            for string in _gradients(wrapper):
                string.mul_(factor)

    def step(self) -> None:
        for axis, wrapper in self.wrappers:
            note(axis, "parameters", _share_bytes(wrapper))
            if self.config.offload is not Offload.none:
                for index, held in wrapper.averaged_gradients.items():
                    wrapper.averaged_gradients[index] = _holder([held.flat_partition.to("cpu")])
            wrapper.step()
            _let_go(wrapper)

    def spread(self) -> None:
        for axis, wrapper in self.wrappers:
            note(axis, "parameters", _share_bytes(wrapper))
            wrapper.update_lp_params()
            _let_go(wrapper)


def blocks(whole: ShardBlock, start: int, stop: int) -> Iterator[ShardBlock]:
    """Elements [start, stop) of a block, flattened, as blocks of the same tensor in their order."""
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
    if first > last:  # all within one row
        row = start // inner
        yield from (((row, *o), (1, *s)) for o, s in _ranges(shape[1:], start - row * inner, stop - row * inner))
        return
    if start % inner:
        yield from (((first - 1, *o), (1, *s)) for o, s in _ranges(shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from (((last, *o), (1, *s)) for o, s in _ranges(shape[1:], 0, stop - last * inner))


def _imported() -> Any:
    """DeepSpeed, told what it would find out by itself and say. Its environment is not left behind: a job that this
    process submits may run where there are GPUs.
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
    """Let DeepSpeed use the process group that is there; one process makes one of its own."""
    deepspeed = _imported()
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if deepspeed.comm.comm.cdb is None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles collectives of its own
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def process_group(axis: MeshAxis) -> dist.ProcessGroup:
    """Of the ranks that share optimizer state; only a world of one has no group for them."""
    assert axis.group is not None or dist.get_world_size() == 1, f"{axis.name} has no group"
    group = axis.group or dist.group.WORLD
    assert group is not None
    return group


def _parameters(wrapper: Any) -> Iterator[nn.Parameter]:
    for group in wrapper.bit16_groups:
        yield from group


def _share_bytes(wrapper: Any) -> int:
    """What this rank gives to the gathering of parameters."""
    return sum(p.numel() for p in wrapper.single_partition_of_fp32_groups) * next(_parameters(wrapper)).element_size()


def _flatten(wrapper: Any) -> None:
    """One string of gradients per group, whatever DeepSpeed has left."""
    for index, held in wrapper.averaged_gradients.items():
        if getattr(held, "flat_partition", None) is None:
            wrapper.averaged_gradients[index] = _holder([wrapper.flatten(held)])


def _holder(string: list[Tensor]) -> Any:
    """How DeepSpeed holds a group's gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    return GradPartitionBufferGroup(string, string[0])


def _let_go(wrapper: Any) -> None:
    """Masters were read to make the model's copies."""
    if isinstance(wrapper.optimizer, PagedAdamW):
        wrapper.optimizer.leave()


def _gradients(wrapper: Any) -> Iterator[Tensor]:
    for held in wrapper.averaged_gradients.values():
        yield held.flat_partition


def note(axis: MeshAxis, purpose: str, size: int) -> None:
    """DeepSpeed's collectives do not pass through ours."""
    if axis.size > 1:
        axis.note(purpose, size)
