"""Known bugs of layouts, to be planted in rank processes.

A bug is a function that is called in place of the original function, which is its first argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.images.batch import BatchImages
from model import moe
from model.config import WeightsOn
from model.kernels import TorchKernels
from model.transformer import Stack
from model.vision.encoder import VisionEncoder
from model.vision.fusion import Images
from parallel import context_parallel, expert_parallel, fsdp, parallelize, whole_matrices
from parallel.comm import collectives
from parallel.context_parallel import ContextShard, RingPlan, ShardedContext
from parallel.deepspeed import zero3, zero12
from parallel.expert_parallel import AllToAll
from parallel.mesh import MeshAxis, Meshes
from parallel.pipeline import runtime
from parallel.pipeline.deferred_wgrad import Deferred
from parallel.sharding import local
from parallel.vision import exchange
from parallel.vision.ahead import EncodedStep
from parallel.vision.exchange import SpreadImages
from precision import fp8_tiles
from tests.support.fakes.deep_ep_buffer import Buffer
from train.certify import worker
from train.contrastive import loss as contrastive
from train.engine import fsdp as engine
from train.optim import muon, optimizer

BUGS: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {}
"""Bug -> what it replaces: the owner, its attribute, and the function that takes the attribute's place."""


def replaces(owner: Any, attribute: str) -> Callable[[Any], Any]:
    """Register the decorated function in `BUGS`, under its name."""

    def register(function: Any) -> Any:
        BUGS.setdefault(function.__name__, []).append((owner, attribute, function))
        return function

    return register


