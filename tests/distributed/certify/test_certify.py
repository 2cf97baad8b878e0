"""Certificates: correct layouts pass, and each known bug of a layout is caught and attributed to its axes.

Bugs are planted only in the ranks of a layout. The reference run in one process stays correct.
"""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import Any

import pytest
import torch

from core.config import load
from core.errors import ConfigError
from parallel.sharding import ShardBlock
from tests.support.bugs import BuggyRanks
from train.certify import store
from train.certify.compare import Comparison, compare_blocks, largest_difference
from train.certify.config import CertifyConfig
from train.certify.plan import TrialOutcome, axes_in_use, certificate, certify, shrink, trials
from train.certify.worker import RankResults


def config(*overrides: str) -> CertifyConfig:
    return load("certify", CertifyConfig, ["model.num_layers=4", *overrides])


BLAMED = {
    "missing_reduction": (["tp"], "gradients"),
    "doubled_divide": (["dp_shard"], "gradients"),
    "experts_left_out_of_the_norm": (["ep"], "gradient norm"),
    "balancing_term_dropped": (["tp"], "aux loss"),
    "bias_from_local_counts": (["dp_shard"], "tokens per expert"),
    "expert_gradients_over_the_wrong_group": (["ep"], "gradients"),
    "gains_not_reduced": (["tp"], "gradients"),
    "no_gradient_without_tokens": (["ep"], "has no gradient"),
    "gains_not_reduced_beside_experts": (["tp", "ep"], "gradients"),
    "moments_lost_on_the_way": (["dp_shard"], "one process's checkpoint under the layout: weights"),
    "evaluation_of_one_rank": (["dp_shard"], "held-out loss"),
    "positions_not_restarted": (["cp"], "gradients"),
    "halo_off_by_one": (["cp"], "gradients"),
    "loss_divided_by_cp": (["cp"], "loss"),
    "last_keys_of_the_ring_dropped": (["cp"], "gradients"),
    "balancing_term_dropped_in_a_stage": (["pp"], "aux loss alone: gradients"),
    "norm_of_each_stage": (["pp"], "gradient norm"),
    "tied_gradient_lost_between_stages": (["pp"], "embedding.weight"),
    "micro_batches_mixed_up": (["pp"], "gradients"),
    "weights_put_off_for_ever": (["pp"], "has no gradient"),
    "routers_saved_by_one_stage": (["pp"], "router.balance.bias_E is missing"),
    "gradients_counted_by_a_hook": (["dp_shard"], "races: rank 0: FSDP::post_backward_reduce"),
    "layers_gathered_when_they_run": (["tp"], "late gathers: rank 0: forward: layer 2"),
}
OVERRIDES = ["parallel.tp=2", "parallel.ep=2"]
FEW_RANKS = ["ranks=2", "parallel.dp_shard=1", *OVERRIDES]
IN_STAGES = ["parallel.pp=2", "parallel.schedule=zbv"]
IN_PARTS = ["parallel.cp=2", "parallel.cp_method=ring"]
COMPARED = {
    **dict.fromkeys(["sgd", "adamw", "aux loss alone", "z loss alone", "experts without tokens"], 10),
    "float32": 5,
    "one process's checkpoint under the layout": 2,
    "the layout's checkpoint in one process": 2,
}
"""Case -> number of its results that are compared."""


def outcomes(ranks: Any, bug: str | None, overrides: list[str]) -> list[TrialOutcome]:
    """Certify; return the outcomes up to the first failure."""
    found = []
    for outcome in certify(config("ranks=4", "steps=2", *overrides), BuggyRanks(ranks, bug)):
        found.append(outcome)
        if not outcome.passed:
            break
    return found


def test_a_correct_layout_passes(ranks):
    """One layout is enough: in the tests of planted bugs, the layouts tried before the failing one must pass too."""
    (outcome,) = outcomes(ranks, None, [*FEW_RANKS, "parallel.tp=1"])
    assert outcome.trial.name == "dp_shard=2 ep=2" and outcome.passed, outcome.failures()
    assert 0 < outcome.largest(1e-9) < 1e-12
    assert Counter(c.name.partition(": ")[0] for c in outcome.comparisons) == COMPARED


