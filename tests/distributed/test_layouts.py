"""The layouts that docs/certified.md lists: some in quick tests, all in slow ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.layouts import LAYOUTS, PAGE, RESUMED, deep, resumes, tiny
from model.config import (
    AuxScope,
    BalanceConfig,
    FeedForward,
    LatentConfig,
    ModelConfig,
    QKNorm,
    RouterConfig,
    WeightsOn,
)
from parallel.layout import ContextMethod, DispatchMethod, ParallelConfig, Recompute, ReduceEvery
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import BuggyRanks
from train.certify.compare import EXACT, Comparison, compare
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import CertifyCase, RankResults, run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)


def test_the_page_lists_every_layout():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "| yes |" in line]
    assert set(rows) == set(LAYOUTS)


def assert_as_one_process(ranks, count: int, config: ParallelConfig, model: ModelConfig) -> None:
    (outcome,) = compare_layouts(model, [Trial((), config, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


QUICK = {
    "pp-zbv": (2, ParallelConfig(pp=2, schedule=PipelineSchedule.zbv), 2),
    "pp-ep": (4, ParallelConfig(pp=2, ep=2), 2),
}
ONE_STEP = {
    "hsdp-selective": (4, ParallelConfig(dp_replicate=2, recompute=Recompute.selective), 1),
    "ep-etp-gathered": (4, ParallelConfig(ep=2, etp=2, dispatch=DispatchMethod.all_gather), 2),
    "ep-by-node": (4, ParallelConfig(ep=4, exchange_node_size=2), 2),
}
"""Layouts of which quick tests compare one step, and slow tests everything."""
SLOW = {
    **ONE_STEP,
    "fsdp-reduced-once": (2, ParallelConfig(reduce_every=ReduceEvery.step), 2),
    "hsdp-reduced-once": (4, ParallelConfig(dp_replicate=2, reduce_every=ReduceEvery.step), 2),
    "ep-by-node-recomputed": (8, ParallelConfig(ep=4, exchange_node_size=2, recompute=Recompute.full), 2),
    "pp-tied": (3, ParallelConfig(pp=3), 1),
    "all-axes-recomputed": (8, ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2, recompute=Recompute.full), 2),
    "pp-tp-zero-bubble": (4, ParallelConfig(pp=2, tp=2, schedule=PipelineSchedule.interleaved_zero_bubble), 2),
    "pp-fsdp": (4, ParallelConfig(pp=2), 2),
    "pp-hsdp-dualpipev": (4, ParallelConfig(pp=2, dp_replicate=2, schedule=PipelineSchedule.dualpipev), 2),
    "pp-tp-ep-fsdp-zbv": (8, ParallelConfig(pp=2, tp=2, ep=2, schedule=PipelineSchedule.zbv), 2),
}
"""Layouts besides those of the page."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layout_computes_what_one_process_does(ranks, name):
    """Compare gradients, norm, balancing terms, updates, evaluation and resumed checkpoints in float64 and float32."""
    count, config, top_k = (QUICK | SLOW)[name]
    assert_as_one_process(ranks, count, config, replace(deep(top_k), tie_embeddings=name == "pp-tied"))


@pytest.mark.slow
@pytest.mark.parametrize("config, count", [(ParallelConfig(dp_replicate=2), 4), (SLOW["fsdp-reduced-once"][1], 2)])
def test_lost_sums_of_micro_batches_are_noticed(ranks, config, count):
    """The gradients of the last micro-batch alone differ, also where only the replicas are summed once per step."""
    bug = BuggyRanks(ranks, "sums_of_earlier_micro_batches_dropped")
    (outcome,) = compare_layouts(deep(1), [Trial((), config, count)], 2, bug)
    assert any("sgd: gradients differs" in line for line in outcome.failures()), outcome.failures()


def with_norm(norm: QKNorm) -> ModelConfig:
    model = tiny(1)
    return replace(model, layer_list=[replace(layer, qk_norm=norm) for layer in model.blocks])