def bound(function: Callable[..., Any], honest: Any) -> Any:
    """Bind `honest` as the first argument. The result is a function, not a `partial`, so that it can be a method."""
    if isinstance(honest, property):
        return property(partial(function, honest.fget))
    return lambda *args, **options: function(honest, *args, **options)


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    """Plant one of `BUGS`, by name."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, function in BUGS[bug] if bug is not None else ():
            patch.setattr(owner, attribute, bound(function, getattr(owner, attribute)))
        yield


class BuggyRanks:
    """A pool of ranks that run with a bug if a call has more than one rank."""

    def __init__(self, ranks: Any, bug: str | None) -> None:
        self.ranks, self.bug = ranks, bug

    def __call__(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self.ranks(count, run_with_bug, self.bug if count > 1 else None, function, *arguments)


def run_with_bug(bug: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    with planted(bug):
        return function(*arguments)


# ----- FP8


@replaces(fp8_tiles.TiledArithmetic, "quantise")
def tiles_across_experts(honest, self, x, operand, groups, rows, columns):
    """Tokens of several experts share the tiles of FP8 scales."""
    found = honest(self, x, operand, groups, rows, columns)
    if groups is None or not columns:
        return found
    how, counts = fp8_tiles.tiling(self.recipe, operand), groups.host
    whole = fp8_tiles.quantise(x[: sum(counts)].mT, how).dequantise(torch.float32).split(counts, dim=1)
    return dataclasses.replace(found, columns=tuple(fp8_tiles.quantise(part, how) for part in whole))


@replaces(TorchKernels, "spread")
def padding_that_is_not_zero(honest, self, x, slots, *rest):
    """Padding rows repeat some token, so that they affect the scales."""
    return honest(self, x, slots._replace(is_padding_C1=None), *rest)


@replaces(fp8_tiles, "tiling")
def weights_quantised_before_they_are_whole(honest, recipe, operand):
    """Scales of a weight are computed per shard of 48 columns, which splits tiles."""
    how = honest(recipe, operand)
    return dataclasses.replace(how, columns=48) if operand is fp8_tiles.Operand.weight else how


# ----- data, tensor and expert parallelism


@replaces(collectives, "all_gather")
def missing_reduction(honest, shard, axis, dim, purpose):
    """The backward pass of the sequence gather keeps the local part of the gradient instead of the sum over ranks."""
    there = lambda x: collectives.all_gather_no_grad(x, axis, dim, purpose)  # noqa: E731
    back = lambda grad: grad.chunk(axis.size, dim)[axis.rank].contiguous()  # noqa: E731
    return shard if axis.size == 1 else collectives._Collective.apply(shard, there, back)


@replaces(fsdp, "count_traffic")
def gradients_counted_by_a_hook(honest, roots, meshes):
    """With an all-reduce hook, torch works on another stream after a reduction: the gradients are right on a CPU."""
    honest(roots, meshes)
    for root in roots:
        for unit, _ in fsdp.units(root):
            unit.set_all_reduce_hook(lambda shard: None)


@replaces(engine, "reduce_within_step")
def sums_of_earlier_micro_batches_dropped(honest, module, layout, last):
    """Keep the gradients of the last micro-batch only."""
    honest(module, layout, last)
    for _, group in fsdp.units(module) if last else ():
        if group is not None:
            group._partial_reduce_output = None
        for parameter in group.fsdp_params if group is not None else ():
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


@replaces(fsdp, "_gather_ahead")
def layers_gathered_when_they_run(honest, stack):
    pass


@replaces(fsdp.FSDPModule, "set_gradient_divide_factor")
@replaces(fsdp.FSDPModule, "set_force_sum_reduction_for_comms")
def doubled_divide(honest, self, value):
    """FSDP2 divides gradients by the number of ranks, as it does by default."""


@replaces(engine, "gradient_norm")
def experts_left_out_of_the_norm(honest, gradients, *rest):
    """The norm has only the experts of the first ep rank, as if it were summed over data parallel ranks only."""
    later = lambda one: any(split.axis.name == "ep" and split.axis.rank for split in one.spec.splits)  # noqa: E731
    return honest((one for one in gradients if not later(one)), *rest)


@replaces(AllToAll, "_copies")
def token_sent_twice(honest, self, ranks_TK):
    """A token is sent for each of its experts on a rank, and each copy is computed with all of them."""
    return moe.permute_by_expert(ranks_TK, self.axis.size + 1)


@replaces(AllToAll, "_slots")
def token_sent_twice(honest, self, experts_TK):  # noqa: F811
    ranks_TK = experts_TK // self.local_experts
    times_TK = (ranks_TK[:, :, None] == ranks_TK[:, None, :]).sum(-1)
    rows_NE = torch.zeros_like(honest(self, experts_TK)).flatten()
    return rows_NE.scatter_add_(0, experts_TK.flatten(), times_TK.flatten()).view(self.axis.size, -1)


@replaces(AllToAll, "__call__")
def token_sent_once_per_expert(honest, self, x_TD, choice):
    """This is no bug: a token travels as often as it has experts."""
    return self._by_slot(x_TD, self.virtual(choice))


@replaces(AllToAll, "__call__")
def weights_on_the_wrong_side(honest, self, *arguments):
    """Routing weights are applied before the experts instead of after them."""
    return honest(dataclasses.replace(self, weights_on=WeightsOn.input), *arguments)


@replaces(AllToAll, "_copies")
def sums_lost_beside_an_idle_rank(honest, self, ranks_TK):
    """Sums of the ranks after the first one that gets no token are not added."""
    copies = honest(self, ranks_TK)
    sent = copies.groups.host[: self.axis.size]
    before = sum(sent[: sent.index(0)] if 0 in sent else sent)
    return copies._replace(place_TK=copies.place_TK.where(copies.place_TK < before, len(copies.source_C)))


@replaces(AllToAll, "_by_rank")
def weights_without_gradient(honest, self, x_TD, routing):
    """Gradients of routing weights are not sent back."""
    return honest(self, x_TD, moe.TopKRouting(routing.experts_TK, routing.weights_TK.detach()))


@replaces(expert_parallel, "_after")
def event_not_waited_for(honest, event, *tensors):
    """What DeepEP's kernels write is read before they are done."""
    return lambda: tensors


@replaces(Buffer, "dispatch")
def counts_of_deepep_not_aligned(honest, self, *arguments, expert_alignment=1, **options):
    return honest(self, *arguments, **options)


@replaces(parallelize, "_count_whole_sequences")
def balancing_term_dropped(honest, model, meshes):
    """If sequences are split over ranks, each rank balances only its own part."""


@replaces(MeshAxis, "sum")
def bias_from_local_counts(honest, self, tensor, purpose):
    if not (self.name == "world" and purpose == "balance" and tensor.dtype is torch.int64):
        honest(self, tensor, purpose)


@replaces(engine.TorchEngine, "complete_gradients")
def expert_gradients_over_the_wrong_group(honest, self):
    """Gradients of experts are averaged over ranks that hold different experts."""
    honest(self)
    for parameter in _split_by_ep(self.placed):
        group, gradient = self.meshes.experts, local(parameter.grad)
        dist.all_reduce(gradient, group=group.group)
        gradient /= group.size


