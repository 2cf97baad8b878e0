"""Compare held-out metrics with plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from core.errors import DataError
from model.attention.plan import ForwardContext
from tests.support.tiny import EXACT, trainer
from train.eval.held_out import HeldOut, _sums, held_out_loss
from train.trainer import Trainer


def measured(run: Trainer) -> HeldOut:
    bytes_V = torch.from_numpy(run.corpus.tokenizer.token_bytes())
    return held_out_loss(run.engine.placed, run.loaders["main"], bytes_V, 5, 2, run.weights)


@torch.no_grad()
def test_losses_and_bits_equal_plain_arithmetic(small_corpus, tmp_path):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT])
    found = measured(run)
    for source, result in found.sources.items():
        nats, tokens, size = 0.0, 0, 0
        for row in range(5):
            batch = run.loaders["main"].held_out(source, row, row + 1)
            logp = run.engine.placed.model(batch.tokens_BT, ForwardContext(batch.positions_BT)).log_softmax(-1)[0]
            for place, label in enumerate(batch.labels_BT[0].tolist()):
                if label >= 0:
                    nats, tokens = nats - float(logp[place, label]), tokens + 1
                    size += len(run.corpus.tokenizer.decode([label]).encode())
        assert result.tokens == tokens
        assert result.loss == pytest.approx(nats / tokens, rel=1e-9)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-9)
    text, code = found.sources["text"].loss, found.sources["code"].loss
    assert found.loss == pytest.approx((text + 0.5 * code) / 1.5), "mean by the sources' weights"
    assert "modalities" not in found.plain() and "modalities" not in found.plain()["sources"]["text"]


def test_no_held_out_text_is_an_error(small_corpus, tmp_path):
    with pytest.raises(DataError, match=r"no source has held-out text .* raise data\.held_out"):
        measured(trainer(tmp_path, "run", [*small_corpus, *EXACT, "data.held_out=0"]))


@torch.no_grad()
def test_ignored_labels_count_no_bytes(small_corpus, tmp_path):
    """The token id that replaces an ignored label has bytes here, which must not count."""
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT])
    batch = run.loaders["main"].held_out("text", 0, 1)
    batch.labels_BT[:, ::2] = -100
    bytes_V = torch.ones(320, dtype=torch.int64)
    _, tokens, size = _sums(run.engine.placed, batch, bytes_V)[0].tolist()
    assert size == tokens == int((batch.labels_BT >= 0).sum())
