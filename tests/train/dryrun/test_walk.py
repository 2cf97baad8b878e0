"""The dry run does what real ranks do: bytes, collectives and peaks of the same step on gloo ranks are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import load
from core.errors import ConfigError, LeviathanError
from model.transformer import Layer
from parallel import fsdp, tensor_parallel
from parallel.cost import static_bytes
from parallel.mesh import MeshAxis
from precision import resolve
from precision.config import KernelKind, PrecisionConfig
from tests.train.dryrun.real import CPU, real_peak, real_step, small_run
from train.config import TrainConfig, check
from train.dryrun import report, step
from train.dryrun.walk import GPU, Assumptions, assumed_routing, check_walk, walk

DISTANCE, DEEP, EIGHT = 0.03, "model.num_layers=4", "training.global_batch_size=8"
LAYOUTS = {
    "pp2-tp2": (4, ["parallel.pp=2", "parallel.tp=2"]),
    "pp2-ep2-interleaved": (4, ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=interleaved", DEEP]),
    "pp2-zero-bubble": (2, ["parallel.pp=2", "parallel.schedule=zbv", DEEP]),
    "cp2-tp2": (4, ["parallel.cp=2", "parallel.tp=2", "parallel.ep=2"]),
    "hsdp": (4, ["parallel.dp_replicate=2", "parallel.recompute=full", "parallel.reduce_every=step", EIGHT]),
    "etp2-top2": (4, ["parallel.ep=2", "parallel.etp=2", "model.router.top_k=2", "parallel.recompute=selective"]),
    "muon-bf16": (2, ["optimizer=muon", "precision=bf16", "parallel.ep=2", "parallel.gather_experts=step"]),
    "gathered": (2, ["parallel.ep=2", "parallel.dispatch=all_gather", "optimizer.moments=bfloat16"]),
}


def assert_equals_real_ranks(count: int, overrides: list[str], ranks: Any) -> None:
    config, layout = small_run(*overrides, ranks=count)
    moments = config.optimizer.moments_dtype(config.precision)
    muon = config.optimizer.kind.name == "muon"
    for rank, real in enumerate(ranks(count, real_step, config)):
        dry = walk(config, layout, rank, kind=CPU).step
        planned = static_bytes(config.model, config.precision, layout, moments, rank, muon)
        for kind in (step.PARAMETERS, step.GRADIENTS, step.OPTIMIZER):
            assert getattr(dry, kind) == getattr(real, kind) == getattr(planned, kind) > 0, kind
        assert dry.issued == real.issued
        assert dry.traffic == real.traffic
        assert dry.activations.bytes == pytest.approx(real.activations.bytes, rel=DISTANCE)
        assert dry.peak.bytes == pytest.approx(real.peak.bytes, rel=DISTANCE)
        assert not dry.races


def test_a_dry_run_equals_real_ranks(ranks):
    assert_equals_real_ranks(2, ["parallel.ep=2"], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_dry_runs_of_layouts_equal_real_ranks(name, ranks):
    assert_equals_real_ranks(*LAYOUTS[name], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_peak_is_what_the_profiler_measures(count, ranks):
    config, layout = small_run(EIGHT, "training.micro_batch_size=4", "training.seq_len=512", ranks=count)
    for rank, measured in enumerate(ranks(count, real_peak, config)):
        dry = walk(config, layout, rank, kind=CPU).step
        found = sum(size for kind, size in dry.peak.by_kind.items() if kind not in KEPT)
        assert found == pytest.approx(measured, rel=DISTANCE)


KEPT = (step.PARAMETERS, step.OPTIMIZER, step.ROUTERS)


def test_a_tensor_too_many_is_seen(monkeypatch):
    config, layout = small_run()
    honest, forward = walk(config, layout, 0, kind=CPU).step, Layer.forward

    def wasteful(self: Any, x_BTD: Tensor, *rest: Any) -> Tensor:
        return Wasteful.apply(forward(self, x_BTD, *rest))

    monkeypatch.setattr(Layer, "forward", wasteful)
    found = walk(config, layout, 0, kind=CPU).step
    extra = 2 * 128 * config.model.hidden_size * 4  # a tensor of each layer
    assert found.activations.bytes == honest.activations.bytes + extra


def test_a_layout_that_shards_nothing_is_seen(monkeypatch):
    config, layout = small_run(ranks=2)
    planned = static_bytes(config.model, config.precision, layout, config.optimizer.moments_dtype(config.precision), 1)
    assert walk(config, layout, 1, kind=CPU).step.parameters == planned.parameters
    monkeypatch.setattr(fsdp, "apply", lambda *given: None)
    assert walk(config, layout, 1, kind=CPU).step.parameters > 1.9 * planned.parameters


class Wasteful(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + 0 * ctx.saved_tensors[0].sum()


def test_a_collective_on_the_wrong_group_is_seen(monkeypatch):
    config, layout = small_run("parallel.tp=2", ranks=4)
    walks = [walk(config, layout, rank) for rank in (0, 1)]
    assert report.faults(walks) == {"deadlocks": [], "races": []}
    honest = tensor_parallel.VocabAxis.sum

    def on_the_world(self: Any, x: Tensor) -> None:
        honest(tensor_parallel.VocabAxis(MeshAxis("world", 4, group=torch.distributed.group.WORLD), 0), x)

    monkeypatch.setattr(tensor_parallel.VocabAxis, "sum", on_the_world)
    found = report.faults([walks[0], walk(config, layout, 1)])
    assert len(found["deadlocks"]) == 2 and "rank 1 issues" in found["deadlocks"][0]


def test_routing_is_balanced_or_gives_one_rank_more():
    model = small_run()[0].model
    experts = model.num_experts
    shape = torch.Size([2, 64 * experts, 2])
    balanced = assumed_routing(shape, model, range(1), 1.0).flatten().bincount()
    assert balanced.tolist() == [128 * 2] * experts
    skewed = assumed_routing(shape, model, range(1), 1.5)
    assert skewed.flatten().bincount()[0] == 1.5 * 256
    assert (skewed[..., 0] != skewed[..., 1]).all()


@pytest.mark.slow
def test_imbalance_costs_the_hot_rank_memory():
    config, layout = small_run("parallel.ep=2", ranks=2)
    even, hot = (walk(config, layout, 1, Assumptions(imbalance)).step for imbalance in (1.0, 2.0))
    assert hot.activations.bytes > even.activations.bytes
    assert hot.parameters == even.parameters


def test_the_kernels_of_gpus_need_not_be_installed(monkeypatch):
    monkeypatch.setattr(resolve, "no_triton", lambda device: "Triton is not installed")
    assert resolve.resolve(PrecisionConfig(), GPU, runs=False).kernels is KernelKind.triton
    with pytest.raises(ConfigError, match="Triton is not installed"):
        resolve.resolve(PrecisionConfig(kernels=KernelKind.triton), GPU)


@pytest.mark.parametrize(
    ("overrides", "given", "line"),
    [
        (["parallel.engine=deepspeed", "parallel.zero.stage=1"], {}, "the dry run walks FSDP2 only"),
        ([], {"imbalance": 1.5}, "imbalance=1.5: the experts of one of parallel.ep=1 groups get at most 1 times"),
        ([], {"tiles": 2}, "tiles=2: the model has no vision encoder"),
    ],
)
def test_what_cannot_be_walked_is_rejected(overrides, given, line):
    config, layout = small_run(*overrides)
    with pytest.raises(ConfigError, match=line):
        check_walk(config, layout, Assumptions(**given))


def test_an_error_of_the_real_code_names_the_rank(monkeypatch):
    config, layout = small_run("parallel.pp=2", ranks=2)
    monkeypatch.setattr(Layer, "forward", lambda self, x_BTD, context: x_BTD[..., :-1] + x_BTD)
    with pytest.raises(LeviathanError, match=r"^rank 1: RuntimeError: Attempting to broadcast"):
        walk(config, layout, 1)


@pytest.mark.slow
def test_behemoth_is_walked_on_32768_ranks():
    overrides = ["experiment=behemoth", "hparam=none", "parallel.pp=16", "parallel.tp=8", "parallel.ep=16"]
    config = load("train", TrainConfig, [*overrides, "parallel.recompute=selective", "training.global_batch_size=4096"])
    config = replace(config, data=replace(config.data, tokens=".", filter=None))
    layout, moments = check(config, 32768), config.optimizer.moments_dtype(config.precision)
    walks = [walk(config, layout, rank) for rank in (0, 16384, 30720)]
    for one in walks:
        planned, found = static_bytes(config.model, config.precision, layout, moments, one.rank), one.step
        for kind in (step.PARAMETERS, step.GRADIENTS, step.OPTIMIZER):
            assert getattr(found, kind) == getattr(planned, kind) > 0
        assert found.peak.by_kind[step.UNREDUCED] == pytest.approx(planned.unreduced, rel=0.01)
        assert found.peak.by_kind[step.GATHERED] == pytest.approx(planned.gathered, rel=0.01)
        layers = layout.stages(config.model).layers[one.place["pp"]]
        assert found.syncs["_to_copy"] == 16 * len(layers), "one wait per MoE layer and micro-batch"
    assert report.faults(walks) == {"deadlocks": [], "races": []}
