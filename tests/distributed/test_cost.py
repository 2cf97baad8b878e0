"""Bytes: what collectives were really handed, what is counted, and what the formulas say are the same number."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.layouts import tiny
from model.balancer import Balancer
from model.config import BalanceConfig, ModelConfig, QKNorm, WeightsOn
from model.roles import registry
from parallel import cost
from parallel.comm.world import connect
from parallel.layout import ContextMethod, DispatchMethod, ParallelConfig, Recompute
from parallel.mesh import make_meshes, place
from parallel.parallelize import build, on_meta
from parallel.pipeline.stages import PipelineSchedule
from parallel.sharding import local, shard_specs
from precision.config import Compute, PrecisionConfig
from tests.support.tiny import EXACT, config, trainer
from train.certify.worker import BATCH_SIZE, SEQ_LEN, SyntheticLoader
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.optim.muon import MuonConfig
from train.optim.optimizer import OptimizerConfig, OptimizerKind

ADAMW = OptimizerConfig(lr=1e-2)
MUON = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2)


class Seen(TorchDispatchMode):
    """Bytes of the inputs of every collective that torch dispatches, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d.send"):
            self.bytes["send"] += sum(tensor.numel() * tensor.element_size() for tensor in arguments[0])
        elif name.startswith("c10d.") and not name.startswith("c10d.recv"):
            inputs = arguments[0] if "allreduce" in name else arguments[1]
            inputs = inputs if isinstance(inputs, list) else [inputs]
            self.bytes[name.split(".")[1]] += sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        return function(*arguments, **(options or {}))


