"""Known ways in which layouts go wrong, to be planted in rank processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from model import moe
from model.kernels import TorchKernels
from parallel import context_parallel, fsdp, parallelize
from parallel.comm import collectives
from parallel.context_parallel import ContextShard, RingPlan, ShardedContext
from parallel.deepspeed import zero3, zero12
from parallel.layout import ParallelConfig
from parallel.mesh import MeshAxis, Meshes
from parallel.pipeline import runtime
from parallel.pipeline.deferred_wgrad import Deferred
from parallel.sharding import local
from precision import fp8_tiles
from train.certify import worker
from train.certify.worker import CertifyCase, RankResults
from train.engine import base
from train.engine import fsdp as engine
from train.eval import held_out
from train.optim import optimizer

Plant = Callable[[Any, str, Any], None]
MESHES: list[Any] = []


@contextmanager
def replaced() -> Iterator[Plant]:
    """A function that replaces attributes; they are restored at the end."""
    undo: list[tuple[Any, str, Any]] = []

    def plant(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    try:
        yield plant
    finally:
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    """Plant one of `BUGS`, by name."""
    with replaced() as plant:
        if bug is not None:
            BUGS[bug](plant)
        yield


class BuggyRanks:
    """A pool whose ranks, where there are several, run with a bug."""

    def __init__(self, ranks: Any, bug: str | None) -> None:
        self.ranks, self.bug = ranks, bug

    def __call__(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self.ranks(count, measure_with_bug, self.bug if count > 1 else None, *arguments)


def measure_with_bug(
    bug: str | None, parallel: ParallelConfig, cases: Mapping[str, CertifyCase]
) -> dict[str, RankResults]:
    with planted(bug):
        return worker.run_cases(parallel, cases)


def tiles_across_experts(plant: Plant) -> None:
    """Tokens of several experts share the tiles of FP8 scales."""
    quantise = fp8_tiles.TiledArithmetic.quantise

    def shared(self: Any, x: Any, operand: Any, groups: Any, rows: bool, columns: bool) -> Any:
        found = quantise(self, x, operand, groups, rows, columns)
        if groups is None or not columns:
            return found
        how, counts = fp8_tiles.tiling(self.recipe, operand), groups.host
        whole = fp8_tiles.quantise(x[: sum(counts)].mT, how).dequantise(torch.float32).split(counts, dim=1)
        return dataclasses.replace(found, columns=tuple(fp8_tiles.quantise(part, how) for part in whole))

    plant(fp8_tiles.TiledArithmetic, "quantise", shared)


def padding_that_is_not_zero(plant: Plant) -> None:
    """Padding rows repeat some token, so that they affect the scales."""
    spread = TorchKernels.spread
    plant(
        TorchKernels, "spread", lambda self, x, slots, *rest: spread(self, x, slots._replace(is_padding_C1=None), *rest)
    )


def weights_quantised_before_they_are_whole(plant: Plant) -> None:
    """Each rank takes the scale of its own shard of a weight, split across the tiles."""
    usual = fp8_tiles.tiling

    def narrow(recipe: Any, operand: Any) -> Any:
        how = usual(recipe, operand)
        return dataclasses.replace(how, columns=48) if operand is fp8_tiles.Operand.weight else how

    plant(fp8_tiles, "tiling", narrow)


def missing_reduction(plant: Plant) -> None:
    """The backward of the sequence gather keeps the local part instead of summing the ranks'."""

    def gather(shard: torch.Tensor, axis: Any, dim: int, purpose: str) -> torch.Tensor:
        there = lambda x: collectives.all_gather_no_grad(x, axis, dim, purpose)  # noqa: E731
        local = lambda grad: grad.chunk(axis.size, dim)[axis.rank].contiguous()  # noqa: E731
        return shard if axis.size == 1 else collectives._Collective.apply(shard, there, local)

    plant(collectives, "all_gather", gather)


