"""All ranks collect garbage at the same steps, and a step leaves no tensor to be collected."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from bench.layouts import deep
from parallel.comm.world import connect
from parallel.layout import ParallelConfig, Recompute
from parallel.mesh import make_meshes
from parallel.parallelize import build
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.tiny import synthetic, trainer
from train.callbacks import evaluation
from train.engine.garbage import COLLECT_EVERY, collected_at_set_steps
from train.optim.config import OptimizerConfig


class Cycle:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self, held: Any = None) -> None:
        self.me, self.held = self, held


@pytest.fixture(autouse=True)
def enabled():
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_garbage_is_collected_at_set_steps_only():
    with collected_at_set_steps() as after_step:
        seen = weakref.ref(Cycle())
        for step in range(1, COLLECT_EVERY):
            after_step(step)
        objects = [[] for _ in range(10_000)]
        assert not gc.isenabled() and objects and seen() is not None
        after_step(COLLECT_EVERY)
        assert seen() is None


@pytest.mark.slow
def test_a_run_collects_at_set_steps_and_freely_in_pauses(tmp_path, small_corpus, monkeypatch):
    run = trainer(tmp_path, "run", [*small_corpus, "training.steps=3", "evaluation.every=2"])
    seen, collected = list[tuple[str, bool]](), list[int]()

    def noting(what: str, function: Any) -> Any:
        return lambda *args: (seen.append((what, gc.isenabled())), function(*args))[1]

    monkeypatch.setattr(run, "train_step", noting("step", run.train_step))
    monkeypatch.setattr(evaluation, "held_out_loss", noting("pause", evaluation.held_out_loss))
    monkeypatch.setattr("train.engine.garbage.COLLECT_EVERY", 2)
    monkeypatch.setattr(gc, "collect", collected.append)
    assert run.fit() == 0
    step, pause = ("step", False), ("pause", True)
    assert seen == [step, step, pause, step, pause] and collected == [1]


def garbage(parallel: ParallelConfig, leak: bool) -> tuple[int, int]:
    """Return how many objects and tensors some steps leave to the garbage collector."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    placed = build(deep(2), PrecisionConfig(Compute.bfloat16), meshes, world.device, 0)
    _, _, step = synthetic(placed, OptimizerConfig(), 1)
    step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            step()
            if leak:
                Cycle(torch.ones(3))
        gc.set_debug(gc.DEBUG_SAVEALL)
        count = gc.collect()
        return count, sum(isinstance(one, torch.Tensor) for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


LAYOUTS = {
    "fsdp2": ParallelConfig(),
    "ep2": ParallelConfig(ep=2),
    "ep2, recomputed in part": ParallelConfig(ep=2, recompute=Recompute.selective),
    "ep2, recomputed": ParallelConfig(ep=2, recompute=Recompute.full),
    "tp2": ParallelConfig(tp=2),
    "cp2": ParallelConfig(cp=2),
    "pp2 zbv": ParallelConfig(pp=2, schedule=PipelineSchedule.zbv),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_leaves_no_tensor_to_the_collector(ranks, name):
    for count, tensors in ranks(2, garbage, LAYOUTS[name], False):
        assert not tensors and 0 < count < 5000
    assert all(tensors == 2 for _, tensors in ranks(2, garbage, LAYOUTS[name], True)), "the control"
