"""Ways in which layouts are known to go wrong, to be planted in rank processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.deepspeed import zero3, zero12
from train.certify import worker

Plant = Callable[[Any, str, Any], None]


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    undo: list[tuple[Any, str, Any]] = []

    def plant(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    if bug is not None:
        BUGS[bug](plant)
    try:
        yield
    finally:
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)


def tiles_across_experts(plant: Plant) -> None:
    """Tokens of several experts share the tiles of FP8 scales."""
    from precision import fp8_tiles

    quantise = fp8_tiles.TiledArithmetic.quantise

    def shared(self: Any, x: Any, operand: Any, groups: Any, rows: bool, columns: bool) -> Any:
        found = quantise(self, x, operand, groups, rows, columns)
        if groups is None or not columns:
            return found
        how, counts = fp8_tiles.tiling(self.recipe, operand), groups.host
        whole = fp8_tiles.quantise(x[: sum(counts)].mT, how).wide(torch.float32).split(counts, dim=1)
        return dataclasses.replace(found, columns=tuple(fp8_tiles.quantise(part, how) for part in whole))

    plant(fp8_tiles.TiledArithmetic, "quantise", shared)


def padding_that_is_not_zero(plant: Plant) -> None:
    """Rows beyond an expert's own repeat some token, so that they have a say in the scales."""
    from model import moe

    gather = moe.SortedTokens.copy_slots
    plant(
        moe.SortedTokens, "copy_slots", lambda self, x, k: gather(dataclasses.replace(self, is_padding_C1=None), x, k)
    )


def weights_quantised_before_they_are_whole(plant: Plant) -> None:
    """Each rank takes the scale of its own part of a weight, cut across the tiles."""
    from precision import fp8_tiles

    usual = fp8_tiles.tiling

    def narrow(recipe: Any, operand: Any) -> Any:
        how = usual(recipe, operand)
        return dataclasses.replace(how, columns=48) if operand is fp8_tiles.Operand.weight else how

    plant(fp8_tiles, "tiling", narrow)


def missing_reduction(plant: Plant) -> None:
    """The backward of the sequence gather keeps the local part instead of summing the ranks'."""
    from parallel.comm import collectives

    def keep(partial: torch.Tensor, axis: Any, dim: int, purpose: str) -> torch.Tensor:
        return partial.chunk(axis.size, dim)[axis.rank].contiguous()

    class Local(collectives._Gather):
        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return keep(grads[0], *ctx.arguments), None, None, None

    plant(collectives, "_Gather", Local)