@replaces(engine, "sum_partial_gradients")
def gains_not_reduced(honest, model, specs):
    """Each tp rank keeps its own partial gradient of parameters that all tp ranks hold whole."""


@replaces(engine.TorchEngine, "complete_gradients")
def no_gradient_without_tokens(honest, self):
    """If no token reaches the experts of a rank, their gradients are None."""
    honest(self)
    for parameter in _split_by_ep(self.placed):
        if not local(parameter.grad).any():
            parameter.grad = None


@replaces(engine.TorchEngine, "complete_gradients")
def gains_not_reduced_beside_experts(honest, self):
    """Under ep, partial gradients are not summed. This is wrong only if the model is split by tp as well."""
    if not _split_by_ep(self.placed):
        honest(self)


def _split_by_ep(placed: Any) -> list[Any]:
    named = placed.model.named_parameters()
    return [parameter for name, parameter in named if any(s.axis.name == "ep" for s in placed.specs[name].splits)]


@replaces(worker.Checkpointer, "restore")
def moments_lost_on_the_way(honest, self, state):
    """A resumed run begins with zeros as the experts' second moments or Muon's momentum."""
    progress = honest(self, state)
    for part in state:
        if ".experts." in part.name and part.name.endswith(("exp_avg_sq", "momentum")):
            part.tensor.zero_()
    return progress


@replaces(worker, "held_out_loss")
def evaluation_of_one_rank(honest, *arguments):
    found = honest(*arguments)
    return dataclasses.replace(found, loss=found.loss * (1 + 1e-6))


# ----- Muon


@replaces(optimizer, "rounds")
def one_matrix_at_a_time(honest, specs, meshes):
    """This is no bug: the plan gathers one matrix at a time, which takes the least memory."""
    return honest(specs, meshes, 1)


@replaces(optimizer, "rounds")
def shards_made_orthogonal(honest, *arguments):
    """Each shard of a matrix is orthogonalised by itself, on the rank that keeps it."""
    return [dataclasses.replace(one, stages=()) for one in honest(*arguments)]


@replaces(optimizer, "rounds")
def factor_of_the_shard(honest, specs, meshes):
    """The factor of `MuonScale` is computed from the shape of a tp shard instead of the whole matrix."""
    shapes = {name: spec.compute_block.shape[-2:] for name, spec in specs.items()}
    return [dataclasses.replace(one, shape=shapes[one.ranges[0].name]) for one in honest(specs, meshes)]


@replaces(muon, "orthogonalise")
def experts_mixed(honest, x, *rest):
    """A stack of matrices is orthogonalised as one tall matrix."""
    return honest(x.flatten(0, 1)[None], *rest).view_as(x)


@replaces(whole_matrices.Round, "scatter")
def swapped_on_the_way_back(honest, self, whole):
    return honest(self, whole.flip(0))


@replaces(muon.Muon, "step")
def momentum_of_a_step(honest, self, *rest):
    for parameter in self.parameters.values():
        self.state.pop(parameter, None)
    honest(self, *rest)


# ----- context parallelism


@replaces(ContextShard, "sequence_context")
def positions_not_restarted(honest, self, positions_BT, *arguments):
    """Context-parallel shards use positions in the sequence instead of positions in documents."""
    if self.axis.size > 1:
        positions_BT = torch.arange(positions_BT.shape[1]).expand(positions_BT.shape)
    return honest(self, positions_BT, *arguments)


@replaces(context_parallel, "_halo")
def halo_off_by_one(honest, *arguments):
    return honest(*arguments).roll(1, dims=2)


@replaces(Meshes, "counts_tokens")
def loss_divided_by_cp(honest, self):
    return honest(self) * self.cp.size


@replaces(ShardedContext, "_full_plan")
def last_keys_of_the_ring_dropped(honest, self, rows):
    """The ring ends one hop early, without the last keys."""
    plan = honest(self, rows)
    assert isinstance(plan, RingPlan)
    return dataclasses.replace(plan, rounds=(*plan.rounds[:-1], []))


# ----- pipelines


@replaces(runtime, "split_stages")
def balancing_term_dropped_in_a_stage(honest, model, meshes):
    stacks = honest(model, meshes)
    for stage, stack in stacks.items():
        for layer in stack.layers.values():
            if stage and isinstance(layer.ffn, moe.MixtureOfExperts):
                balance = layer.ffn.router.balance
                balance.config = dataclasses.replace(balance.config, aux=0.0)
    return stacks