def counted(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    micro_batch_size: int,
    optimizer: OptimizerConfig = ADAMW,
    aligned: bool = False,
) -> Any:
    """One step's traffic as counted and as seen, and what this rank keeps."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    placed = build(model, precision, meshes, world.device, seed=1)
    network, engine = placed.model, TorchEngine(placed, optimizer)
    balancer = Balancer(network, lambda counts: meshes.world.sum(counts, "balance"))
    rows, share = SyntheticLoader(model.vocab_size), BATCH_SIZE // meshes.rows.size
    batch = rows.batch(0, meshes.rows.rank * share, (meshes.rows.rank + 1) * share)
    if aligned:
        batch.positions_BT = (torch.arange(SEQ_LEN) % 32).expand(len(batch.tokens_BT), -1)
    optimizer_step(engine, balancer, batch, micro_batch_size, None, 1.0)  # a pipeline's first step asks who is there
    meshes.traffic.take()
    with Seen() as seen:
        optimizer_step(engine, balancer, batch, micro_batch_size, None, 1.0)
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    kept = [sum(local(t).nbytes for t in tensors) for tensors in (network.parameters(), state)]
    return meshes.traffic.take(), dict(seen.bytes), kept


LAYOUTS = {
    "fsdp2": (2, ParallelConfig()),
    "hsdp": (4, ParallelConfig(dp_replicate=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "ep2-etp2": (4, ParallelConfig(ep=2, etp=2)),
    "tp2-ep2-fsdp2": (4, ParallelConfig(tp=2, ep=2)),
    "gathered": (2, ParallelConfig(ep=2, dispatch=DispatchMethod.all_gather)),
    "recomputed": (4, ParallelConfig(tp=2, ep=2, recompute=Recompute.full)),
    "recomputed-gathered": (2, ParallelConfig(ep=2, dispatch=DispatchMethod.all_gather, recompute=Recompute.full)),
    "selective": (4, ParallelConfig(ep=2, recompute=Recompute.selective)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2-interleaved-ep2": (4, ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.interleaved)),
    "pp2-zbv-tp2-recomputed": (4, ParallelConfig(pp=2, tp=2, schedule=PipelineSchedule.zbv, recompute=Recompute.full)),
    "pp2-fsdp2-four-stages-each": (4, ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved, stages_per_rank=4)),
    "pp3-tied": (3, ParallelConfig(pp=3)),
    "pp2-fsdp2": (4, ParallelConfig(pp=2, schedule=PipelineSchedule.gpipe)),
    "cp2-gather": (2, ParallelConfig(cp=2)),
    "cp2-ulysses": (2, ParallelConfig(cp=2, cp_method=ContextMethod.ulysses)),
    "cp2-ring": (2, ParallelConfig(cp=2, cp_method=ContextMethod.ring)),
    "cp4-ring-recomputed": (4, ParallelConfig(cp=4, cp_method=ContextMethod.ring, recompute=Recompute.full)),
    "cp2-tp2": (4, ParallelConfig(cp=2, tp=2, recompute=Recompute.selective)),
    "cp2-tp2-ulysses": (4, ParallelConfig(cp=2, tp=2, cp_method=ContextMethod.ulysses, recompute=Recompute.full)),
    "cp2-ep2": (2, ParallelConfig(cp=2, ep=2)),
}


def deep_enough(model: ModelConfig, config: ParallelConfig) -> ModelConfig:
    """A layer for each stage of a pipeline."""
    if config.pp == 1:
        return model
    layers = max(4, config.pp * config.per_rank)
    return replace(model, num_layers=layers, layer_list=(model.blocks * 4)[:layers], tie_embeddings=config.pp == 3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_counted_bytes_equal_the_formulas(ranks, name):
    count, config = LAYOUTS[name]
    model = replace(tiny(2), balance=BalanceConfig(aux=0.01, z=0.01), vocab_size=66)  # 66 rows: shards of unequal size
    model, precision, micro_batch_size = (
        deep_enough(model, config),
        PrecisionConfig(Compute.float32),
        1 if config.pp > 1 else 2,
    )
    found = ranks(count, counted, model, config, precision, micro_batch_size)
    total: Counter[tuple[str, str]] = Counter()
    for traffic, seen, _ in found:
        assert sum(traffic.values()) == sum(seen.values()), (traffic, seen)
        total.update(traffic)
    layout = config.resolve(count)
    batch = cost.BatchShape(BATCH_SIZE // layout.rows, min(micro_batch_size, BATCH_SIZE // layout.rows), SEQ_LEN)
    assert dict(total) == cost.step_traffic(model, precision, layout, batch)


def test_aligned_rows_save_the_halo(ranks):
    model, config, precision = tiny(1), ParallelConfig(cp=2), PrecisionConfig(Compute.bfloat16)
    total: Counter[tuple[str, str]] = Counter()
    for traffic, seen, _ in ranks(2, counted, model, config, precision, 2, ADAMW, True):
        assert sum(traffic.values()) == sum(seen.values())
        total.update(traffic)
    aligned, other = (cost.BatchShape(BATCH_SIZE, 2, SEQ_LEN, aligned) for aligned in (True, False))
    assert dict(total) == cost.step_traffic(model, precision, config.resolve(2), aligned)
    assert ("cp", "halo") not in total
    assert cost.step_traffic(model, precision, config.resolve(2), other)["cp", "halo"] > 0


@pytest.mark.parametrize("shared_expert_hidden_size", [0, 16])
@pytest.mark.parametrize("weights_on", WeightsOn)
@pytest.mark.parametrize("dispatch", [DispatchMethod.all_to_all, DispatchMethod.all_gather])
def test_what_ends_a_recomputed_layer_is_not_repeated(ranks, dispatch, weights_on, shared_expert_hidden_size):
    """Heads normalised together, with and without a shared expert, weights before and after the experts."""
    base = tiny(2)
    layers = [replace(layer, qk_norm=QKNorm.full) for layer in base.blocks]
    router = replace(base.router, weights_on=weights_on)
    model = replace(base, layer_list=layers, shared_expert_hidden_size=shared_expert_hidden_size, router=router)
    precision = PrecisionConfig(Compute.float32)
    config = ParallelConfig(tp=2, ep=2, dispatch=dispatch, recompute=Recompute.full)
    total: Counter[tuple[str, str]] = Counter()
    for traffic, seen, _ in ranks(2, counted, model, config, precision, 4):
        assert sum(traffic.values()) == sum(seen.values())
        total.update(traffic)
    assert dict(total) == cost.step_traffic(
        model, precision, config.resolve(2), cost.BatchShape(BATCH_SIZE, 4, SEQ_LEN)
    )


@pytest.mark.parametrize("compute", [Compute.bfloat16, Compute.float64])
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_the_formulas_know_the_number_formats(ranks, compute, recompute):
    model = replace(tiny(1), balance=BalanceConfig(aux=0.01))
    config = ParallelConfig(tp=2, ep=2, recompute=recompute)
    found = ranks(4, counted, model, config, PrecisionConfig(compute), 1)
    total: Counter[tuple[str, str]] = Counter()
    for traffic, _, _ in found:
        total.update(traffic)
    batch = cost.BatchShape(BATCH_SIZE // 2, 1, SEQ_LEN)
    assert dict(total) == cost.step_traffic(model, PrecisionConfig(compute), config.resolve(4), batch)


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "tp2", "ep2-etp2", "tp2-ep2-fsdp2", "pp2-zbv-tp2-recomputed"])
def test_static_bytes_are_what_ranks_keep(ranks, name):
    count, config = LAYOUTS[name]
    model, precision = deep_enough(replace(tiny(2), vocab_size=66), config), PrecisionConfig(Compute.float32)
    for rank, (_, _, (parameters, state)) in enumerate(ranks(count, counted, model, config, precision, 1)):
        wanted = cost.static_bytes(model, precision, config.resolve(count), torch.float32, rank)
        assert (wanted.parameters, wanted.gradients, wanted.optimizer) == (parameters, parameters, state)


MUON_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("fsdp2", "hsdp", "tp2", "ep2", "ep2-etp2", "tp2-ep2-fsdp2")},
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "etp2-efsdp2": (4, ParallelConfig(etp=2)),
}


@pytest.mark.parametrize("name", MUON_LAYOUTS)
def test_bytes_of_muon_equal_the_formulas(ranks, name):
    """What matrices take on their way, uneven shards included, and one moment for each of them."""
    count, config = MUON_LAYOUTS[name]
    model, precision = replace(tiny(2), balance=BalanceConfig(aux=0.01), dense_hidden_size=50), PrecisionConfig()
    found = ranks(count, counted, model, config, precision, 2, MUON)
    total: Counter[tuple[str, str]] = Counter()
    layout = config.resolve(count)
    for rank, (traffic, seen, (parameters, state)) in enumerate(found):
        assert sum(traffic.values()) == sum(seen.values()), (traffic, seen)
        total.update(traffic)
        kept = cost.static_bytes(model, precision, layout, torch.float32, rank, muon=True)
        assert (kept.parameters, kept.optimizer) == (parameters, state)
    batch = cost.BatchShape(BATCH_SIZE // layout.rows, min(2, BATCH_SIZE // layout.rows), SEQ_LEN)
    wanted = cost.step_traffic(model, precision, layout, batch, torch.float32)
    assert dict(total) == wanted
    assert any(purpose == "matrices" for _, purpose in wanted)
    assert dict(total) != cost.step_traffic(model, precision, layout, batch), "the control: AdamW's"


@pytest.mark.parametrize("compute", Compute)
def test_matrices_travel_in_the_format_of_the_products(ranks, compute):
    model, precision, config = replace(tiny(1), balance=BalanceConfig()), PrecisionConfig(compute), ParallelConfig(tp=2)
    for chosen, dtype in ((None, precision.compute_dtype), (Compute.bfloat16, torch.bfloat16)):
        muon = replace(MUON, muon=MuonConfig(products=chosen))
        total: Counter[tuple[str, str]] = Counter()
        for traffic, _, _ in ranks(2, counted, model, config, precision, 2, muon):
            total.update(traffic)
        batch = cost.BatchShape(BATCH_SIZE, 2, SEQ_LEN)
        wanted = cost.step_traffic(model, precision, config.resolve(2), batch, dtype)
        assert total["tp", "matrices"] == wanted["tp", "matrices"] > 0


def test_static_bytes_equal_arithmetic():
    """A dense layer's weights over 4 ranks, by hand."""
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dense_hidden_size=48,
        moe_every=0,
    )
    outside, norms = 2 * 64 * 32, 3 * 32
    attention, dense = 2 * 32 * 8 * (4 + 2), 3 * 32 * 48
    elements = outside + norms + attention + dense
    fp32 = PrecisionConfig(Compute.float32)
    alone = cost.static_bytes(model, fp32, ParallelConfig().resolve(1), torch.float32)
    assert (alone.parameters, alone.optimizer) == (4 * elements, 8 * elements + 4 * 12)
    shared = cost.static_bytes(model, fp32, ParallelConfig(tp=2).resolve(4), torch.bfloat16)
    assert shared.parameters == 4 * ((elements - norms) // 4 + norms // 2), "gains are whole on both ranks of tp"
    assert shared.optimizer == shared.parameters + 4 * 12
    assert cost.static_bytes(model, fp32, ParallelConfig().resolve(4), None).optimizer == 0
    muon = cost.static_bytes(model, fp32, ParallelConfig().resolve(1), torch.float32, muon=True)
    assert muon.optimizer == 4 * (attention + dense) + 8 * (outside + norms) + 4 * 5


def test_experts_fewer_than_ranks_are_stored_evenly():
    """Two experts over four ranks: cut along their width, not between them, which would leave two ranks nothing."""
    model = replace(tiny(1), num_experts=2)
    infos = registry(on_meta(model, PrecisionConfig(Compute.float32)))
    layout = ParallelConfig().resolve(4)
    for rank in range(4):
        specs = shard_specs(infos, model, place(layout, rank))
        experts = {name: spec.stored for name, spec in specs.items() if spec.info.role.is_expert}
        assert experts
        for name, block in experts.items():
            whole = specs[name].info.shape
            dim = {4: 2, 3: 1}[len(whole)]  # gate and up [E, 2, F, D], down [E, D, F]
            assert block.shape == (*whole[:dim], whole[dim] // 4, *whole[dim + 1 :]), name
            assert block.offset == tuple(rank * whole[dim] // 4 if d == dim else 0 for d in range(len(whole))), name


def places(parallel: ParallelConfig) -> Any:
    world = connect()
    layout = parallel.resolve(world.size)
    return [_coordinates(make_meshes(layout, world)), _coordinates(place(layout, world.rank))]


def _coordinates(meshes: Any) -> dict[str, tuple[int, int]]:
    names = ("pp", "ends", "cp", "rows", "replicate", "fsdp", "efsdp", "tp", "experts", "ep", "etp")
    return {name: (getattr(meshes, name).size, getattr(meshes, name).rank) for name in names}


def test_a_place_is_known_without_process_groups(ranks):
    for parallel in (ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2), ParallelConfig(pp=2, cp=2, tp=2, ep=2)):
        for real, computed in ranks(8, places, parallel):
            assert real == computed


def fitted(root: Path, overrides: list[str]) -> int:
    return trainer(root, "run", overrides).fit()


def test_a_run_logs_its_bytes_and_evaluation_does_not_count(ranks, small_corpus, tmp_path):
    overrides = [
        *small_corpus,
        *EXACT,
        "training.steps=4",
        "logging.every=2",
        "evaluation.every=1",
        "model.num_experts=8",
    ]
    assert ranks(2, fitted, tmp_path, overrides) == [0, 0]
    run = config(tmp_path, "run", *overrides)
    batch = cost.BatchShape(4, 2, 48)
    wanted = cost.step_traffic(run.model, run.precision, run.parallel.resolve(2), batch)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["collective_bytes"] for line in lines if "loss" in line]
    assert logged == [{f"{axis}/{why}": size // 2 for (axis, why), size in wanted.items()}] * 2
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["static_bytes"]
    assert kept == vars(cost.static_bytes(run.model, run.precision, run.parallel.resolve(2), None))


class Core(TorchDispatchMode):
    """Pairs of query and key, times heads, that attention's kernel is asked for in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if "flash_attention_for_cpu." in str(function):
            (rows, heads, queries, _), keys = arguments[0].shape, arguments[1].shape[2]
            causal = arguments[4] if len(arguments) > 4 else (options or {}).get("is_causal", False)
            self.pairs += rows * heads * (queries * (queries + 1) // 2 if causal else queries * keys)
        return function(*arguments, **(options or {}))


def attention_counted(model: ModelConfig, config: ParallelConfig, layer: int, context: int) -> cost.AttentionCost:
    """Of one row that is one document, on this rank."""
    world = connect()
    meshes = make_meshes(config.resolve(world.size), world)
    placed = build(model, PrecisionConfig(Compute.bfloat16), meshes, world.device, seed=1)
    here = placed.context(torch.arange(context)[None])
    attention, kept = placed.model.layers[str(layer)].attention, {}
    shapes = [
        (1, context // meshes.cp.size, n, model.head_dim)
        for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    ]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr(), tensor.shape] = tensor.nbytes
        return tensor

    meshes.traffic.take()
    with Core() as core, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = attention.attend(q, k, v, here, attention.layer.attention_chunk_size)
    y.sum().backward()
    flops = 3 * 4 * core.pairs * model.head_dim
    return cost.AttentionCost(flops, k.nbytes + v.nbytes, sum(kept.values()), sum(meshes.traffic.take().values()))


@pytest.mark.parametrize("kind", ["chunked", "whole row"])
@pytest.mark.parametrize("size, method", [(1, "gather"), (2, "gather"), (2, "ulysses"), (2, "ring"), (4, "ring")])
def test_what_a_layers_attention_costs(ranks, kind, size, method):
    model, config = tiny(1), ParallelConfig(cp=size, cp_method=ContextMethod[method])
    chunks = [layer.attention_chunk_size is not None for layer in model.blocks]
    layer = chunks.index(kind == "chunked")
    found = ranks(size, attention_counted, model, config, layer, 2 * SEQ_LEN)
    precision = PrecisionConfig(Compute.bfloat16)
    wanted = cost.attention_cost(model, model.blocks[layer], precision, config.resolve(size), 2 * SEQ_LEN)
    for figure in ("flops", "keys", "kept", "sent"):
        assert sum(getattr(one, figure) for one in found) == size * getattr(wanted, figure), figure
    longer = cost.attention_cost(model, model.blocks[layer], precision, config.resolve(size), 4 * SEQ_LEN)
    assert longer.kept == 2 * wanted.kept and longer.flops / wanted.flops > (3.9 if kind == "whole row" else 1.9)