PARTS = {
    "ring, top-2": ("cp=2", [*IN_PARTS, "model.router.top_k=2"]),
    "cp4, ring": ("cp=4", ["parallel.cp=4", "parallel.cp_method=ring"]),
    "tp2": ("cp=2 tp=2", ["parallel.cp=2", "parallel.tp=2", "parallel.cp_method=ulysses"]),
    "no chunks": ("cp=2", [*IN_PARTS, "model.attention_chunk_size=null"]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in PARTS])
def test_sequences_in_parts_pass(ranks, name):
    """Documents start inside chunks. All balancing terms are on. test_layouts.py tests layouts of `bench.layouts`."""
    last, overrides = PARTS[name]
    found = outcomes(ranks, None, ["parallel.dp_shard=1", *overrides])
    assert found[-1].trial.name == last
    for outcome in found:
        assert outcome.passed and outcome.largest(1e-9) < 1e-12, outcome.failures()


QUICK = {
    "missing_reduction",
    "doubled_divide",
    "bias_from_local_counts",
}


@pytest.mark.parametrize("bug", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BLAMED])
def test_a_planted_bug_is_caught_and_blamed(ranks, bug):
    axes, what = BLAMED[bug]
    usual = {"tp ep": FEW_RANKS, "cp": IN_PARTS, "pp": IN_STAGES}.get(" ".join(axes), OVERRIDES)
    overrides = ["parallel.pp=2", "model.tie_embeddings=true"] if bug.startswith("tied") else usual
    found = outcomes(ranks, bug, overrides)
    content = certificate(config(*overrides), found, {})
    assert content["pass"] is False
    assert content["smallest_failing_axes"] == axes, content["first_failure"]
    assert any(what in line for line in found[-1].failures()), list(found[-1].failures())


SEES = "model.vision={image_token_id: 63}"
SIGHT = {
    "rows_placed_before_the_scatter": (["tp"], OVERRIDES),
    "encoder_not_summed_over_tp": (["tp"], OVERRIDES),
    "tiles_on_two_ranks": (["cp"], IN_PARTS),
    "tiles_in_reverse_order": (["dp_shard"], OVERRIDES),
    "encoder_skipped_without_images": (["dp_shard"], OVERRIDES),
}
"""Bug of the vision encoder -> the axes blamed, and the overrides."""


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["parallel.tp=2", "parallel.cp=2"], IN_STAGES], ids=["tp-cp", "pp"])
def test_a_model_with_vision_is_certified(ranks, overrides):
    for outcome in outcomes(ranks, None, [*overrides, SEES]):
        assert outcome.passed and outcome.largest(1e-9) < 1e-12, outcome.failures()
    assert "vision" in certificate(config(*overrides, SEES), [], {})["model"]


@pytest.mark.slow
@pytest.mark.parametrize("bug", SIGHT)
def test_a_planted_bug_of_vision_is_blamed(ranks, bug):
    axes, overrides = SIGHT[bug]
    failed = outcomes(ranks, bug, [*overrides, SEES])[-1]
    assert not failed.passed and list(failed.trial.axes) == axes, failed.failures()


@pytest.mark.slow
def test_muon_is_certified_in_place_of_adamw(ranks):
    """Orthogonalising each shard by itself is caught, and only in the results of Muon."""
    muon = [*FEW_RANKS, "optimizer=muon", "optimizer.lr=3"]
    (honest, *_) = found = outcomes(ranks, None, [*muon, "parallel.ep=1"])
    assert [outcome.passed for outcome in found] == [True], honest.failures()
    wanted = {{"adamw": "muon"}.get(name, name): count for name, count in COMPARED.items()}
    assert Counter(c.name.partition(": ")[0] for c in honest.comparisons) == wanted
    (failed,) = outcomes(ranks, "shards_made_orthogonal", muon)
    assert failed.trial.axes == ("tp",) and failed.failures()[0].startswith("muon: loss differs")
    assert not any(line.startswith(("sgd", "float32")) for line in failed.failures())


def names(*overrides: str) -> tuple[list[str], list[str]]:
    chosen, omitted = trials(config(*overrides))
    return [trial.name for trial in chosen], omitted


