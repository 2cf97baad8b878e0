"""The bytes that collectives are given, the bytes counted and the bytes of the formulas are equal."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.layouts import LAYOUTS as CERTIFIED
from bench.layouts import tiny
from model.config import BalanceConfig, ModelConfig, QKNorm, WeightsOn
from model.moe import MixtureOfExperts
from model.roles import registry
from parallel import cost, fsdp
from parallel.comm.world import World
from parallel.layout import ContextMethod, DispatchMethod, GatherExperts, Layout, ParallelConfig, Recompute, ReduceEvery
from parallel.mesh import MeshAxis, Meshes, make_meshes
from parallel.parallelize import on_meta
from parallel.pipeline.stages import PipelineSchedule
from parallel.sharding import local
from precision.config import Compute, PrecisionConfig
from tests.support.models import placed_here
from tests.support.operations import Observed
from tests.support.tiny import EXACT, config, synthetic, trainer
from tests.support.traffic import step_traffic
from train.certify.worker import BATCH_SIZE, SEQ_LEN
from train.optim.config import MuonConfig, OptimizerConfig, OptimizerKind

ADAMW = OptimizerConfig(lr=1e-2)
MUON = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2)
FP32, BF16, FP64 = (PrecisionConfig(one) for one in (Compute.float32, Compute.bfloat16, Compute.float64))


def dispatched_bytes(step: Any) -> Counter[tuple[int, ...]]:
    """Return the input bytes of all collectives that torch dispatches in `step`, by the ranks of the group."""
    found: Counter[tuple[int, ...]] = Counter()

    def see(function: Any, arguments: Any, _: Any) -> None:
        name = str(function)
        if name.startswith("c10d.") and not name.startswith("c10d.recv"):
            inputs = arguments[0] if "allreduce" in name or "send" in name else arguments[1]
            (group,) = (dist.ProcessGroup.unbox(one) for one in arguments if _is_group(one))
            inputs = inputs if isinstance(inputs, list) else [inputs]
            found[members(group)] += sum(tensor.nbytes for tensor in inputs)

    with Observed(see):
        step()
    return found


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def members(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def by_ranks(meshes: Meshes, traffic: dict[tuple[str, str], int]) -> Counter[tuple[int, ...]]:
    """Sum counted bytes by the ranks of the axis, since several axes may have the same ranks."""
    axes = [axis for axis in vars(meshes).values() if isinstance(axis, MeshAxis)]
    groups = {axis.name: members(axis.group or dist.group.WORLD) for axis in axes}
    found: Counter[tuple[int, ...]] = Counter()
    for (axis, _), size in traffic.items():
        found[groups[axis]] += size
    return found


def counted(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    micro_batch_size: int,
    optimizer: OptimizerConfig = ADAMW,
    aligned: bool = False,
) -> Any:
    """Return the traffic of one step, after comparing it with what torch dispatches, the bytes this rank keeps, and the
    numbers of ranks and nodes that each token is sent to.
    """
    placed = placed_here(model, parallel, precision)
    engine, batch, step = synthetic(placed, optimizer, micro_batch_size)
    if aligned:
        places = torch.arange(SEQ_LEN)
        documents = torch.where(places < 48, places % 32, places % 3)  # documents of 3 tokens at the end
        batch.positions_BT = documents.expand(len(batch.tokens_BT), -1)
    if parallel.pp > 1:  # the first step of a pipeline also sends shapes
        step()
        placed.meshes.traffic.take()
    copies = count_copies(placed, parallel)
    seen, traffic = dispatched_bytes(step), placed.meshes.traffic.take()
    assert by_ranks(placed.meshes, traffic) == seen, traffic
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    kept = [sum(local(t).nbytes for t in tensors) for tensors in (placed.model.parameters(), state)]
    return traffic, kept, copies


def count_copies(placed: Any, parallel: ParallelConfig) -> list[tuple[int, int]]:
    """Return a list that gets, for each token that a router sees, the number of ranks and of nodes with its experts."""
    found: list[tuple[int, int]] = []
    for layer in placed.model.layers.values():
        if isinstance(layer.ffn, MixtureOfExperts):
            experts = layer.ffn.router.weight.shape[0]
            local, near = experts // parallel.ep, experts // placed.meshes.layout.exchange_nodes
            layer.ffn.router.register_forward_hook(
                lambda module, inputs, outputs, local=local, near=near: found.extend(
                    (parallel.etp * len({expert // local for expert in chosen}), len({i // near for i in chosen}))
                    for chosen in outputs[0].flatten(0, 1).tolist()
                )
            )
    return found


def shape(layout: Layout, micro_batch_size: int, aligned: bool = False) -> cost.BatchShape:
    return cost.BatchShape(BATCH_SIZE // layout.dp, min(micro_batch_size, BATCH_SIZE // layout.dp), SEQ_LEN, aligned)


def assert_formulas_hold(
    ranks: Any,
    model: ModelConfig,
    count: int,
    config: ParallelConfig,
    precision: PrecisionConfig = FP32,
    micro_batch_size: int = 2,
    optimizer: OptimizerConfig = ADAMW,
    matrices: torch.dtype | None = None,
    aligned: bool = False,
    image_tokens: int = 0,
) -> dict[tuple[str, str], int]:
    """Count the traffic of a step and each rank's bytes of parameters and optimizer state. Compare both with the
    formulas. Return the traffic, summed over ranks.
    """
    layout, summed = config.resolve(count), Counter[tuple[str, str]]()
    found = ranks(count, counted, model, config, precision, micro_batch_size, optimizer, aligned)
    sent = [
        Fraction(sum(times), len(times)) for times in zip(*(one for *_, copies in found for one in copies), strict=True)
    ]
    for rank, (traffic, (parameters, state), _) in enumerate(found):
        summed.update(traffic)
        kept = cost.static_bytes(model, precision, layout, precision.master_dtype, rank, matrices is not None)
        assert (kept.parameters, kept.gradients, kept.optimizer) == (parameters, parameters, state)
    batch = shape(layout, micro_batch_size, aligned)
    copies = cost.Copies(*sent) if sent else None
    assert summed == step_traffic(model, precision, layout, batch, matrices, image_tokens, copies)
    return summed


LAYOUTS = {
    **{name: CERTIFIED[name] for name in ("fsdp2", "hsdp 2x2", "tp2", "ep2", "cp2 gather", "cp2 ulysses", "cp2 ring")},
    "fsdp2-reduced-per-step": (2, ParallelConfig(reduce_every=ReduceEvery.step)),
    "hsdp-reduced-per-step": (4, ParallelConfig(dp_replicate=2, reduce_every=ReduceEvery.step)),
    "whole-experts": (4, ParallelConfig(ep=2, gather_experts=GatherExperts.step)),
    "ep2-etp2": (4, ParallelConfig(ep=2, etp=2)),
    "tp2-ep2-fsdp2": (4, ParallelConfig(tp=2, ep=2)),
    "by-node": (4, ParallelConfig(ep=4, exchange_node_size=2)),
    "by-node-etp-recomputed": (4, ParallelConfig(ep=2, etp=2, exchange_node_size=2, recompute=Recompute.full)),
    "gathered": (2, ParallelConfig(ep=2, dispatch=DispatchMethod.all_gather)),
    "recomputed": (4, ParallelConfig(tp=2, ep=2, recompute=Recompute.full)),
    "recomputed-gathered": (2, ParallelConfig(ep=2, dispatch=DispatchMethod.all_gather, recompute=Recompute.full)),
    "selective": (4, ParallelConfig(ep=2, recompute=Recompute.selective)),
    "pp2-interleaved-ep2": (4, ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.interleaved)),
    "pp2-zbv-tp2-recomputed": (4, ParallelConfig(pp=2, tp=2, schedule=PipelineSchedule.zbv, recompute=Recompute.full)),
    "pp2-fsdp2-four-stages-each": (4, ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved, stages_per_rank=4)),
    "pp3-tied": (3, ParallelConfig(pp=3)),
    "pp2-fsdp2": (4, ParallelConfig(pp=2, schedule=PipelineSchedule.gpipe)),
    "cp4-ring-recomputed": (4, ParallelConfig(cp=4, cp_method=ContextMethod.ring, recompute=Recompute.full)),
    "cp2-tp2": (4, ParallelConfig(cp=2, tp=2, recompute=Recompute.selective)),
    "cp2-tp2-ulysses": (4, ParallelConfig(cp=2, tp=2, cp_method=ContextMethod.ulysses, recompute=Recompute.full)),
    "cp2-ep2": (2, ParallelConfig(cp=2, ep=2)),
}


QUICK = ("hsdp 2x2", "cp2 ring", "tp2-ep2-fsdp2", "recomputed-gathered", "pp2-zbv-tp2-recomputed")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_counted_and_kept_bytes_equal_the_formulas(ranks, name):
    count, config = LAYOUTS[name]
    model = replace(tiny(2), balance=BalanceConfig(aux=0.01, z=0.01), vocab_size=66)  # 66 rows: shards of unequal size
    if config.pp > 1:  # a layer for each stage
        layers = max(4, config.pp * config.per_rank)
        model = replace(model, num_layers=layers, layer_list=(model.blocks * 4)[:layers], tie_embeddings=config.pp == 3)
    assert_formulas_hold(
        ranks, model, count, config, micro_batch_size=1 if config.pp > 1 or config.dp_replicate > 1 else 2
    )


def kept_whole(parallel: ParallelConfig, precision: PrecisionConfig) -> tuple[list[int], list[int]]:
    """Return the bytes of gradients and of parameters that this rank keeps whole between two micro-batches, and those
    of the formulas.
    """
    placed = placed_here(tiny(1), parallel, precision)
    engine, _, step = synthetic(placed, ADAMW, 2)
    kept: list[list[int]] = []

    def measure(last: bool) -> None:
        params = [p for _, group in fsdp.units(placed.model) if group is not None for p in group.fsdp_params]
        sums = [p.unsharded_accumulated_grad if p.unsharded_accumulated_grad is not None else p._unsharded_param.grad
                for p in params]  # fmt: skip
        whole = [p._unsharded_param.untyped_storage().nbytes() for p in params]
        kept.append([sum(one.nbytes for one in sums if one is not None), sum(whole)])

    engine.after_backward = measure
    step()
    assert len(kept) == 2 and kept[1] == [0, 0], kept
    formula = cost.static_bytes(tiny(1), precision, placed.meshes.layout, torch.float32)
    return kept[0], [formula.unreduced, formula.gathered]


@pytest.mark.parametrize("precision", [FP32, BF16])
@pytest.mark.parametrize("key", [None, "reduce_every", "gather_experts"])
def test_what_waits_for_the_end_of_a_step_is_kept_whole(ranks, key, precision):
    once = {"reduce_every": ReduceEvery.step, "gather_experts": GatherExperts.step}
    parallel = ParallelConfig(**{key: once[key]} if key else {})
    for found, formula in ranks(2, kept_whole, parallel, precision):
        assert found == formula and [bool(size) for size in found] == [key is not None, key == "gather_experts"]


def test_aligned_sequences_save_the_halo(ranks):
    config = ParallelConfig(cp=2)
    layout = config.resolve(2)
    assert ("cp", "halo") not in assert_formulas_hold(ranks, tiny(1), 2, config, BF16, aligned=True)
    assert step_traffic(tiny(1), BF16, layout, shape(layout, 2))["cp", "halo"] > 0


@pytest.mark.parametrize("shared_expert_hidden_size", [0, 16])
@pytest.mark.parametrize("weights_on", WeightsOn)
@pytest.mark.parametrize(
    "dispatch", [DispatchMethod.all_to_all, pytest.param(DispatchMethod.all_gather, marks=pytest.mark.slow)]
)
def test_the_end_of_a_layer_is_not_recomputed(ranks, dispatch, weights_on, shared_expert_hidden_size):
    """Use QK norm over all heads, with and without a shared expert, and routing weights before or after experts."""
    base = tiny(2)
    layers = [replace(layer, qk_norm=QKNorm.full) for layer in base.blocks]
    router = replace(base.router, weights_on=weights_on)
    model = replace(base, layer_list=layers, shared_expert_hidden_size=shared_expert_hidden_size, router=router)
    assert_formulas_hold(
        ranks, model, 2, ParallelConfig(tp=2, ep=2, dispatch=dispatch, recompute=Recompute.full), FP32, 4
    )


@pytest.mark.parametrize("precision, recompute", [(BF16, Recompute.full), (FP64, Recompute.none)])
def test_the_formulas_know_the_number_formats(ranks, precision, recompute):
    model = replace(tiny(1), balance=BalanceConfig(aux=0.01))
    assert_formulas_hold(ranks, model, 4, ParallelConfig(tp=2, ep=2, recompute=recompute), precision)


MUON_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("fsdp2", "hsdp 2x2", "tp2", "ep2", "ep2-etp2", "tp2-ep2-fsdp2")},
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "etp2-efsdp2": (4, ParallelConfig(etp=2)),
}


@pytest.mark.parametrize(
    "name", [n if n == "tp2-ep2-fsdp2" else pytest.param(n, marks=pytest.mark.slow) for n in MUON_LAYOUTS]
)
def test_bytes_of_muon_equal_the_formulas(ranks, name):
    """Count the matrices that Muon sends, uneven shards included, and its one moment per matrix."""
    model = replace(tiny(2), balance=BalanceConfig(aux=0.01), dense_hidden_size=50)
    found = assert_formulas_hold(ranks, model, *MUON_LAYOUTS[name], FP32, 4, MUON, torch.float32)
    assert any(purpose == "matrices" for _, purpose in found)


@pytest.mark.parametrize("precision, chosen", [(FP32, Compute.bfloat16), (BF16, None), (FP64, None)])
def test_matrices_travel_in_the_format_of_the_products(ranks, precision, chosen):
    model, sent = replace(tiny(1), balance=BalanceConfig()), torch.bfloat16 if chosen else precision.compute_dtype
    optimizer = replace(MUON, muon=MuonConfig(products=chosen))
    assert (
        assert_formulas_hold(ranks, model, 2, ParallelConfig(tp=2), precision, 8, optimizer, sent)["tp", "matrices"] > 0
    )


def test_moments_may_be_narrow_or_absent():
    found = [cost.static_bytes(tiny(1), FP32, ParallelConfig(tp=2).resolve(4), of) for of in (torch.bfloat16, None)]
    steps = 4 * len(registry(on_meta(tiny(1), FP32)))
    assert [kept.optimizer for kept in found] == [found[0].parameters + steps, 0]


@pytest.mark.parametrize("degrees", [{"dp_replicate": 2, "tp": 2, "ep": 2, "etp": 2}, {"pp": 2, "cp": 2, "ep": 2}])
def test_coordinates_are_those_in_the_process_groups(degrees):
    layout = ParallelConfig(**degrees).resolve(8)
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            meshes = make_meshes(layout, World(rank, 8, torch.device("cpu")))
            for axis in meshes.joined:
                assert (axis.size, axis.rank) == (dist.get_world_size(axis.group), dist.get_rank(axis.group)), axis
            axes = [axis for axis in vars(meshes).values() if isinstance(axis, MeshAxis)]
            assert {one.name for one in meshes.joined} >= {one.name for one in axes if one.size > 1} - {"ep", "etp"}
        finally:
            dist.destroy_process_group()


def communication() -> Any:
    """Return how FSDP2's units communicate, and how the first one does after a hook is set on it."""
    placed = placed_here(tiny(1), ParallelConfig(), BF16)
    units = [(unit, group) for unit, group in fsdp.units(placed.model) if group is not None]
    how = lambda g: (type(g._all_gather_comm), type(g._reduce_scatter_comm), g._all_reduce_hook is None)  # noqa: E731
    found = [how(group) for _, group in units]
    units[0][0].set_all_reduce_hook(lambda shard: None)
    return found, how(units[0][1])