def doubled_divide(plant: Plant) -> None:
    plant(fsdp.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    plant(fsdp.FSDPModule, "set_force_sum_reduction_for_comms", lambda self, on: None)


def experts_left_out_of_the_norm(plant: Plant) -> None:
    """Only the first group of experts is counted, as in a norm summed over data parallel ranks alone."""
    honest = engine.gradient_norm

    def norm(gradients: Any, *rest: Any) -> Any:
        later = lambda one: any(split.axis.name == "ep" and split.axis.rank for split in one.spec.splits)  # noqa: E731
        return honest((one for one in gradients if not later(one)), *rest)

    plant(engine, "gradient_norm", norm)


def balancing_term_dropped(plant: Plant) -> None:
    """With the sequence split, each rank balances its own part of it."""
    plant(parallelize, "_count_whole_sequences", lambda model, meshes: None)


def bias_from_local_counts(plant: Plant) -> None:
    honest = MeshAxis.sum

    def local_only(self: MeshAxis, tensor: torch.Tensor, purpose: str) -> None:
        if not (self.name == "world" and purpose == "balance" and tensor.dtype is torch.int64):
            honest(self, tensor, purpose)

    plant(MeshAxis, "sum", local_only)


def expert_gradients_over_the_wrong_group(plant: Plant) -> None:
    """Averaged over the ranks that hold different experts."""

    def mix(spec: Any, parameter: Any) -> None:
        if _split_by_ep(spec):
            group, gradient = MESHES[-1].experts, local(parameter.grad)
            dist.all_reduce(gradient, group=group.group)
            gradient /= group.size

    _remember_meshes(plant)
    _after_the_sum(plant, mix)


def gains_not_reduced(plant: Plant) -> None:
    plant(engine, "sum_partial_gradients", lambda model, specs: None)


def no_gradient_without_tokens(plant: Plant) -> None:
    """A rank none of whose experts got a token has no gradient for them."""

    def drop(spec: Any, parameter: Any) -> None:
        if _split_by_ep(spec) and not local(parameter.grad).any():
            parameter.grad = None

    _after_the_sum(plant, drop)


def gains_not_reduced_beside_experts(plant: Plant) -> None:
    """Correct under each axis alone: only a model that is split both ways skips the sum."""
    honest = engine.sum_partial_gradients
    skip = lambda model, specs: any(map(_split_by_ep, specs.values())) or honest(model, specs)  # noqa: E731
    plant(engine, "sum_partial_gradients", skip)


def moments_lost_on_the_way(plant: Plant) -> None:
    """A resumed run begins with new second moments of the experts."""
    honest = worker.Checkpointer.restore

    def forget(self: Any, state: Any) -> Any:
        progress = honest(self, state)
        for part in state:
            if ".experts." in part.name and part.name.endswith("exp_avg_sq"):
                part.tensor.zero_()
        return progress

    plant(worker.Checkpointer, "restore", forget)


def evaluation_of_one_rank(plant: Plant) -> None:
    honest = held_out.held_out_loss

    def larger(*arguments: Any) -> Any:
        found = honest(*arguments)
        return dataclasses.replace(found, loss=found.loss * (1 + 1e-6))

    plant(worker, "held_out_loss", larger)


def shards_made_orthogonal(plant: Plant) -> None:
    """Each shard of a matrix alone, on the rank that keeps it."""
    honest = optimizer.rounds
    plant(optimizer, "rounds", lambda *arguments: [dataclasses.replace(r, stages=()) for r in honest(*arguments)])


def positions_not_restarted(plant: Plant) -> None:
    """Context-parallel shards take positions in the sequence for positions in documents."""
    honest = ContextShard.sequence_context

    def whole_sequences(self: Any, positions_BT: torch.Tensor, *arguments: Any) -> Any:
        if self.axis.size > 1:
            positions_BT = torch.arange(positions_BT.shape[1]).expand(positions_BT.shape)
        return honest(self, positions_BT, *arguments)

    plant(ContextShard, "sequence_context", whole_sequences)


def halo_off_by_one(plant: Plant) -> None:
    honest = context_parallel._halo
    plant(context_parallel, "_halo", lambda *arguments: honest(*arguments).roll(1, dims=2))


def loss_divided_by_cp(plant: Plant) -> None:
    _remember_meshes(plant)
    honest = base.summed_loss
    plant(base, "summed_loss", lambda *arguments: honest(*arguments) / MESHES[-1].cp.size)


def last_keys_of_the_ring_dropped(plant: Plant) -> None:
    """One hop too few."""
    honest = ShardedContext._full_plan

    def short(self: Any, rows: Any) -> Any:
        plan = honest(self, rows)
        assert isinstance(plan, RingPlan)
        return dataclasses.replace(plan, rounds=(*plan.rounds[:-1], []))

    plant(ShardedContext, "_full_plan", short)


def balancing_term_dropped_in_a_stage(plant: Plant) -> None:
    """Only the first stage's routers are balanced."""
    honest = runtime.split_stages

    def forget(model: Any, meshes: Any) -> Any:
        stacks = honest(model, meshes)
        for stage, stack in stacks.items():
            for layer in stack.layers.values():
                if stage and isinstance(layer.ffn, moe.MixtureOfExperts):
                    balance = layer.ffn.router.balance
                    balance.config = dataclasses.replace(balance.config, aux=0.0)
        return stacks

    plant(runtime, "split_stages", forget)


def norm_of_each_stage(plant: Plant) -> None:
    """Each stage clips by the norm of its own gradients."""

    def own(self: Any) -> Any:
        alone = self.meshes.layout.world_size == self.meshes.layout.pp  # or the stage's other ranks are omitted as well
        return engine.gradient_norm(self.gradients(), MeshAxis("world") if alone else self.meshes.world, self.device)

    plant(engine.TorchEngine, "norm", own)


def tied_gradient_lost_between_stages(plant: Plant) -> None:
    """Each end of the pipeline keeps its own gradient of tied embeddings."""
    honest = engine.sum_partial_gradients

    def apart(spec: Any) -> Any:
        return dataclasses.replace(spec, partial=tuple(axis for axis in spec.partial if axis.name != "ends"))

    plant(engine, "sum_partial_gradients", lambda model, specs: honest(model, {n: apart(s) for n, s in specs.items()}))


def micro_batches_mixed_up(plant: Plant) -> None:
    """Hidden states meet the positions and documents of another micro-batch."""
    honest = runtime._set_contexts
    plant(runtime, "_set_contexts", lambda stacks, contexts: honest(stacks, list(reversed(contexts))))


def weights_put_off_for_ever(plant: Plant) -> None:
    """The last deferred product of a micro-batch is never computed."""
    honest = Deferred.take

    def most(self: Any) -> Any:
        self._waiting = self._waiting[:-1]
        return honest(self)

    plant(Deferred, "take", most)


def routers_saved_by_one_stage(plant: Plant) -> None:
    plant(Meshes, "is_first_of_stage", property(lambda self: self.world.rank == 0))


def averaged_by_deepspeed(plant: Plant) -> None:
    """DeepSpeed divides gradients by the number of ranks, as it does by default."""
    _deepspeed(plant, gradient_average=True)


def summed_in_the_models_format(plant: Plant) -> None:
    """Gradients of a bf16 model are added up over micro-batches in bf16, under DeepSpeed."""

    def narrow(wrapper: Any) -> None:
        for parameter in zero12._parameters(wrapper):
            parameter.grad_dtype = parameter.dtype

    _change_wrapper(plant, zero12.Zero12, narrow)


def buffers_shifted_by_one(plant: Plant) -> None:
    """A rank's slice of a parameter begins one element too late."""
    honest = zero12.FlatSlice.of
    plant(zero12.FlatSlice, "of", lambda self, buffer: honest(self, buffer.roll(-1)))


def copies_of_the_old_weights(plant: Plant) -> None:
    """After a checkpoint is loaded the model still computes with its initial weights."""
    plant(zero12.Zero12, "spread", lambda self: None)


def experts_reduced_with_the_dense(plant: Plant) -> None:
    """Experts that differ from rank to rank are summed as if they were the same."""
    honest = zero12.Zero12._wrap
    plant(zero12.Zero12, "_wrap", lambda self, groups, make, axis: honest(self, groups, make, "fsdp"))


def averaged_in_buckets(plant: Plant) -> None:
    """Gradients are averaged over ranks, as in DeepSpeed's stage 3."""
    _change_shards(plant, lambda piece, parameter: piece / parameter.ds_zero_partition_world_size)


def shards_rounded_to_the_models_format(plant: Plant) -> None:
    """Each micro-batch's sums over ranks are rounded as the parameters are before they are added up."""
    _change_shards(plant, lambda piece, parameter: piece.to(parameter.dtype).float())


def micro_batches_overwritten(plant: Plant) -> None:
    """Each micro-batch's gradients overwrite the previous ones, as in DeepSpeed's first micro-batch of a step."""
    _change_wrapper(plant, zero3.Zero3, lambda wrapper: setattr(wrapper, "micro_step_id", 0))


def shards_of_the_rank_before(plant: Plant) -> None:
    """A rank's shard of a parameter is taken for another's."""
    honest = zero3.Zero3._slices

    def moved(self: Any, specs: Any) -> Iterator[zero12.FlatSlice]:
        for one in honest(self, specs):
            size = one.stop - one.start
            start = one.start - size if one.start else size
            yield dataclasses.replace(one, start=start, stop=start + size)

    plant(zero3.Zero3, "_slices", moved)


def whole_copies_of_the_old_weights(plant: Plant) -> None:
    """Small parameters, which stay whole, are not gathered again after a step."""
    honest = zero3.Zero3.spread

    def keeping(self: Any) -> None:
        kept = {parameter: parameter.data.clone() for parameter in self.names if parameter.numel()}
        honest(self)
        for parameter, old in kept.items():
            parameter.data.copy_(old)

    plant(zero3.Zero3, "spread", keeping)


def _change_shards(plant: Plant, change: Callable[[Any, Any], Any]) -> None:
    honest = zero3.Zero3._sum_and_scatter

    def changed(self: Any, parameters: Any, format: Any) -> Any:
        found = honest(self, parameters, format)
        return [change(piece, parameter) for piece, parameter in zip(found, parameters, strict=True)]

    plant(zero3.Zero3, "_sum_and_scatter", changed)


def _split_by_ep(spec: Any) -> bool:
    return any(split.axis.name == "ep" for split in spec.splits)


def _after_the_sum(plant: Plant, change: Callable[[Any, Any], None]) -> None:
    """Change each parameter's gradient, given its spec."""
    honest = engine.sum_partial_gradients

    def changed(model: Any, specs: Any) -> None:
        honest(model, specs)
        for name, parameter in model.named_parameters():
            change(specs[name], parameter)

    plant(engine, "sum_partial_gradients", changed)


def _change_wrapper(plant: Plant, owner: Any, change: Callable[[Any], None]) -> None:
    """Change what wraps DeepSpeed's optimizer."""
    honest = owner._wrap

    def wrap(self: Any, *arguments: Any) -> Any:
        change(wrapper := honest(self, *arguments))
        return wrapper

    plant(owner, "_wrap", wrap)


def _remember_meshes(plant: Plant) -> None:
    honest = worker.make_meshes

    def remember(*arguments: Any) -> Any:
        MESHES.append(honest(*arguments))
        return MESHES[-1]

    plant(worker, "make_meshes", remember)


def _deepspeed(plant: Plant, **changed: Any) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    honest = stage_1_and_2.DeepSpeedZeroOptimizer
    plant(stage_1_and_2, "DeepSpeedZeroOptimizer", lambda *args, **kwargs: honest(*args, **{**kwargs, **changed}))


BUGS: dict[str, Callable[[Plant], None]] = {
    name: function
    for name, function in list(globals().items())
    if not name.startswith("_") and getattr(function, "__annotations__", {}) == {"plant": "Plant", "return": "None"}
}
"""By name: every public function above that takes a `plant`."""
