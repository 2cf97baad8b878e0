"""Contrastive runs of the trainer do on several ranks and with micro-batches what they do in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.rank_pool import Pool
from tests.support.bugs import planted
from tests.support.contrastive import SIZES, pairs_of
from tests.support.tiny import EXACT, figures

STEPS = 3
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrastive")


def overrides(root: Path, loss: str, micro_batch_size: int, *more: str) -> list[str]:
    chosen = [
        f"training.contrastive.loss={loss}",
        f"training.micro_batch_size={micro_batch_size}",
        "optimizer.lr=0.001",
    ]
    return [*SIZES, *pairs_of(root / "cache"), *EXACT, *chosen, *more]


def steps(root: Path, name: str, words: list[str], bug: str | None = None) -> dict[str, Any]:
    with planted(bug):
        return figures(root, name, words, STEPS)


@pytest.fixture(scope="module")
def alone(ranks: Pool, root: Path) -> dict[str, dict[str, Any]]:
    """The figures of one process, with one micro-batch of the whole batch."""
    return {
        loss: ranks(1, steps, root, f"alone-{loss}", overrides(root, loss, 8))[0] for loss in ("info_nce", "siglip")
    }


def farthest(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """Return the largest difference of two results, relative to the largest value of its tensor, and where it is."""
    found = [(0.0, "")]
    for key in ("loss", "norm"):
        pairs = zip(one[key], other[key], strict=True)
        found += [(abs(a - b) / max(abs(a), 1e-30), f"{key} of step {n}") for n, (a, b) in enumerate(pairs)]
    for key in ("gradients", "weights"):
        assert one[key].keys() == other[key].keys()
        for name, tensor in one[key].items():
            size = tensor.abs().max().clamp_min(1e-12)
            found.append((float((tensor - other[key][name]).abs().max() / size), f"{key} of {name}"))
    return max(found)


CASES = {
    "micro-batches": (1, 2, []),
    "fsdp2": (2, 4, []),
    "fsdp2, micro-batches": (2, 2, []),
    "fsdp4, micro-batches": (4, 1, []),
    "hsdp": (4, 2, ["parallel.dp_replicate=2"]),
    "replicas": (2, 4, ["parallel.dp_replicate=2"]),
    "recomputation": (2, 2, ["parallel.recompute=full"]),
}
QUICK = ("fsdp2, micro-batches",)


@pytest.mark.parametrize("case", [pytest.param(one, marks=[] if one in QUICK else SLOW) for one in CASES])
def test_layouts_and_micro_batches_change_nothing(ranks, root, alone, case):
    count, micro_batch_size, more = CASES[case]
    for loss in alone:
        words = overrides(root, loss, micro_batch_size, *more)
        for found in ranks(count, steps, root, f"{case}-{loss}".replace(", ", "-"), words):
            difference, where = farthest(alone[loss], found)
            assert difference < 1e-9, (loss, where)


@pytest.mark.parametrize("bug", ["features_gathered_without_gradient", "gains_not_reduced"])
def test_a_planted_bug_shows_in_the_gradients(ranks, root, alone, bug):
    loss = "info_nce"
    found = ranks(2, steps, root, f"{bug}-{loss}", overrides(root, loss, 2), bug)[0]
    assert found["loss"][0] == pytest.approx(alone[loss]["loss"][0], rel=1e-9)  # nothing in the loss tells
    difference, where = farthest({**alone[loss], "loss": []}, {**found, "loss": []})
    assert difference > 1e-3, where
