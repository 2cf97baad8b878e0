"""Losses and expert loads of documents with and without images are those of one process under every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.layouts import LAYOUTS, deep
from model.config import ModelConfig
from model.vision.config import VisionConfig
from parallel.layout import ParallelConfig
from precision.config import Compute, PrecisionConfig
from tests.support.models import placed_here
from tests.support.tiny import synthetic
from train.certify.plan import shrink
from train.certify.worker import SyntheticLoader
from train.engine import inputs
from train.eval.held_out import held_out_loss
from train.optim.config import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)
MODEL: ModelConfig = shrink(replace(deep(2), vision=VisionConfig(image_token_id=63)), ParallelConfig(pp=4))


def measured(parallel: ParallelConfig, bug: bool = False) -> dict[str, Any]:
    """Return figures of the modalities: in a step of training, and on held-out sequences.

    `bug`: every rank of tp counts the image tokens of the first part of a sequence.
    """
    with pytest.MonkeyPatch.context() as patch:
        if bug:
            first = lambda placed, images: (images.rows_BT >= 0).chunk(placed.meshes.tp.size, 1)[0]  # noqa: E731
            patch.setattr(inputs, "image_positions", first)
        placed = placed_here(MODEL, parallel, PrecisionConfig(Compute.float64))
        _, _, step = synthetic(placed, SGD, 1 if parallel.pp > 1 else 2)
        result = step()
    loader = SyntheticLoader(MODEL.vocab_size, vision=MODEL.vision)
    bytes_V = torch.ones(MODEL.vocab_size, dtype=torch.int64)
    found = held_out_loss(placed, loader, bytes_V, 5, 2, {"a": 1.0})
    losses = {name: loss.item() for name, loss in result.modality_losses.items()}
    losses |= {f"held out {name}": one.loss for name, one in found.modalities.items()}
    counts = {key: result.balance[key].tolist() for key in ("counts", "image_counts")}
    return {"loss": result.loss.item(), "losses": losses, **counts}


@pytest.fixture(scope="module")
def alone(ranks) -> dict[str, Any]:
    (found,) = ranks(1, measured, ParallelConfig())
    return found


def test_one_process_against_plain_arithmetic(alone):
    """The first step shows 6 tiles of 4 tokens in two sequences."""
    for layer, images in zip(alone["counts"], alone["image_counts"], strict=True):
        assert sum(images) == 24 * 2 and sum(layer) == 8 * 64 * 2
        assert all(0 <= image <= count for image, count in zip(images, layer, strict=True))
    batch = SyntheticLoader(MODEL.vocab_size, vision=MODEL.vision).batch(0, 0, 8)
    assert batch.images is not None
    documents, shown, sizes = (batch.positions_BT == 0).cumsum(1).tolist(), set(), {True: 0, False: 0}
    for row, place in (batch.images.rows_BT >= 0).nonzero().tolist():
        shown.add((row, documents[row][place]))
    for row, place in (batch.labels_BT >= 0).nonzero().tolist():
        sizes[(row, documents[row][place]) in shown] += 1
    images, text = (alone["losses"][name] for name in ("images", "text"))
    mean = (images * sizes[True] + text * sizes[False]) / sum(sizes.values())
    assert alone["loss"] == pytest.approx(mean, rel=1e-12) and abs(images - text) > 1e-6
    assert min(sizes.values()) > 0 and set(alone["losses"]) == {"images", "text", "held out images", "held out text"}


def check(ranks, alone: dict[str, Any], count: int, *arguments: Any) -> None:
    for found in ranks(count, measured, *arguments):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        assert found["counts"] == alone["counts"] and found["image_counts"] == alone["image_counts"]


NAMES = ["fsdp2", "tp2", "cp2 ring", "ep2", "tp2 + cp2", "pp2 zbv", "pp2 one_f_one_b", "pp2 + cp2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_layout_gives_the_figures_of_one_process(ranks, alone, name):
    check(ranks, alone, *LAYOUTS[name])


@pytest.mark.slow
def test_image_tokens_counted_twice_are_noticed(ranks, alone):
    with pytest.raises(AssertionError):
        check(ranks, alone, *LAYOUTS["tp2"], True)