def test_trials_are_axes_pairs_all_and_the_configured():
    chosen, omitted = names("parallel.ep=4", "parallel.tp=2", "parallel.dp_replicate=1")
    pairs = "dp_shard=2 ep=2, dp_shard=2 tp=2, dp_shard=4 ep=2, tp=2 ep=2"
    assert ", ".join(chosen) == f"dp_shard=2, tp=2, {pairs}, dp_shard=2 tp=2 ep=2, dp_shard=4 tp=2 ep=4"
    assert omitted == []
    assert axes_in_use(config("parallel.dp_shard=1").parallel) == ("dp_shard",), "at least one axis is tried"


def test_layouts_that_do_not_fit_are_omitted_or_rejected():
    chosen, omitted = names("parallel.tp=2", "parallel.ep=2", "parallel.etp=2", "parallel.dp_replicate=2")
    assert omitted == ["dp_replicate=2 dp_shard=4 tp=2 ep=2 etp=2: takes 16 processes"]
    assert "dp_replicate=2 dp_shard=2 tp=2 ep=2 etp=2" not in chosen
    assert names("parallel.dp_shard=1", "model.num_kv_heads=8", "model.num_heads=8", "parallel.tp=8")[1] == []
    with pytest.raises(ConfigError, match=r"ranks=2: dp_shard with tp takes 4 processes; try 4"):
        names("ranks=2", "parallel.tp=2")
    with pytest.raises(ConfigError, match=r"parallel.dispatch=deepep: DeepEP is not installed: pip install"):
        names("parallel.ep=2", "parallel.dispatch=deepep")


def test_nan_does_not_pass():
    """A NaN fails wherever it is, although Python's `max` may skip it."""
    block = ShardBlock((0,), (2,))
    right, wrong = [(block, torch.ones(2))], [(block, torch.tensor([1.0, float("nan")]))]
    for first, found in (("b", {"a": right, "b": wrong}), ("a", {"a": wrong, "b": right})):
        comparison = compare_blocks("gradients", {"a": right, "b": right}, [found], 1e-9)
        assert not comparison.passed and comparison.first == first
    honest, broken = RankResults(loss=[1.0, 1.0]), RankResults(loss=[1.0, float("nan")])
    assert largest_difference("loss", honest, [honest, broken]) == float("inf")
    assert largest_difference("loss", honest, [broken], False) == float("inf")


def test_a_shrunk_model_keeps_kinds_of_layers_and_choices():
    whole = config("model=llama4_maverick").model
    small = shrink(whole)
    kind = attrgetter("feed_forward", "rope", "qk_norm", "temperature")
    kinds = set(map(kind, whole.blocks))
    assert set(map(kind, small.blocks)) == kinds
    assert small.router == whole.router and small.num_layers == len(kinds)
    assert shrink(config("model=qwen3_30b_a3b").model).router.top_k == 4


def test_a_certificate_covers_axes_model_techniques_and_code(tmp_path, monkeypatch):
    asked = config("parallel.tp=2")
    content = certificate(asked, [TrialOutcome(trials(asked)[0][0], [Comparison("x", 0.0, 1.0)])], {})
    assert content["pass"]
    store.save(content, tmp_path)

    def found(axes: dict[str, int], *overrides: str) -> str | None:
        other = config("parallel.tp=2", *overrides)
        return store.find(axes, other.model, other.parallel, tmp_path, other.optimizer.kind)

    assert found({"tp": 4}) == found({"tp": 2, "dp_shard": 8}) == found({"tp": 2}, "model.hidden_size=256") is not None
    assert found({"ep": 2}) is None
    assert found({"tp": 4}, "model.router.score=softmax") is None
    assert found({"tp": 4}, "parallel.recompute=full") is None
    assert found({"tp": 4}, "optimizer=muon") is None and found({"tp": 4}, "optimizer=sgd") is not None
    with monkeypatch.context() as patch:
        patch.setattr(store, "sources_digest", lambda: "other")
        assert found({"tp": 4}) is None
    store.save({**content, "pass": False}, tmp_path)
    assert found({"tp": 4}) is None, "a failed certificate replaces a passed one"
