"""The race checker finds planted bugs of streams and memory, and none in the code as it is.

Two ranks' FSDP2 runs in this process, on a process group that sends nothing.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import ReduceScatterState

from model.config import BalanceConfig
from parallel import fsdp
from parallel.checks.recorder import Recorder, recording
from parallel.checks.streams import Machine, Race, Stream
from parallel.comm.collectives import ring_shift
from parallel.layout import ParallelConfig, Reduce, ReduceEvery
from parallel.parallelize import build
from precision.config import Compute, PrecisionConfig
from tests.parallel.checks.fake_ranks import playing
from tests.support.models import small
from tests.support.tiny import synthetic
from train.optim.config import OptimizerConfig

BF16 = PrecisionConfig(Compute.bfloat16)


def races(parallel: ParallelConfig, count: int = 2, micro_batch_size: int = 2, steps: int = 1) -> list[Race]:
    """Return the races in training steps of a small model with two layers, of which one is an MoE layer."""
    with playing(0, parallel, count) as meshes, recording() as recorder:
        model = small(num_layers=2, balance=BalanceConfig())
        placed = build(model, BF16, meshes, torch.device("cpu"), seed=0)
        _, _, step = synthetic(placed, OptimizerConfig(lr=1e-2), micro_batch_size)
        for _ in range(steps):
            step()
    return recorder.machine.races


@pytest.mark.parametrize(
    "parallel, count",
    [
        (ParallelConfig(), 2),
        (ParallelConfig(dp_replicate=2), 4),
        pytest.param(ParallelConfig(reduce_every=ReduceEvery.step), 2, marks=pytest.mark.slow),
        pytest.param(ParallelConfig(dp_replicate=2, reduce_dtype=Reduce.bfloat16), 4, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "hsdp", "reduced per step", "hsdp in bfloat16"],
)
def test_training_steps_have_no_race(parallel, count):
    assert races(parallel, count, micro_batch_size=1, steps=2) == []


def lifetimes(monkeypatch: pytest.MonkeyPatch, count: Any) -> list[str]:
    """Return the allocations and releases of memory in a step, in order, with a function that counts traffic."""
    found: list[str] = []

    def noted(name: str) -> Any:
        honest = getattr(Machine, name)

        def note(machine: Machine, *block: Any) -> Any:
            found.append(f"{name} on {machine.current.name}")
            return honest(machine, *block)

        return note

    with monkeypatch.context() as patch:
        patch.setattr(fsdp, "count_traffic", count)
        patch.setattr(Machine, "allocate", noted("allocate"))
        patch.setattr(Machine, "free", noted("free"))
        gc.disable()
        try:
            assert races(ParallelConfig()) == []
        finally:
            gc.enable()
    return found


def held(roots: Any, meshes: Any) -> None:
    """Keep the input of the last reduction during the next one."""
    for _, group in (pair for root in roots for pair in fsdp.units(root) if pair[1] is not None):

        def post_backward(group: Any = group, honest: Any = group.post_backward) -> None:
            last = group.comm_ctx.reduce_scatter_states[-1:]
            honest()
            del last

        group.post_backward = post_backward


def test_counting_changes_no_lifetime(monkeypatch):
    plain = lifetimes(monkeypatch, lambda roots, meshes: None)
    assert len(plain) > 100 and lifetimes(monkeypatch, fsdp.count_traffic) == plain
    assert lifetimes(monkeypatch, held) != plain, "the control"


def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the byte counter that Leviathan had: an all-reduce hook, after which torch works on another stream."""
    honest = fsdp.count_traffic

    def count(roots: Any, meshes: Any) -> None:
        honest(roots, meshes)
        for root in roots:
            for unit, _ in fsdp.units(root):
                unit.set_all_reduce_hook(lambda shard: None)

    monkeypatch.setattr(fsdp, "count_traffic", count)


@pytest.mark.parametrize("reduce, size, operation", [(Reduce.master, 2, "add_"), (Reduce.bfloat16, 4, "_to_copy")])
def test_an_all_reduce_hook_races(monkeypatch, reduce, size, operation):
    """From the second micro-batch on, or at once if the reduced gradient is cast: torch 2.13, _fsdp_collectives.py."""
    hooked(monkeypatch)
    found = races(ParallelConfig(reduce_dtype=reduce), micro_batch_size=size)
    assert found and {one.first_stream for one in found} == {"all_reduce_stream"}
    assert all(one.reused and one.first.endswith(operation) for one in found), found
    assert {one.second_stream for one in found} == {"reduce_scatter_stream"}


def test_a_missing_wait_before_a_reused_buffer_races(monkeypatch):
    """The input of a reduce-scatter is freed before the reduce-scatter has read it."""
    forgotten = lambda tensor, event: ReduceScatterState(tensor, None)  # noqa: E731
    monkeypatch.setattr(_fsdp_param_group, "ReduceScatterState", forgotten)
    found = races(ParallelConfig())
    assert any(one.reused and one.first.endswith("reduce_scatter_base") for one in found), found


def shifted(meshes: Any) -> None:
    """Exchange the output of a product and use what arrives."""
    x = torch.ones(4, 4, requires_grad=True)
    arrived = ring_shift((x @ x).detach(), meshes.dp, "ring")
    (x + 1).sum()  # work that hides the exchange
    arrived().sum()


@pytest.mark.parametrize("waits", [True, False])
def test_an_async_exchange_read_before_its_event_races(monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(Recorder, "waited", lambda recorder, work: None)
    with playing(0, ParallelConfig(), 2) as meshes, recording() as recorder:
        shifted(meshes)
    assert [one.second for one in recorder.machine.races] == ([] if waits else ["sum"])


@pytest.mark.parametrize("bug", [None, "no wait", "early event", "freed"])
def test_the_model_orders_streams_as_cuda_does(bug):
    machine = Machine()
    side = Stream(machine, "side")
    with machine.on(side):
        early = side.record_event()
        machine.launch()
        block = machine.allocate()
        machine.write(block, "copy")
        event = early if bug == "early event" else side.record_event()
    if bug != "no wait":
        machine.current.wait_event(event)
    machine.launch()
    machine.read(block, "matmul")
    if bug != "freed":
        block.shared.add(machine.default)
    machine.free(block)
    with machine.on(side):
        machine.launch()
        machine.write(machine.allocate(), "next copy")
    wanted = {
        None: [],
        "no wait": [("copy", "matmul", False)],
        "early event": [("copy", "matmul", False)],
        "freed": [("matmul", "next copy", True)],
    }
    assert [(one.first, one.second, one.reused) for one in machine.races] == wanted[bug]


def test_a_synchronised_host_orders_everything_after_it():
    machine = Machine()
    side = Stream(machine, "side")
    block = machine.allocate()
    with machine.on(side):
        machine.launch()
        machine.write(block, "copy")
    side.synchronize()
    machine.launch()
    machine.read(block, "matmul")
    assert machine.races == []


def test_recording_leaves_torch_as_it_was():
    before = torch.cpu.Stream, Work.wait, torch.Tensor.tolist, dist.batch_isend_irecv, torch.UntypedStorage.resize_
    with recording():
        assert torch.cpu.Stream is not before[0]
    after = torch.cpu.Stream, Work.wait, torch.Tensor.tolist, dist.batch_isend_irecv, torch.UntypedStorage.resize_
    assert before == after