def test_fsdp2_communicates_as_torch_made_it(ranks):
    """With an all-reduce hook, FSDP2 would use another CUDA stream unsynchronised: a race on gradients."""
    for found, hooked in ranks(2, communication):
        assert len(found) > 4 and set(found) == {(DefaultAllGather, DefaultReduceScatter, True)}
        assert hooked not in found, "the control"


def fitted(root: Path, overrides: list[str]) -> int:
    return trainer(root, "run", overrides).fit()


def test_a_run_logs_its_bytes_and_evaluation_does_not_count(ranks, small_corpus, tmp_path):
    steps = ["training.steps=2", "logging.every=1", "evaluation.every=1", "model.num_experts=8"]
    overrides = [*small_corpus, *EXACT, *steps]
    assert ranks(2, fitted, tmp_path, overrides) == [0, 0]
    run = config(tmp_path, "run", *overrides)
    layout = run.parallel.resolve(2)
    wanted = step_traffic(run.model, run.precision, layout, cost.BatchShape(4, 2, 48))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["collective_bytes"] for line in lines if "loss" in line]
    assert logged == [{f"{axis}/{why}": size // 2 for (axis, why), size in wanted.items()}] * 2
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["static_bytes"]
    assert kept == vars(cost.static_bytes(run.model, run.precision, layout, None))


def pairs(function: Any, arguments: Any, options: dict[str, Any]) -> int:
    """Return the query-key pairs, times heads, that a call of the attention kernel computes, or 0 for another op."""
    if "flash_attention_for_cpu." not in str(function):
        return 0
    (batch, heads, queries, _), keys = arguments[0].shape, arguments[1].shape[2]
    causal = arguments[4] if len(arguments) > 4 else options.get("is_causal", False)
    return batch * heads * (queries * (queries + 1) // 2 if causal else queries * keys)


def attention_costs(model: ModelConfig, config: ParallelConfig, layers: list[int], seq_len: int) -> Any:
    """Measure each layer's attention on this rank, for one sequence of a single document."""
    placed, found = placed_here(model, config, BF16), []
    context, part = placed.sequence_context(torch.arange(seq_len)[None]), seq_len // placed.meshes.cp.size
    for layer in layers:
        attention, kept = placed.model.layers[str(layer)].attention, {}
        heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        shapes, counts = [(1, part, n, model.head_dim) for n in heads], []
        q, k, v = (torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in shapes)

        def keep(tensor: torch.Tensor, kept: dict[Any, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr(), tensor.shape] = tensor.nbytes
            return tensor

        placed.meshes.traffic.take()
        observed = Observed(lambda *operation, counts=counts: counts.append(pairs(*operation)))
        with observed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = attention.attend(q, k, v, context, attention.layer.attention_chunk_size)
        y.sum().backward()
        flops, sent = 3 * 4 * sum(counts) * model.head_dim, sum(placed.meshes.traffic.take().values())
        found.append(cost.AttentionCost(flops, k.nbytes + v.nbytes, sum(kept.values()), sent))
    return found


@pytest.mark.parametrize("size, method", [(1, "gather"), (2, "gather"), (2, "ulysses"), (2, "ring"), (4, "ring")])
def test_what_a_layers_attention_costs(ranks, size, method):
    model, config, seq_len = tiny(1), ParallelConfig(cp=size, cp_method=ContextMethod[method]), 2 * SEQ_LEN
    chunks = [layer.attention_chunk_size is not None for layer in model.blocks]
    layers = [chunks.index(True), chunks.index(False)]
    found = ranks(size, attention_costs, model, config, layers, seq_len)
    for place, (layer, growth) in enumerate(zip(layers, (1.9, 3.9), strict=True)):
        block, layout = model.blocks[layer], config.resolve(size)
        wanted = cost.attention_cost(model, block, BF16, layout, seq_len)
        for figure in ("flops", "keys", "kept", "sent"):
            assert sum(getattr(rank[place], figure) for rank in found) == size * getattr(wanted, figure), figure
        longer = cost.attention_cost(model, block, BF16, layout, 2 * seq_len)
        assert longer.kept == 2 * wanted.kept and longer.flops / wanted.flops > growth