@replaces(engine.TorchEngine, "norm")
def norm_of_each_stage(honest, self):
    alone = self.meshes.layout.world_size == self.meshes.layout.pp  # else other ranks would be left out
    return engine.gradient_norm(self.gradients(), MeshAxis("world") if alone else self.meshes.world, self.device)


@replaces(engine, "sum_partial_gradients")
def tied_gradient_lost_between_stages(honest, model, specs):
    """Each end of the pipeline keeps its own gradient of tied embeddings."""

    def apart(spec: Any) -> Any:
        return dataclasses.replace(spec, partial=tuple(axis for axis in spec.partial if axis.name != "ends"))

    honest(model, {name: apart(spec) for name, spec in specs.items()})


@replaces(runtime, "_set_contexts")
def micro_batches_mixed_up(honest, stacks, contexts):
    """Hidden states meet the positions and documents of another micro-batch."""
    honest(stacks, list(reversed(contexts)))


@replaces(Deferred, "take")
def weights_put_off_for_ever(honest, self):
    """The last deferred matmul of a micro-batch is never computed."""
    self._waiting = self._waiting[:-1]
    return honest(self)


@replaces(Meshes, "is_first_of_stage")
def routers_saved_by_one_stage(honest, self):
    return self.world.rank == 0


# ----- vision


@replaces(Stack, "_embed")
def encoder_skipped_without_images(honest, self, tokens_BT, embedding, context):
    """A rank whose micro-batch has no tile for it does not run the encoder."""
    if context.images is None or not len(context.images.tiles_N3SS):
        return embedding(tokens_BT)
    return honest(self, tokens_BT, embedding, context)


@replaces(engine.TorchEngine, "complete_gradients")
def scaled_by_participation(honest, self):
    """The encoder's gradients are multiplied by the number of ranks over the number of ranks with images."""
    honest(self)
    for name, parameter in self.placed.model.named_parameters():
        if self.placed.specs[name].info.role.is_vision:
            local(parameter.grad).mul_(2)  # images are on one of two ranks


@replaces(SpreadImages, "encode")
def rows_placed_before_the_scatter(honest, self, encoder):
    """Each tp rank places the rows among its partial embeddings, whose sum has them tp times."""
    return honest(self, encoder) * self.axis.size


@replaces(SpreadImages, "encode")
def tiles_on_two_ranks(honest, self, encoder):
    """Two ranks encode what the first rank shows, and both add its gradient."""
    rows_MD = honest(self, encoder)
    if self.axis.rank == 0 and rows_MD.requires_grad:
        rows_MD.register_hook(lambda gradient: gradient * 2)
    return rows_MD


@replaces(Images, "encode")
def tiles_in_reverse_order(honest, self, encoder):
    return honest(dataclasses.replace(self, tiles_N3SS=self.tiles_N3SS.flip(0)), encoder)


@replaces(VisionEncoder, "forward")
def class_token_first(honest, self, tiles_N3SS):
    """The class token precedes the patches, and the last patch is dropped in its place."""
    hook = self.first_norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].roll(1, dims=1),))
    try:
        return honest(self, tiles_N3SS)
    finally:
        hook.remove()


@replaces(worker.SyntheticLoader, "batch")
def text_after_pictures_not_learnt(honest, self, *arguments):
    """The token after a picture is not predicted."""
    batch = honest(self, *arguments)
    if batch.images is not None:
        rows_BT = batch.images.rows_BT
        batch.labels_BT[:, :-1][(rows_BT[:, :-1] >= 0) & (rows_BT[:, 1:] < 0)] = worker.IGNORED
    return batch


@replaces(exchange, "_share")
def shares_that_overlap(honest, tiles, size, rank):
    """A rank encodes the first tile of the next rank as well."""
    share = honest(tiles, size, rank)
    return range(share.start, min(share.stop + 1, tiles))


