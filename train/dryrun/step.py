"""Run one training step of this rank and record it: bytes by kind, collectives, launches and host synchronisations."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from data.loader import Batch
from model.load_balance import Balancer
from parallel.checks.counting import Counter
from parallel.checks.memory import OTHER, Memory, Peak
from parallel.checks.meta import META
from parallel.checks.recorder import Issued, Recorder, recording
from parallel.fsdp import before_reductions
from parallel.sharding import local
from train.engine.base import LanguageEngine, optimizer_step
from train.optim.optimizer import prime

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "parameters", "gradients", "optimizer", OTHER
UNREDUCED = "whole gradients"
"""Gradients that FSDP2 has not reduced to shards yet."""
GATHERED = "gathered parameters"
BUFFERS = "communication buffers"
"""What FSDP2's collectives read and write: copies of shards and of gradients."""
ROUTERS = "buffers"
"""The model's own buffers: the state of its routers."""
UPDATE = "update"


@dataclass(frozen=True)
class StepRecord:
    """What a rank did in a step. `parameters`, `gradients` and `optimizer`: bytes of its shards, without padding.

    `peak`: of all tensors; `activations`: of those that are none of the other kinds. `traffic`: bytes handed to
    collectives, by axis and purpose. `launches` and `syncs`, by operation: on meta tensors only.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: Peak
    activations: Peak
    issued: list[Issued]
    traffic: dict[tuple[str, str], int]
    races: list[str]
    launches: Counts[str]
    syncs: Counts[str]


def record_step(
    engine: LanguageEngine,
    batch: Batch,
    micro_batch_size: int,
    clip_norm: float | None = None,
    factor: float = 1.0,
    read: Callable[[Tensor], Tensor] | None = None,
) -> StepRecord:
    """Train on this rank's sequences of a batch and record it. The optimizer's state exists before the step, as in any
    but the first one. `read`: returns values of meta tensors to the host: `MetaDevice.read`.
    """
    placed, optimizer, meshes = engine.placed, engine.optimizer, engine.meshes  # type: ignore[attr-defined]
    model, device = placed.model, placed.device.type
    gradients: list[Tensor] = []

    def before_clipping() -> None:
        gradients.extend(one.values for one in engine.gradients())
        memory.label(gradients, GRADIENTS)
        memory.mark(UPDATE)
        found[GRADIENTS] = _bytes(gradients)
        gradients.clear()

    prime(optimizer)
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    found = {PARAMETERS: _bytes(model.parameters()), OPTIMIZER: _bytes(states)}
    with ExitStack() as stack:
        recorder = stack.enter_context(recording(device))
        memory = stack.enter_context(Memory(device, lambda: _kind(recorder)).following())
        memory.label(model.parameters(), PARAMETERS)
        memory.label(model.buffers(), ROUTERS)
        memory.label(states, OPTIMIZER)
        memory.mark("forward and backward")
        before_reductions(placed.stacks.values(), lambda whole: memory.label(whole, UNREDUCED))
        counter = stack.enter_context(Counter(read, memory))
        meshes.traffic.take()
        balancer = Balancer(model, lambda counts: meshes.world.sum(counts, "balance"))
        optimizer_step(engine, balancer, batch, micro_batch_size, clip_norm, factor, before_clipping)
    return StepRecord(
        **{key: found[key] for key in (PARAMETERS, GRADIENTS, OPTIMIZER)},
        peak=memory.highest(),
        activations=memory.highest(ACTIVATIONS),
        issued=recorder.issued,
        traffic=meshes.traffic.take(),
        races=[str(race) for race in recorder.machine.races],
        launches=counter.launches if device == META.type else Counts(),
        syncs=counter.syncs if device == META.type else Counts(),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(x).nbytes for x in tensors)


def _kind(recorder: Recorder) -> str:
    """Return what a storage is for that is allocated now, from what FSDP2 is doing."""
    if recorder.label.startswith("FSDP::all_gather_copy_out"):
        return GATHERED
    return BUFFERS if recorder.label.startswith(("FSDP::all_gather", "FSDP::post_backward_reduce")) else ACTIVATIONS
