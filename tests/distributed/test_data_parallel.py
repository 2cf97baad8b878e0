"""1, 2 and 4 ranks compute the same: losses, every gradient, the norm, the balancing figures, the updated weights.

Each bug that data parallelism is known to have silently is planted once, and the comparison must notice it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load
from core.errors import ConfigError
from data.loader import Loader
from parallel.mesh import MeshAxis
from tests.support.bugs import BUGS, Plant, replaced
from tests.support.tiny import EXACT, figures
from train.config import TrainConfig
from train.engine import base


def relative(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of each kind of figure."""
    result = {
        key: max(relative(a, b) for a, b in zip(found[key], wanted[key], strict=True))
        for key in ("loss", "norm", "aux", "z", "entropy")
    }
    for key in ("gradients", "weights"):
        assert found[key].keys() == wanted[key].keys()
        result[key] = max(relative(found[key][name], wanted[key][name]) for name in wanted[key])
    result["counts"] = float(any(not torch.equal(a, b) for a, b in zip(found["counts"], wanted["counts"], strict=True)))
    return result


def averaged_gradients(plant: Plant) -> None:
    BUGS["doubled_divide"](plant)


def unsummed(plant: Plant, chosen: Callable[[torch.Tensor, str], bool]) -> None:
    honest = MeshAxis.sum
    plant(MeshAxis, "sum", lambda self, t, purpose: None if chosen(t, purpose) else honest(self, t, purpose))


def local_norm(plant: Plant) -> None:
    unsummed(plant, lambda tensor, purpose: purpose == "norm")


def local_token_count(plant: Plant) -> None:
    unsummed(plant, lambda tensor, purpose: tensor.dtype is torch.int64)


def local_expert_counts(plant: Plant) -> None:
    unsummed(plant, lambda tensor, purpose: purpose == "balance")


def same_sequences_on_every_rank(plant: Plant) -> None:
    batch = Loader.batch
    plant(Loader, "batch", lambda self, step, start, stop: batch(self, step, 0, stop - start))


def one_micro_batch_lost(plant: Plant) -> None:
    split = base._micro_batches
    plant(base, "_micro_batches", lambda *arguments: list(split(*arguments))[:-1])


NOTICED_IN = {
    averaged_gradients: "gradients",
    local_norm: "norm",
    local_token_count: "gradients",
    local_expert_counts: "counts",
    same_sequences_on_every_rank: "gradients",
    one_micro_batch_lost: "gradients",
}


def sabotaged(root: Path, name: str, overrides: list[str], bug: Callable[[Plant], None]) -> dict[str, Any]:
    with replaced() as plant:
        bug(plant)
        return figures(root, name, overrides)


@pytest.fixture(scope="module")
def alone(ranks, small_corpus, tmp_path_factory):
    """What one process computes."""
    return ranks(1, figures, tmp_path_factory.mktemp("one"), "run", [*small_corpus, *EXACT])[0]


@pytest.mark.parametrize(
    "count, layout",
    [
        (2, []),
        (4, ["parallel.dp_replicate=2"]),
        (2, ["parallel.recompute=full"]),
        (2, ["training.micro_batch_size=4"]),
    ],
    ids=["fsdp2", "hsdp2x2", "recompute", "other-micro-batch"],
)
def test_ranks_compute_what_one_process_computes(ranks, small_corpus, alone, tmp_path, count, layout):
    results = ranks(count, figures, tmp_path, "run", [*small_corpus, *EXACT, *layout])
    for found in results:
        differences = worst(found, alone)
        assert max(differences.values()) < 1e-9, differences


def test_gradients_may_be_summed_in_bfloat16(ranks, small_corpus, alone, tmp_path):
    """Each parameter's gradient is rounded to 8 bits on its way. Nothing else is."""
    found = ranks(2, figures, tmp_path, "run", [*small_corpus, *EXACT, "parallel.reduce_dtype=bfloat16"], 1)[0]
    rounding = {name: relative(found["gradients"][name], whole) for name, whole in alone["gradients"].items()}
    assert min(rounding.values()) > 1e-4 and max(rounding.values()) < 1e-2, rounding
    assert relative(found["loss"][0], alone["loss"][0]) < 1e-9 and relative(found["norm"][0], alone["norm"][0]) < 1e-2


def test_balancing_over_the_whole_batch_is_independent_of_ranks(ranks, small_corpus, tmp_path):
    """The scope `sequence`, the default, is in the other tests."""
    overrides = [*small_corpus, *EXACT, "model.balance.aux_scope=whole", "model.balance.aux=0.1"]
    one, two = (ranks(count, figures, tmp_path, f"run{count}", overrides)[0] for count in (1, 2))
    differences = worst(two, one)
    assert max(differences.values()) < 1e-9, differences


def test_float32_losses_agree(ranks, small_corpus, tmp_path):
    overrides = [*small_corpus, "optimizer=adamw", "precision=fp32"]
    one, four = (ranks(n, figures, tmp_path, f"run{n}", overrides, 3)[0]["loss"] for n in (1, 4))
    assert four == pytest.approx(one, abs=5e-6)


def test_bfloat16_is_close_under_sharding(ranks, small_corpus, tmp_path):
    overrides = [*small_corpus, "optimizer=sgd", "precision=bf16"]
    one, two = (ranks(n, figures, tmp_path, f"run{n}", overrides, 3)[0] for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    assert {w.dtype for w in two["weights"].values() if w.is_floating_point()} == {torch.float32}, "masters stay wide"


def test_parameters_may_be_kept_in_bfloat16(ranks, small_corpus, tmp_path):
    overrides = [
        *small_corpus,
        "optimizer=adamw",
        "optimizer.lr=1e-2",
        "precision=bf16",
        "precision.param_dtype=bfloat16",
    ]
    one, two = (ranks(n, figures, tmp_path, f"run{n}", overrides, 6)[0] for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2) and two["loss"][-1] < two["loss"][0] - 0.1
    kept = {name: w.dtype for name, w in two["weights"].items() if w.is_floating_point() and "balance" not in name}
    assert set(kept.values()) == {torch.bfloat16}, kept
    with pytest.raises(ConfigError, match=r"precision\.param_dtype=bfloat16: needs bfloat16 products"):
        load("train", TrainConfig, ["precision=fp32", "precision.param_dtype=bfloat16"])


@pytest.mark.parametrize("bug", NOTICED_IN, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_noticed(ranks, small_corpus, alone, tmp_path, bug):
    found = ranks(2, sabotaged, tmp_path, "run", [*small_corpus, *EXACT], bug)[0]
    assert worst(found, alone)[NOTICED_IN[bug]] > 1e-3
