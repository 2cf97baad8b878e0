"""1, 2 and 4 ranks compute the same: losses, every gradient, the norm, the balancing figures, the updated weights.

Each way in which data parallelism has been seen to go wrong silently is planted once, and the comparison must notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load
from core.errors import ConfigError
from tests.support.tiny import EXACT, figures
from train.config import TrainConfig


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


def sabotaged(root: Path, name: str, overrides: list[str], what: str) -> dict[str, Any]:
    """The same figures with one reduction broken in this process."""
    import parallel.fsdp
    from data.loader import Loader
    from parallel.mesh import MeshAxis
    from train.engine import base

    undo: list[tuple[Any, str, Any]] = []

    def plant(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    if what == "averaged gradients":
        plant(parallel.fsdp.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
        plant(parallel.fsdp.FSDPModule, "set_force_sum_reduction_for_comms", lambda self, on: None)
    elif what == "local norm":
        real = MeshAxis.sum
        plant(MeshAxis, "sum", lambda self, t, purpose: None if purpose == "norm" else real(self, t, purpose))
    elif what == "local token count":
        real = MeshAxis.sum

        def keep_counts(self: MeshAxis, tensor: torch.Tensor, purpose: str) -> None:
            if tensor.dtype is not torch.int64:
                real(self, tensor, purpose)

        plant(MeshAxis, "sum", keep_counts)
    elif what == "local expert counts":
        real = MeshAxis.sum
        plant(MeshAxis, "sum", lambda self, t, purpose: None if purpose == "balance" else real(self, t, purpose))
    elif what == "same rows on every rank":
        batch = Loader.batch
        plant(Loader, "batch", lambda self, step, start, stop: batch(self, step, 0, stop - start))
    elif what == "one micro-batch lost":
        cut = base._micro_batches
        plant(base, "_micro_batches", lambda *arguments: list(cut(*arguments))[:-1])
    try:
        return figures(root, name, overrides)
    finally:
        for owner, attribute, value in undo:
            setattr(owner, attribute, value)


@pytest.fixture(scope="module")
def alone(ranks, small_corpus, tmp_path_factory):
    """What one process computes."""
    return ranks(1, figures, tmp_path_factory.mktemp("one"), "run", [*small_corpus, *EXACT])[0]


@pytest.mark.parametrize(
    "count, layout",
    [
        (2, []),
        (4, []),
        (4, ["parallel.dp_replicate=2"]),
        (2, ["parallel.recompute=full"]),
        (2, ["training.micro_batch_size=4"]),
    ],
    ids=["fsdp2", "fsdp4", "hsdp2x2", "recompute", "other-micro-batch"],
)
def test_ranks_compute_what_one_process_computes(ranks, small_corpus, alone, tmp_path, count, layout):
    results = ranks(count, figures, tmp_path, "run", [*small_corpus, *EXACT, *layout])
    for found in results:
        differences = worst(found, alone)
        assert max(differences.values()) < 1e-9, differences


def test_gradients_may_be_summed_in_bfloat16(ranks, small_corpus, alone, tmp_path):
    """Each parameter's gradient is rounded to 8 bits on its way, and nothing else is."""
    found = ranks(2, figures, tmp_path, "run", [*small_corpus, *EXACT, "parallel.reduce_dtype=bfloat16"], 1)[0]
    rounding = {name: relative(found["gradients"][name], whole) for name, whole in alone["gradients"].items()}
    assert min(rounding.values()) > 1e-4 and max(rounding.values()) < 1e-2, rounding
    assert relative(found["loss"][0], alone["loss"][0]) < 1e-9 and relative(found["norm"][0], alone["norm"][0]) < 1e-2


@pytest.mark.parametrize("scope", ["whole", "sequence"])
def test_balancing_scopes_do_not_depend_on_the_ranks(ranks, small_corpus, tmp_path, scope):
    overrides = [*small_corpus, *EXACT, f"model.balance.aux_scope={scope}", "model.balance.aux=0.1"]
    one = ranks(1, figures, tmp_path, "one", overrides, 3)[0]
    two = ranks(2, figures, tmp_path, "two", overrides, 3)[0]
    differences = worst(two, one)
    assert max(differences.values()) < 1e-9, differences


def test_float32_losses_agree(ranks, small_corpus, tmp_path):
    overrides = [*small_corpus, "optimizer=adamw", "precision=fp32"]
    one, two, four = (ranks(n, figures, tmp_path, f"run{n}", overrides, 3)[0]["loss"] for n in (1, 2, 4))
    assert two == pytest.approx(one, abs=5e-6) and four == pytest.approx(one, abs=5e-6)


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
    with pytest.raises(ConfigError, match=r"precision\.storage=bfloat16: would lose what wider products gain"):
        load("train", TrainConfig, ["precision=fp32", "precision.param_dtype=bfloat16"])


@pytest.mark.parametrize(
    "what, noticed_in",
    [
        ("averaged gradients", "gradients"),
        ("local norm", "norm"),
        ("local token count", "gradients"),
        ("local expert counts", "counts"),
        ("same rows on every rank", "gradients"),
        ("one micro-batch lost", "gradients"),
    ],
)
def test_planted_bugs_are_noticed(ranks, small_corpus, alone, tmp_path, what, noticed_in):
    found = ranks(2, sabotaged, tmp_path, "run", [*small_corpus, *EXACT], what)[0]
    assert worst(found, alone)[noticed_in] > 1e-3
