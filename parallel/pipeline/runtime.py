"""Pipeline parallelism: stages of layers on different ranks, through which micro-batches pass.

torch.distributed.pipelining provides the schedules and runs them. This file splits the model, states the shapes that
are sent, and gives each stage the `ForwardContext` of a micro-batch. That context is not sent: every rank computes it
from the positions. Losses are sums divided by global counts, so gradients are added and never scaled.

Shapes: B sequences of a micro-batch, T tokens of a sequence on this rank, after the context-parallel split, D hidden
size, V this rank's part of the vocabulary. Between stages the sequence is also split over tp: T / tp.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from model.attention.plan import ForwardContext
from model.layers import Embedding
from model.transformer import Stack, Transformer
from parallel.layout import Layout
from parallel.mesh import MeshAxis, Meshes
from parallel.pipeline import deferred_wgrad
from parallel.pipeline.deferred_wgrad import Deferred
from parallel.pipeline.stages import PipelineSchedule, Stages
from precision.gemm import at_least_float32

SCHEDULES: dict[PipelineSchedule, Any] = {
    PipelineSchedule.gpipe: pipelining.ScheduleGPipe,
    PipelineSchedule.one_f_one_b: pipelining.Schedule1F1B,
    PipelineSchedule.interleaved: pipelining.ScheduleInterleaved1F1B,
    PipelineSchedule.interleaved_zero_bubble: pipelining.ScheduleInterleavedZeroBubble,
    PipelineSchedule.zbv: pipelining.ScheduleZBVZeroBubble,
    PipelineSchedule.dualpipev: pipelining.ScheduleDualPipeV,
}

Loss = Callable[[Tensor], Tensor]


class StageStack(Stack):
    """One pipeline stage. Micro-batches come in order, and each takes the next of `contexts`."""

    contexts: deque[ForwardContext]
    table: Embedding | None = None
    """On the last stage, a copy of the tied embedding. The head uses its weight; the stage does not run it."""

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        y = super().forward(x, context or self.contexts.popleft())
        # torch's schedules send a gradient to every stage, also to one whose parameters are frozen
        return y.requires_grad_() if torch.is_grad_enabled() and not y.requires_grad else y


def split_stages(model: Transformer, meshes: Meshes) -> dict[int, Stack]:
    """Remove the layers of other ranks from a model on the meta device. Return the rest as stacks, by stage."""
    if meshes.layout.pp == 1:
        return {0: model}
    plan = meshes.layout.stages(model.config)
    here, last = plan.of(meshes.pp.rank), len(plan) - 1
    kept = {str(layer) for stage in here for layer in plan.layers[stage]}
    for name in list(model.layers):
        if name not in kept:
            del model.layers[name]
    shares_table = model.config.tie_embeddings and last in here
    if 0 not in here and not shares_table:
        model.embedding = None
    ahead = meshes.layout.encodes_ahead
    if 0 not in here and not ahead:
        model.vision = None
    if last not in here:
        model.final_norm = model.head = None
    layers: Any = model.layers
    stacks: dict[int, Any] = {
        stage: StageStack(
            model.embedding if stage == 0 else None,
            {str(layer): layers[str(layer)] for layer in plan.layers[stage]},
            model.final_norm if stage == last else None,
            model.head if stage == last else None,
            model.vision if stage == 0 and not ahead else None,
        )
        for stage in here
    }
    if shares_table:
        stacks[last].table = model.embedding
    return stacks


class Pipeline:
    _loss: Loss
    """The loss of the current step. Schedules are made once for all steps and call it."""

    def __init__(self, model: Transformer, stacks: dict[int, Stack], meshes: Meshes, device: torch.device) -> None:
        self.model, self.stacks, self.meshes, self.device = model, stacks, meshes, device
        self.plan = meshes.layout.stages(model.config)
        self.has_head = len(self.plan) - 1 in stacks
        self.deferred: dict[int, Deferred] = {}
        if meshes.layout.schedule.splits_backward:
            self.deferred = {number: deferred_wgrad.apply(stack) for number, stack in stacks.items()}
        self._schedules: dict[tuple[int, int, int], Any] = {}

    def forward_backward(self, tokens_BT: Tensor, contexts: Sequence[ForwardContext], loss: Loss) -> Tensor:
        """Compute the gradients of all micro-batches, one for each of `contexts`, which have the labels. Returns the
        sum of their `loss` (of the losses of tokens), a scalar on the device: zero if another rank has the head.
        """
        key = (len(contexts), len(tokens_BT) // len(contexts), tokens_BT.shape[1])
        if key not in self._schedules:
            self._schedules[key] = self._make(*key)
        self._loss = loss
        _set_contexts(self.stacks, contexts)
        losses: list[Tensor] = []
        inputs = (tokens_BT,) if 0 in self.stacks else ()
        target = tokens_BT if self.has_head else None  # torch's schedules call the loss only with a target
        self._schedules[key].step(*inputs, target=target, losses=losses, return_outputs=False)
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([one.detach() for one in losses]).sum(dtype=torch.float64)

    def _make(self, micro_batches: int, size: int, length: int) -> Any:
        """Make the schedule for micro-batches of this shape. Stages are given their shapes: torch would infer missing
        shapes by running the model, and the routers would count the dummy tokens.
        """
        layout = self.meshes.layout
        hidden = hidden_states(self.model, layout, size, length)
        tokens = torch.empty(size, length, dtype=torch.int64, device="meta")
        wide = at_least_float32(hidden.dtype)
        losses = torch.empty(size, length, dtype=wide, device="meta", requires_grad=True)
        stages = [
            _CountedStage(
                stack,
                number,
                len(self.plan),
                self.device,
                input_args=tokens if number == 0 else hidden,
                output_args=losses if number == len(self.plan) - 1 else hidden,
                group=self.meshes.pp.group,
                dw_builder=self.deferred[number].take if number in self.deferred else None,
            )
            for number, stack in self.stacks.items()
        ]
        for stage in stages:
            stage.axis = self.meshes.pp
        single = layout.schedule.is_single
        made = SCHEDULES[layout.schedule](
            stages[0] if single else stages,
            n_microbatches=micro_batches,
            loss_fn=lambda output, target: self._loss(output),
            scale_grads=False,
        )
        if not single:
            made.pipeline_order_with_comms = {
                rank: _gathered_once(actions) for rank, actions in made.pipeline_order_with_comms.items()
            }
        return made


def _gathered_once(actions: list[Any]) -> list[Any]:
    """Return a rank's actions so that each stage's parameters are gathered once, before its first action, and dropped
    once, after its last. torch's schedule keeps three stages gathered, and drops and gathers the others repeatedly.
    """
    kinds = [action.computation_type.value for action in actions]
    first = {a.stage_index: i for i, a in reversed(list(enumerate(actions))) if kinds[i] == "UNSHARD"}
    last = {a.stage_index: i for i, a in enumerate(actions) if kinds[i] == "RESHARD"}
    edges = {*first.values(), *last.values()}
    return [a for i, a in enumerate(actions) if kinds[i] not in ("UNSHARD", "RESHARD") or i in edges]


class _CountedStage(PipelineStage):
    """torch's `PipelineStage`, which also counts the bytes that it sends and reports its waits to the watchdog."""

    axis: MeshAxis

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id), "activations")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id), "gradients")

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.axis.wait("activations")
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self.axis.wait("gradients")
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _counted(self, operations: list[dist.P2POp], purpose: str) -> list[dist.P2POp]:
        for operation in operations:
            self.axis.send(purpose, operation.tensor)
        return operations