def compared(
    ranks, case: CertifyCase, count: int, config: ParallelConfig
) -> tuple[list[RankResults], list[Comparison]]:
    """Run under the layout and in one process. Return the ranks' results and the comparisons that failed."""
    (wanted,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    found = [rank["run"] for rank in ranks(count, run_cases, config, {"run": case})]
    return found, [comparison for comparison in compare("run", wanted["run"], found, case) if not comparison.passed]


def balanced(scope: AuxScope) -> ModelConfig:
    return replace(tiny(1), balance=BalanceConfig(aux=0.1, aux_scope=scope))


def latent() -> ModelConfig:
    """Return a model with latent attention and experts in groups."""
    router = RouterConfig(2, norm_topk_prob=True, weights_on=WeightsOn.output, groups=4, top_groups=2)
    sizes = {
        "num_heads": 4,
        "num_kv_heads": 4,
        "latent": LatentConfig(kv_rank=24, query_rank=16, rope_dim=4, value_dim=6),
    }
    return replace(with_norm(QKNorm.none), router=router, **sizes)


MODELS = {
    "micro-scope-tp": (balanced(AuxScope.micro), 2, ParallelConfig(tp=2)),
    "whole-scope": (balanced(AuxScope.whole), 2, ParallelConfig()),
    "norm-over-all-heads-tp": (with_norm(QKNorm.full), 2, ParallelConfig(tp=2)),
    "latent-groups-tp": (latent(), 2, ParallelConfig(tp=2)),
    "norm-per-head-tp": (with_norm(QKNorm.per_head), 2, ParallelConfig(tp=2)),
    "experts-fewer-than-ranks": (replace(tiny(1), num_experts=2), 4, ParallelConfig()),
    "selective-ep": (tiny(2), 2, ParallelConfig(ep=2, recompute=Recompute.selective)),
    **{name: (tiny(top_k), count, config) for name, (count, config, top_k) in ONE_STEP.items()},
}


@pytest.mark.parametrize("name", MODELS)
def test_layouts_depend_on_the_model(ranks, name):
    """Run one step. Aux scope `micro` needs tp alone, under which micro-batches are the same as in one process."""
    model, count, config = MODELS[name]
    _, differing = compared(ranks, CertifyCase(model, PrecisionConfig(Compute.float64), SGD), count, config)
    assert differing == []


@pytest.mark.parametrize("dispatch", [DispatchMethod.all_to_all, DispatchMethod.all_gather])
def test_experts_without_tokens_in_float32(ranks, dispatch):
    """Test the grouped matmul, which float64 does not use, with no rows on the first rank."""
    model = replace(tiny(1), balance=BalanceConfig(bias_rate=0.01))
    case = CertifyCase(model, PrecisionConfig(Compute.float32), SGD, starve=True)
    found, differing = compared(ranks, case, 2, ParallelConfig(ep=2, dispatch=dispatch))
    assert differing == []
    assert not any(counts.view(-1, 2, 4)[:, 0].any() for counts in found[0].balance["counts"])
    experts = [name for name in found[0].gradients if ".experts." in name]
    assert len(experts) == 2 * sum(layer.feed_forward is FeedForward.moe for layer in model.blocks)
    for name in experts:
        idle, busy = (rank.gradients[name][0][1] for rank in found)
        assert not idle.any() and busy.any(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_listed_layout(ranks, name):
    """Use top-2 routing, the harder case, with each recompute mode and, under ep, each dispatcher."""
    count, config = LAYOUTS[name]
    others = [DispatchMethod.all_gather] if config.ep > 1 and config.exchange_node_size is None else []
    for dispatch in (config.dispatch, *others):
        for mode in Recompute:
            assert_as_one_process(ranks, count, replace(config, recompute=mode, dispatch=dispatch), deep(2))


@pytest.mark.slow
@pytest.mark.parametrize("names", [["fsdp2", "tp2 + ep2", "etp2"], [*RESUMED]])
def test_a_checkpoint_resumes_under_other_layouts(ranks, names):
    found = list(resumes(ranks, names))
    assert len(found) == len(names) ** 2
    assert max(difference for _, _, difference in found) < EXACT, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, config",
    [(1, ParallelConfig()), (2, ParallelConfig(tp=2)), (2, ParallelConfig(cp=2, cp_method=ContextMethod.ring))],
    ids=["one", "tp2", "cp2"],
)
def test_compiled_layers_compute_the_same(ranks, count, config):
    case = CertifyCase(tiny(2), PrecisionConfig(Compute.float64), OptimizerConfig(lr=1e-2), steps=2)
    (eager,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    compiled = ranks(count, run_cases, replace(config, compile=True), {"run": case}, timeout_s=600)
    for comparison in compare("compiled", eager["run"], [rank["run"] for rank in compiled], case):
        assert comparison.passed, comparison
