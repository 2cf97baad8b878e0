"""Compare a run of two ranks with one process: losses, gradients, norm, load-balancing statistics and updated weights.

Each known silent bug of data parallelism is planted once, and the comparison must notice it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Loader
from parallel.mesh import MeshAxis
from tests.support.bugs import planted, replaces
from tests.support.tiny import EXACT, figures
from train.engine import base


def relative(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative difference of each kind of result, over steps or parameters."""
    result = {}
    for kind in wanted:
        ours, theirs = (dict(enumerate(f[kind])) if isinstance(f[kind], list) else f[kind] for f in (found, wanted))
        assert ours.keys() == theirs.keys()
        result[kind] = max(relative(ours[key], theirs[key]) for key in theirs)
    return result


@replaces(MeshAxis, "sum")
def local_norm(honest, self, tensor, purpose):
    if purpose != "norm":
        honest(self, tensor, purpose)


@replaces(MeshAxis, "sum")
def local_token_count(honest, self, tensor, purpose):
    if tensor.dtype is not torch.int64:
        honest(self, tensor, purpose)


@replaces(Loader, "batch")
def same_sequences_on_every_rank(honest, self, step, start, stop):
    return honest(self, step, 0, stop - start)


@replaces(base, "_micro_batches")
def one_micro_batch_lost(honest, *arguments):
    return list(honest(*arguments))[:-1]


NOTICED_IN = {
    "doubled_divide": "gradients",
    "local_norm": "norm",
    "local_token_count": "gradients",
    "bias_from_local_counts": "counts",
    "same_sequences_on_every_rank": "gradients",
    "one_micro_batch_lost": "gradients",
}


def sabotaged(root: Path, name: str, overrides: list[str], bug: str) -> dict[str, Any]:
    with planted(bug):
        return figures(root, name, overrides)


@pytest.fixture(scope="module")
def alone(ranks, small_corpus, tmp_path_factory):
    return ranks(1, figures, tmp_path_factory.mktemp("one"), "run", [*small_corpus, *EXACT])[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_computes(ranks, small_corpus, alone, tmp_path, size):
    overrides = [*small_corpus, *EXACT, f"training.micro_batch_size={size}"]
    for found in ranks(2, figures, tmp_path, "run", overrides):
        differences = worst(found, alone)
        assert max(differences.values()) < 1e-9, differences


def test_gradients_may_be_summed_in_bfloat16(ranks, small_corpus, alone, tmp_path):
    """Gradients are rounded to the 8 significant bits of bfloat16 while they are summed over ranks, but for those of
    routers.
    """
    found = ranks(2, figures, tmp_path, "run", [*small_corpus, *EXACT, "parallel.reduce_dtype=bfloat16"], 1)[0]
    rounding = {name: relative(found["gradients"][name], whole) for name, whole in alone["gradients"].items()}
    routers = [rounding.pop(name) for name in list(rounding) if "router" in name]
    assert routers and max(routers) < 1e-12 < 1e-4 < min(rounding.values()) and max(rounding.values()) < 1e-2, rounding
    assert relative(found["loss"][0], alone["loss"][0]) < 1e-9 and relative(found["norm"][0], alone["norm"][0]) < 1e-2


@pytest.mark.parametrize(
    "dtype, overrides, tolerance",
    [
        (torch.float32, ["optimizer=sgd"], 2e-3),
        (torch.bfloat16, ["optimizer=adamw", "optimizer.lr=1e-2", "precision.param_dtype=bfloat16"], 1e-2),
    ],
)
def test_bfloat16_is_close_under_sharding(ranks, small_corpus, tmp_path, dtype, overrides, tolerance):
    overrides = [*small_corpus, "precision=bf16", *overrides]
    one, two = (ranks(n, figures, tmp_path, f"run{n}", overrides, 6)[0] for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=tolerance) and two["loss"][-1] < two["loss"][0] - 0.1
    kept = {name: w.dtype for name, w in two["weights"].items() if w.is_floating_point() and "balance" not in name}
    assert set(kept.values()) == {dtype}, kept


@pytest.mark.parametrize("bug", NOTICED_IN)
def test_planted_bugs_are_noticed(ranks, small_corpus, alone, tmp_path, bug):
    found = ranks(2, sabotaged, tmp_path, "run", [*small_corpus, *EXACT], bug)[0]
    assert worst(found, alone)[NOTICED_IN[bug]] > 1e-3