@torch.no_grad()
def forward(
    stacks: dict[int, Stack], model: Transformer, meshes: Meshes, tokens_BT: Tensor, context: ForwardContext
) -> Tensor | None:
    """Run one micro-batch through all stages without a backward pass. Returns the logits, or None if another rank has
    the head. Works for any schedule: each rank runs its stages from the first to the last.
    """
    plan, axis = meshes.layout.stages(model.config), meshes.pp
    _set_contexts(stacks, [context])
    x = tokens_BT
    for number, stack in stacks.items():
        before, after = _neighbours(plan, number, axis)
        if before is not None:
            x = torch.empty_like(hidden_states(model, meshes.layout, *tokens_BT.shape), device=tokens_BT.device)
            axis.wait("evaluation")
            dist.recv(x, group=axis.group, group_src=before)
        x = stack(x)
        if after is not None:
            axis.send("evaluation", x)
            dist.send(x.contiguous(), group=axis.group, group_dst=after)
    return x if len(plan) - 1 in stacks else None


def hidden_states(model: Transformer, layout: Layout, size: int, length: int) -> Tensor:
    """Return a meta tensor with the shape and dtype that one stage sends to the next: [B, T / tp, D]."""
    shape = (size, length // layout.tp, model.config.hidden_size)
    return torch.empty(shape, dtype=model.compute_dtype, device="meta", requires_grad=True)


def _neighbours(plan: Stages, stage: int, axis: MeshAxis) -> tuple[int | None, int | None]:
    """Return the ranks that a stage receives from and sends to. None where the neighbouring stage is on this rank,
    and at the ends of the pipeline.
    """
    before = plan.owners[stage - 1] if stage else axis.rank
    after = plan.owners[stage + 1] if stage + 1 < len(plan) else axis.rank
    return (None if before == axis.rank else before), (None if after == axis.rank else after)


def _set_contexts(stacks: dict[int, Stack], contexts: Sequence[ForwardContext]) -> None:
    for stack in stacks.values():
        assert isinstance(stack, StageStack)
        stack.contexts = deque(contexts)
