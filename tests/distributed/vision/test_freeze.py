"""A model with a frozen encoder, or with a frozen decoder, computes under every layout what one process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.layouts import LAYOUTS
from model.roles import roles_of
from parallel.layout import ParallelConfig, Recompute
from tests.distributed.vision.test_vision import CASE, MORE, ZERO, seeing
from tests.support.bugs import BuggyRanks
from train.certify.compare import GRADIENT_FP32, Comparison, compare
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

FREEZE = {"vision": ["vision"], "decoder": ["decoder"], "mixed": ["embedding", "router", "query", "vision_up", "head"]}
NAMES = ["hsdp 2x2", "tp2 + cp2", "pp2 zbv", "pp2 one_f_one_b", "all axes, hsdp", "pp2 + tp2 zero bubble"]
NAMES += [name for name in ZERO if name.endswith("tp2") or "recomputed" in name]


@pytest.mark.slow
@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_roles_under_every_kind_of_layout(ranks, name, freeze):
    """Compare resumed checkpoints too. Stage 3 has no routed experts."""
    count, config = (LAYOUTS | MORE | ZERO)[name]
    model = replace(seeing(), layer_list=[seeing().blocks[0]] * 4) if name in ZERO else seeing(2)
    (outcome,) = compare_layouts(model, [Trial((), config, count)], 3, ranks, frozen=roles_of(FREEZE[freeze]))
    assert outcome.error is None and outcome.comparisons
    failed = [c for c in outcome.comparisons if not (c.passed or (name in ZERO and is_rounding(c)))]
    assert not failed, outcome.failures()


def is_rounding(found: Comparison) -> bool:
    """AdamW divides the gradient of a key's bias by its size, which is tiny since the keys' gradients nearly cancel. So
    the rounding of float32 shows in its updates.
    """
    is_bias = found.parameter is not None and found.parameter.endswith("attention.key.bias")
    return is_bias and found.first == found.parameter and found.largest <= 2 * GRADIENT_FP32


@pytest.mark.slow
@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("name", ["fsdp2", "pp2 zbv"])
def test_muon_and_recomputation_with_frozen_roles(ranks, name, freeze):
    count, config = LAYOUTS[name]
    muon = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2)
    case = replace(CASE, optimizer=muon, frozen=roles_of(FREEZE[freeze]))
    (alone,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    found = ranks(count, run_cases, replace(config, recompute=Recompute.full), {"run": case})
    assert [c for c in compare("run", alone["run"], [rank["run"] for rank in found], case) if not c.passed] == []


@pytest.mark.slow
def test_training_what_is_frozen_is_noticed(ranks):
    count, config = LAYOUTS["fsdp2"]
    case = replace(CASE, frozen=roles_of(["vision"]))
    (alone,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    found = BuggyRanks(ranks, "frozen_roles_forgotten")(count, run_cases, config, {"run": case})
    failed = {one.name for one in compare("run", alone["run"], [r["run"] for r in found], case) if not one.passed}
    assert {"run: gradient norm", "run: updated weights"} <= failed