def doubled_divide(plant: Plant) -> None:
    from parallel import fsdp

    plant(fsdp.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    plant(fsdp.FSDPModule, "set_force_sum_reduction_for_comms", lambda self, on: None)


def experts_left_out_of_the_norm(plant: Plant) -> None:
    """Only the first group of experts is counted, as in a norm summed over data parallel ranks alone."""
    from train.engine import fsdp

    honest = fsdp.gradient_norm

    @dataclass
    class Counted:
        is_owner: bool

    def norm(model: Any, specs: Any, meshes: Any) -> Any:
        later = {name for name, spec in specs.items() if any(s.axis.name == "ep" and s.axis.rank for s in spec.splits)}
        return honest(model, {n: Counted(spec.is_owner and n not in later) for n, spec in specs.items()}, meshes)

    plant(fsdp, "gradient_norm", norm)


def balancing_term_dropped(plant: Plant) -> None:
    """With the sequence cut, each rank balances its own part of a row."""
    from parallel import parallelize

    plant(parallelize, "_count_whole_rows", lambda model, meshes: None)


def bias_from_local_counts(plant: Plant) -> None:
    from parallel.mesh import MeshAxis

    honest = MeshAxis.sum

    def local_only(self: MeshAxis, tensor: torch.Tensor, purpose: str) -> None:
        if not (self.name == "world" and purpose == "balance" and tensor.dtype is torch.int64):
            honest(self, tensor, purpose)

    plant(MeshAxis, "sum", local_only)


def expert_gradients_over_the_wrong_group(plant: Plant) -> None:
    """Averaged over the ranks that hold different experts."""
    from parallel.sharding import local
    from train.engine import fsdp

    honest = fsdp.sum_copies

    def mix(model: Any, specs: Any) -> None:
        honest(model, specs)
        for name, parameter in model.named_parameters():
            if specs[name].info.role.is_expert:
                for split in specs[name].splits:
                    if split.axis.name == "ep":
                        group = MESHES[-1].experts
                        gradient = local(parameter.grad)
                        dist.all_reduce(gradient, group=group.group)
                        gradient /= group.size

    honest_meshes = worker.make_meshes

    def remember(*arguments: Any) -> Any:
        MESHES.append(honest_meshes(*arguments))
        return MESHES[-1]

    plant(worker, "make_meshes", remember)
    plant(fsdp, "sum_copies", mix)


def gains_not_reduced(plant: Plant) -> None:
    from train.engine import fsdp

    plant(fsdp, "sum_copies", lambda model, specs: None)


def no_gradient_without_tokens(plant: Plant) -> None:
    """A rank none of whose experts got a token has no gradient for them."""
    from parallel.sharding import local
    from train.engine import fsdp

    honest = fsdp.sum_copies

    def drop(model: Any, specs: Any) -> None:
        honest(model, specs)
        for name, parameter in model.named_parameters():
            spec = specs[name]
            cut = any(split.axis.name == "ep" for split in spec.splits)
            if cut and spec.info.role.is_expert and not local(parameter.grad).any():
                parameter.grad = None

    plant(fsdp, "sum_copies", drop)


def gains_not_reduced_beside_experts(plant: Plant) -> None:
    """Right under each axis alone: only a model that is cut both ways skips the sum."""
    from train.engine import fsdp

    honest = fsdp.sum_copies

    def skip(model: Any, specs: Any) -> None:
        if not any(split.axis.name == "ep" for spec in specs.values() for split in spec.splits):
            honest(model, specs)

    plant(fsdp, "sum_copies", skip)


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
    from train.eval import held_out

    honest = held_out.held_out_loss

    def doubled(*arguments: Any) -> Any:
        found = honest(*arguments)
        return dataclasses.replace(found, loss=found.loss * (1 + 1e-6))

    plant(worker, "held_out_loss", doubled)


def shards_made_orthogonal(plant: Plant) -> None:
    """Each part of a matrix by itself, on the rank that keeps it."""
    from train.optim import optimizer

    honest = optimizer.rounds
    plant(optimizer, "rounds", lambda *arguments: [dataclasses.replace(r, stages=()) for r in honest(*arguments)])


def positions_not_restarted(plant: Plant) -> None:
    """Parts of rows take their places in the row for places in documents."""
    from parallel.context_parallel import ContextShard

    honest = ContextShard.context

    def whole_rows(self: Any, positions_BT: torch.Tensor, *arguments: Any) -> Any:
        if self.axis.size > 1:
            positions_BT = torch.arange(positions_BT.shape[1]).expand(positions_BT.shape)
        return honest(self, positions_BT, *arguments)

    plant(ContextShard, "context", whole_rows)


def halo_off_by_one(plant: Plant) -> None:
    from parallel.context_parallel import _AttendShard

    honest = _AttendShard._before
    plant(_AttendShard, "_before", lambda self, *arguments: honest(self, *arguments).roll(1, dims=2))


def loss_divided_by_cp(plant: Plant) -> None:
    from train.engine import base

    honest, honest_meshes = base.summed_loss, worker.make_meshes

    def remember(*arguments: Any) -> Any:
        MESHES.append(honest_meshes(*arguments))
        return MESHES[-1]

    plant(worker, "make_meshes", remember)
    plant(base, "summed_loss", lambda *arguments: honest(*arguments) / MESHES[-1].cp.size)


def last_keys_of_the_ring_dropped(plant: Plant) -> None:
    """One hop too few."""
    from parallel.context_parallel import PartContext, PartPlan

    honest = PartContext._global

    def short(self: Any, rows: Any) -> Any:
        plan = honest(self, rows)
        assert isinstance(plan, PartPlan)
        return dataclasses.replace(plan, rounds=(*plan.rounds[:-1], []))

    plant(PartContext, "_global", short)


def balancing_term_dropped_in_a_stage(plant: Plant) -> None:
    """Only the first stage's routers are balanced."""
    from model.moe import MixtureOfExperts
    from parallel.pipeline import runtime

    honest = runtime.cut

    def forget(model: Any, meshes: Any) -> Any:
        stacks = honest(model, meshes)
        for stage, stack in stacks.items():
            for layer in stack.layers.values():
                if stage and isinstance(layer.ffn, MixtureOfExperts):
                    balance = layer.ffn.router.balance
                    balance.config = dataclasses.replace(balance.config, aux=0.0)
        return stacks

    plant(runtime, "cut", forget)


def norm_of_each_stage(plant: Plant) -> None:
    """Each stage clips by the norm of its own gradients."""
    from parallel.mesh import MeshAxis
    from train.engine import fsdp

    honest = fsdp.gradient_norm

    def own(model: Any, specs: Any, meshes: Any) -> Any:
        alone = meshes.layout.world_size == meshes.layout.pp  # else the stage's other ranks would be left out, too
        return honest(model, specs, dataclasses.replace(meshes, world=MeshAxis("world")) if alone else meshes)

    plant(fsdp, "gradient_norm", own)


def tied_gradient_lost_between_stages(plant: Plant) -> None:
    """Each end of the pipeline keeps its own gradient of the table that both use."""
    from train.engine import fsdp

    honest = fsdp.sum_copies

    def apart(model: Any, specs: Any) -> None:
        cut = {
            name: dataclasses.replace(spec, partial=tuple(axis for axis in spec.partial if axis.name != "ends"))
            for name, spec in specs.items()
        }
        honest(model, cut)

    plant(fsdp, "sum_copies", apart)


def micro_batches_mixed_up(plant: Plant) -> None:
    """Hidden states meet the positions and documents of another micro-batch."""
    from parallel.pipeline import runtime

    honest = runtime._hand_out
    plant(runtime, "_hand_out", lambda stacks, contexts: honest(stacks, list(reversed(contexts))))


def weights_put_off_for_ever(plant: Plant) -> None:
    """Of what a micro-batch puts off, the last product is never computed."""
    from parallel.pipeline.deferred_wgrad import Deferred

    honest = Deferred.take

    def most(self: Any) -> Any:
        self._waiting = self._waiting[:-1]
        return honest(self)

    plant(Deferred, "take", most)


def routers_saved_by_one_stage(plant: Plant) -> None:
    from parallel.mesh import Meshes

    plant(Meshes, "is_first_of_stage", property(lambda self: self.world.rank == 0))


def averaged_by_deepspeed(plant: Plant) -> None:
    """DeepSpeed divides gradients by the number of ranks, as it does of itself."""
    _deepspeed(plant, gradient_average=True)


def summed_in_the_models_format(plant: Plant) -> None:
    """Gradients of a bf16 model are added up over micro-batches in bf16, under DeepSpeed."""
    honest = zero12.Zero._wrap

    def narrow(self: Any, *arguments: Any) -> Any:
        wrapper = honest(self, *arguments)
        for parameter in zero12._parameters(wrapper):
            parameter.grad_dtype = parameter.dtype
        return wrapper

    plant(zero12.Zero, "_wrap", narrow)


def strings_shifted_by_one(plant: Plant) -> None:
    """What a rank has of a parameter is taken from one element further on."""
    plant(zero12.FlatSlice, "of", lambda self, string: _SLICE_OF(self, string.roll(-1)))


def copies_of_the_old_weights(plant: Plant) -> None:
    """After a checkpoint was read the model still computes with what it was initialised with."""
    plant(zero12.Zero, "spread", lambda self: None)


def experts_reduced_with_the_dense(plant: Plant) -> None:
    """Experts that differ from rank to rank are summed as if they were the same."""
    honest = zero12.Zero._wrap
    plant(zero12.Zero, "_wrap", lambda self, groups, make, axis: honest(self, groups, make, "fsdp"))


def averaged_in_buckets(plant: Plant) -> None:
    """The sum over ranks is what DeepSpeed's stage 3 makes of it."""
    _pieces(plant, lambda piece, parameter: piece / parameter.ds_zero_partition_world_size)


def pieces_rounded_to_the_models_format(plant: Plant) -> None:
    """Each micro-batch's sums over ranks are rounded as the parameters are before they are added up."""
    _pieces(plant, lambda piece, parameter: piece.to(parameter.dtype).float())


def micro_batches_overwritten(plant: Plant) -> None:
    """Each micro-batch's gradients take the place of those before, as DeepSpeed's of a step's first do."""
    honest = zero3.Zero3._wrap

    def overwriting(self: Any, *arguments: Any) -> Any:
        wrapper = honest(self, *arguments)
        wrapper.micro_step_id = 0
        return wrapper

    plant(zero3.Zero3, "_wrap", overwriting)


def pieces_of_the_rank_before(plant: Plant) -> None:
    """A rank's piece of a parameter is taken for another's."""
    honest = zero3.Zero3._slices

    def moved(self: Any, specs: Any) -> Iterator[zero12.FlatSlice]:
        for one in honest(self, specs):
            size = one.stop - one.start
            start = one.start - size if one.start else size
            yield dataclasses.replace(one, start=start, stop=start + size)

    plant(zero3.Zero3, "_slices", moved)


def whole_copies_of_the_old_weights(plant: Plant) -> None:
    """Small parameters, which stay whole, are not gathered anew after a step."""
    honest = zero3.Zero3.spread

    def keeping(self: Any) -> None:
        kept = {parameter: parameter.data.clone() for parameter in self.names if parameter.numel()}
        honest(self)
        for parameter, old in kept.items():
            parameter.data.copy_(old)

    plant(zero3.Zero3, "spread", keeping)


def _pieces(plant: Plant, change: Callable[[Any, Any], Any]) -> None:
    honest = zero3.Zero3._sum_and_scatter

    def changed(self: Any, parameters: Any, format: Any) -> Any:
        found = honest(self, parameters, format)
        return [change(piece, parameter) for piece, parameter in zip(found, parameters, strict=True)]

    plant(zero3.Zero3, "_sum_and_scatter", changed)


_SLICE_OF = zero12.FlatSlice.of


def _deepspeed(plant: Plant, **changed: Any) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    honest = stage_1_and_2.DeepSpeedZeroOptimizer
    plant(stage_1_and_2, "DeepSpeedZeroOptimizer", lambda *args, **kwargs: honest(*args, **{**kwargs, **changed}))


MESHES: list[Any] = []
BUGS: dict[str, Callable[[Plant], None]] = {
    function.__name__: function
    for function in (
        tiles_across_experts,
        padding_that_is_not_zero,
        weights_quantised_before_they_are_whole,
        missing_reduction,
        doubled_divide,
        experts_left_out_of_the_norm,
        balancing_term_dropped,
        bias_from_local_counts,
        expert_gradients_over_the_wrong_group,
        gains_not_reduced,
        no_gradient_without_tokens,
        gains_not_reduced_beside_experts,
        moments_lost_on_the_way,
        evaluation_of_one_rank,
        shards_made_orthogonal,
        positions_not_restarted,
        halo_off_by_one,
        loss_divided_by_cp,
        last_keys_of_the_ring_dropped,
        balancing_term_dropped_in_a_stage,
        norm_of_each_stage,
        tied_gradient_lost_between_stages,
        micro_batches_mixed_up,
        weights_put_off_for_ever,
        routers_saved_by_one_stage,
        averaged_by_deepspeed,
        summed_in_the_models_format,
        strings_shifted_by_one,
        copies_of_the_old_weights,
        experts_reduced_with_the_dense,
        averaged_in_buckets,
        pieces_rounded_to_the_models_format,
        micro_batches_overwritten,
        pieces_of_the_rank_before,
        whole_copies_of_the_old_weights,
    )
}
