"""Contrastive runs of the trainer do on several ranks and with micro-batches what they do in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.rank_pool import Pool, RankError
from tests.distributed.contrastive.pairs import overrides
from tests.support.bugs import planted
from tests.support.tiny import EXACT, figures, saved, trainer, whole
from train.contrastive.engine import ContrastiveEngine
from train.contrastive.retrieval import Retrieval, compare, held_out_retrieval
from train.trainer import Trainer

STEPS = 3
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrastive")


def words(root: Path, loss: str, micro_batch_size: int, *more: str) -> list[str]:
    chosen = [f"training.contrastive.loss={loss}", f"training.micro_batch_size={micro_batch_size}"]
    return [*overrides(root), *EXACT, "optimizer.lr=0.001", *chosen, *more]


def steps(root: Path, name: str, given: list[str], bug: str | None = None) -> dict[str, Any]:
    with planted(bug):
        return figures(root, name, given, STEPS)


@pytest.fixture(scope="module")
def alone(ranks: Pool, root: Path) -> dict[str, dict[str, Any]]:
    """The figures of one process, with one micro-batch of the whole batch."""
    return {loss: ranks(1, steps, root, f"alone-{loss}", words(root, loss, 8))[0] for loss in ("info_nce", "siglip")}


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
        given = words(root, loss, micro_batch_size, *more)
        for found in ranks(count, steps, root, f"{case}-{loss}".replace(", ", "-"), given):
            difference, where = farthest(alone[loss], found)
            assert difference < 1e-9, (loss, where)


def test_missing_feature_gradients_show(ranks, root, alone):
    bug = "features_gathered_without_gradient"
    found = ranks(2, steps, root, bug, words(root, "info_nce", 2), bug)[0]
    assert found["loss"][0] == pytest.approx(alone["info_nce"]["loss"][0], rel=1e-9)  # nothing in the loss tells
    assert farthest(alone["info_nce"] | {"loss": []}, found | {"loss": []})[0] > 1e-3


@SLOW
def test_missing_logit_gradients_show(ranks, root):
    bug = "gains_not_reduced"
    with pytest.raises(RankError, match="replicas differ"):
        ranks(2, steps, root, bug, words(root, "siglip", 2), bug)


def weights(run: Trainer) -> dict[str, Tensor]:
    placed = run.engine.placed
    return {name: whole(tensor, placed.specs[name]) for name, tensor in placed.model.named_parameters()}


def resumed(root: Path, name: str, given: list[str], stops: list[int]) -> dict[str, Tensor]:
    """Train to the last of `stops`, and save and resume at the others. Return the weights."""
    for stop in stops[:-1]:
        saved(root, name, given, stop)
    run = trainer(root, name, given)
    assert run.step == (stops[-2] if stops[1:] else 0)
    for step in range(run.step, stops[-1]):
        run.train_step(step)
    return weights(run)


@pytest.mark.slow
def test_a_resumed_run_is_equal_to_the_bit(ranks, root):
    given = [*overrides(root), "training.micro_batch_size=2", "training.contrastive.loss=siglip"]
    straight = ranks(2, resumed, root, "straight", given, [3])[0]
    stopped = ranks(2, resumed, root, "stopped", given, [1, 3])[0]
    assert straight.keys() == stopped.keys() and {"log_scale", "bias"} <= straight.keys()
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    shorter = ranks(2, resumed, root, "shorter", given, [2])[0]
    assert not torch.equal(straight["log_scale"], shorter["log_scale"])


@SLOW
def test_a_run_resumes_under_another_layout(ranks, root):
    given = words(root, "info_nce", 2)
    straight = ranks(1, resumed, root, "one", given, [3])[0]
    ranks(4, saved_only, root, "other", [*given, "parallel.dp_replicate=2"])
    moved = ranks(2, resumed_from, root, "other", given, 3)[0]
    for name, tensor in straight.items():
        assert torch.allclose(tensor, moved[name], rtol=1e-9, atol=1e-12), name


def saved_only(root: Path, name: str, given: list[str]) -> None:
    saved(root, name, given, 1)


def resumed_from(root: Path, name: str, given: list[str], stop: int) -> dict[str, Tensor]:
    run = trainer(root, name, given)
    assert run.step == 1
    for step in range(1, stop):
        run.train_step(step)
    return weights(run)


def retrieved(root: Path, name: str, given: list[str]) -> tuple[Retrieval | None, int]:
    run = trainer(root, name, given)
    assert isinstance(run.engine, ContrastiveEngine)
    loader = run.loaders["main"]
    found = held_out_retrieval(run.engine.placed, loader, run.engine.ids, run.weights, 64, 8, 2)
    return found, loader.num_held_out("text")


def test_retrieval_is_the_same_on_two_ranks(ranks, root):
    given = words(root, "info_nce", 2)
    [(one, count)] = ranks(1, retrieved, root, "retrieval-1", given)
    assert one is not None and one.pairs == count > 4
    assert one.chance == pytest.approx(1 / count)
    for other, _ in ranks(2, retrieved, root, "retrieval-2", given):
        assert vars(other) == pytest.approx(vars(one), rel=1e-9)


def test_retrieval_counts_what_is_nearest():
    generator, scale = torch.Generator().manual_seed(0), torch.tensor([2.0], dtype=torch.float64)
    images, texts = (F.normalize(torch.randn(6, 3, dtype=torch.float64, generator=generator), dim=1) for _ in range(2))
    tokens = torch.tensor([[0], [1], [2], [3], [0], [4]])  # the first and the fifth have the same caption
    found = compare(images, texts, tokens, scale, 3)
    right, losses = [0, 0], 0.0
    for side, (one, other) in enumerate(((images, texts), (texts, images))):
        for row in range(6):
            logits = [float(2.0 * one[row] @ other[column]) for column in range(6)]
            nearest = max(range(6), key=logits.__getitem__)
            right[side] += bool(tokens[nearest] == tokens[row])
            batch = logits[:3] if row < 3 else logits[3:]  # the loss compares three pairs at a time
            losses += (torch.tensor(batch).logsumexp(0).item() - logits[row]) / 12
    assert (found.to_text, found.to_image) == (right[0] / 6, right[1] / 6)
    assert found.loss == pytest.approx(losses, rel=1e-6)
    assert found.chance == pytest.approx((2 * 2 + 4) / 36)
    aligned = compare(texts, texts, tokens, scale, 3)
    assert aligned.to_text == aligned.to_image == 1.0 and aligned.loss < found.loss