@replaces(SpreadImages, "deliver")
def tiles_of_later_stages_lost(honest, self, rows_MD):
    """Only the first stage's tiles reach the positions that show them."""
    return honest(self, rows_MD if self.axis.rank < self.axis.size // 2 else rows_MD * 0)


@replaces(engine, "sum_partial_gradients")
def encoder_summed_over_stages_twice(honest, model, specs):
    honest(model, specs)
    over_pp = lambda spec: tuple(axis for axis in spec.partial if axis.name == "pp")  # noqa: E731
    honest(model, {name: dataclasses.replace(spec, partial=over_pp(spec)) for name, spec in specs.items()})


@replaces(engine, "sum_partial_gradients")
def encoder_not_summed_over_stages(honest, model, specs):
    others = lambda spec: tuple(axis for axis in spec.partial if axis.name != "pp")  # noqa: E731
    honest(model, {name: dataclasses.replace(spec, partial=others(spec)) for name, spec in specs.items()})


@replaces(BatchImages, "interleaved")
def images_of_another_micro_batch(honest, self, ranks, micro_batch_size, rank):
    """The sequences of one rank follow those of another, although micro-batches take some of each."""
    return honest(self, ranks, len(self.tiles) // ranks, rank)


@replaces(EncodedStep, "backward")
def encoder_not_run_again(honest, self):
    """The second phase is forgotten."""


@replaces(worker, "build")
def frozen_roles_forgotten(honest, model, precision, meshes, device, seed, frozen):
    """All parameters are trained."""
    return honest(model, precision, meshes, device, seed)


@replaces(engine, "sum_partial_gradients")
def encoder_not_summed_over_tp(honest, model, specs):
    """Each tp rank keeps the encoder's gradient from its own tiles."""
    apart = {name: dataclasses.replace(s, partial=()) if s.info.role.is_vision else s for name, s in specs.items()}
    honest(model, apart)


# ----- DeepSpeed


@replaces(zero12.Zero12, "_wrap")
def averaged_by_deepspeed(honest, self, *arguments):
    """DeepSpeed divides gradients by the number of ranks, as it does by default."""
    wrapper = honest(self, *arguments)
    wrapper.gradient_average = True
    return wrapper


@replaces(zero12.Zero12, "_wrap")
def summed_in_the_models_format(honest, self, *arguments):
    """DeepSpeed adds up the gradients of a bf16 model over micro-batches in bf16."""
    wrapper = honest(self, *arguments)
    for parameter in zero12._parameters(wrapper):
        parameter.grad_dtype = parameter.dtype
    return wrapper


@replaces(zero12.FlatSlice, "of")
def buffers_shifted_by_one(honest, self, buffer):
    return honest(self, buffer.roll(-1))


@replaces(zero12.Zero12, "spread")
def copies_of_the_old_weights(honest, self):
    """After a checkpoint is loaded the model still computes with its initial weights."""


@replaces(zero12.Zero12, "_wrap")
def experts_reduced_with_the_dense(honest, self, groups, make, axis):
    """Gradients of experts that differ from rank to rank are summed as if the experts were the same."""
    return honest(self, groups, make, "fsdp")


@replaces(zero3.Zero3, "_sum_and_scatter")
def averaged_in_buckets(honest, self, parameters, format):
    """Gradients are averaged over ranks, as in DeepSpeed's stage 3."""
    return [piece / self.meshes.fsdp.size for piece in honest(self, parameters, format)]


@replaces(zero3.Zero3, "_sum_and_scatter")
def shards_rounded_to_the_models_format(honest, self, parameters, format):
    """Each micro-batch's sums over ranks are rounded to the dtype of the parameters before they are added up."""
    found = zip(honest(self, parameters, format), parameters, strict=True)
    return [piece.to(parameter.dtype).float() for piece, parameter in found]


@replaces(zero3.Zero3, "_wrap")
def micro_batches_overwritten(honest, self, *arguments):
    """Each micro-batch's gradients overwrite the previous ones, as in DeepSpeed's first micro-batch of a step."""
    wrapper = honest(self, *arguments)
    wrapper.micro_step_id = 0
    return wrapper


@replaces(zero3.Zero3, "_slices")
def shards_of_the_rank_before(honest, self, specs):
    for one in honest(self, specs):
        size = one.stop - one.start
        start = one.start - size if one.start else size
        yield dataclasses.replace(one, start=start, stop=start + size)


@replaces(zero3.Zero3, "spread")
def whole_copies_of_the_old_weights(honest, self):
    """Small parameters, which stay whole, are not gathered again after a step."""
    kept = {parameter: parameter.data.clone() for parameter in self.names if parameter.numel()}
    honest(self)
    for parameter, old in kept.items():
        parameter.data.copy_(old)


@replaces(contrastive, "all_gather")
def features_gathered_without_gradient(honest, shard, *arguments):
    """Gathered features are constants, so those of a rank have a gradient in its own rows only."""
    return collectives.all_gather_no_grad(shard.detach(), *arguments) + 0 * shard.sum()
