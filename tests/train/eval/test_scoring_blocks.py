"""Scores by blocks are those of whole logits, which are never made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import head
from tests.model.attention.test_cache import FAMILIES
from tests.support.models import build
from train.eval import scoring_model
from train.eval.scoring_model import ScoringModel, TokenWindow

WINDOWS = [TokenWindow(0, list(range(3, 40)), 20), TokenWindow(1, [5, 9, 2, 60, 1], 4)]


class Largest(TorchDispatchMode):
    """Notes the largest number of elements of any result."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.fixture
def model(monkeypatch) -> ScoringModel:
    config = replace(FAMILIES["llama4"], vocab_size=4096)
    monkeypatch.setattr(head, "_MULTIPLE", 64)
    monkeypatch.setattr(head, "_BLOCK_BYTES", 8 * 16 * 128)
    network: Any = build(config, seed=1)
    return scoring_model._ours(network, torch.device("cpu"), None, 64, (), lambda: None)  # type: ignore[arg-type]


def scores(model: ScoringModel) -> tuple[Tensor, Tensor, int]:
    labels = torch.full((2, 36), head.IGNORED)
    labels[0, 16:], labels[1, :4] = torch.arange(20, 40), torch.tensor(WINDOWS[1].ids[1:])
    tokens = torch.arange(72).view(2, 36)
    with torch.no_grad(), Largest() as seen:
        found = model._scores(tokens, labels, None)
    return found, labels, seen.elements


def test_scores_by_blocks_are_those_of_logits(model):
    found, labels, most = scores(model)
    logits = model.logits(torch.arange(72).view(2, 36)).detach()
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert found.dtype is torch.float64
    torch.testing.assert_close(found[..., 0], wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[..., 1], logits.argmax(-1).double())
    assert most < logits.numel() and scores(replace(model, scores=None))[2] >= logits.numel(), "the control"


def test_windows_are_scored_by_blocks(model):
    by_blocks, whole = model.losses(WINDOWS, 2), replace(model, scores=None).losses(WINDOWS, 2)
    for (losses, flags), (wanted, likeliest), window in zip(by_blocks, whole, WINDOWS, strict=True):
        assert len(losses) == window.counted and torch.equal(flags, likeliest)
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
