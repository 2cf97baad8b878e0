"""The loss by blocks of tokens and words is cross-entropy: with ignored labels, and sharded over ranks (threads)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import head
from model.head import IGNORED, Head
from model.kernels import loss
from model.kernels.loss import LossKernels, LossSums
from model.roles import Role
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

T, D, V = 7, 6, 40
LABELS = torch.tensor([[3, IGNORED, 39, 20, 0, 19, IGNORED]])


class ThreadShard:
    """The part of the vocabulary of one of two threads."""

    def __init__(self, start: int, place: int, seen: dict[int, Tensor], barrier: threading.Barrier) -> None:
        self.start, self.place, self.seen, self.barrier = start, place, seen, barrier

    def max(self, x: Tensor) -> None:
        x.copy_(torch.maximum(*self._both(x)))

    def sum(self, x: Tensor) -> None:
        x.copy_(torch.add(*self._both(x)))

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen[self.place] = x.clone()
        self.barrier.wait(10)
        both = self.seen[0], self.seen[1]
        self.barrier.wait(10)
        return both


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, T, D), (V, D), (1, T))
    )
    return x, 3 * w, grad


def wanted() -> list[Tensor]:
    x, w, grad = inputs()
    x.requires_grad_(), w.requires_grad_()
    losses = F.cross_entropy((x @ w.t())[0], LABELS[0], reduction="none")[None]
    likeliest = (x @ w.t()).argmax(-1)
    return [losses.detach(), *torch.autograd.grad(losses, [x, w], grad), likeliest]


def computed(rows: slice, shard: ThreadShard | None) -> list[Tensor]:
    x, w, grad = inputs()
    made = Head(D, len(w[rows]), Role.head, resolve(PrecisionConfig(Compute.float64)).plain)
    made.weight = torch.nn.Parameter(w[rows].clone())
    made.shard = shard
    x.requires_grad_()
    losses = made(x, LABELS)
    same, likeliest = made(x, LABELS, likeliest=True).unbind(-1)
    torch.testing.assert_close(same, losses.detach(), rtol=1e-12, atol=1e-12)
    return [losses.detach(), *torch.autograd.grad(losses, [x, made.weight], grad), likeliest.long()]


@pytest.fixture(params=[8 * 4 * 4, 1 << 30], ids=["by blocks", "whole logits"])
def block_bytes(request, monkeypatch) -> None:
    monkeypatch.setattr(head, "_MULTIPLE", 3)
    monkeypatch.setattr(head, "_BLOCK_BYTES", request.param)


def test_losses_by_blocks_are_cross_entropy(block_bytes):
    for found, exact in zip(computed(slice(None), None), wanted(), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_losses_of_a_sharded_vocabulary_are_cross_entropy(block_bytes):
    seen, barrier = {}, threading.Barrier(2)
    halves = [slice(0, V // 2), slice(V // 2, V)]
    shards = [ThreadShard(half.start, place, seen, barrier) for place, half in enumerate(halves)]
    with ThreadPoolExecutor(2) as pool:
        (losses, to_x, to_w, likeliest), (same, more_x, more_w, words) = pool.map(computed, halves, shards)
    exact = wanted()
    found = [losses, to_x + more_x, torch.cat([to_w, more_w]), likeliest]
    assert torch.equal(losses, same) and torch.equal(likeliest, words)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_blocks_cover_each_logit_once(monkeypatch):
    gemm = resolve(PrecisionConfig(Compute.bfloat16)).plain.plain
    for tokens, words in ((8192, 202048), (8193, 202048), (131072, 101024), (1, 10**8), (10**8, 64)):
        blocks = list(head._blocks(gemm, tokens, words))
        assert [rows.start for rows, _ in blocks[1:]] == [rows.stop for rows, _ in blocks[:-1]]
        assert blocks[0][0].start == 0 and blocks[-1][0].stop == words
        parts = blocks[0][1]
        assert sum(part.stop - part.start for part in parts) == tokens and parts[-1].stop == tokens
        count = len(blocks) * len(parts)
        assert count <= 1.25 * (2 * tokens * words / head._BLOCK_BYTES) + 2


def test_the_first_of_equal_words_is_the_likeliest(monkeypatch):
    monkeypatch.setattr(head, "_MULTIPLE", 1)
    monkeypatch.setattr(head, "_BLOCK_BYTES", 8 * 2)
    made = Head(1, 6, Role.head, resolve(PrecisionConfig(Compute.float64)).plain)
    made.weight = torch.nn.Parameter(torch.tensor([[1.0], [3.0], [2.0], [3.0], [0.0], [3.0]], dtype=torch.float64))
    found = made(torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([[3]]), likeliest=True)
    assert found[0, 0, 1] == 1


SIZES = {"words": (8, 800), "tokens": (800, 8)}
"""Tokens and words of 100 blocks, in which the gradient of the input or that of the weight is a sum of 100 parts."""


def bfloat16_errors(tokens: int, words: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the relative errors of the gradients of a loss by blocks of 8 x 8 logits in bfloat16."""
    monkeypatch.setattr(head, "_MULTIPLE", 1)
    monkeypatch.setattr(head, "_BLOCK_BYTES", 2 * 8 * 8)
    generator = torch.Generator().manual_seed(0)
    made = Head(D, words, Role.head, resolve(PrecisionConfig(Compute.bfloat16)).plain)
    made.weight = torch.nn.Parameter(torch.randn(words, D, generator=generator).abs())
    x = torch.randn(1, tokens, D, generator=generator).abs().bfloat16().requires_grad_()
    labels = torch.randint(words, (1, tokens), generator=generator)
    made(x, labels).sum().backward()
    exact_x, exact_w = (one.detach().bfloat16().double().requires_grad_() for one in (x, made.weight))
    F.cross_entropy((exact_x @ exact_w.t())[0], labels[0], reduction="sum").backward()
    pairs = {"x": (x, exact_x), "w": (made.weight, exact_w)}
    return {name: float((a.grad - b.grad).norm() / b.grad.norm()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("tokens, words", SIZES.values(), ids=SIZES.keys())
def test_sums_over_blocks_are_not_rounded(tokens, words, monkeypatch):
    errors = bfloat16_errors(tokens, words, monkeypatch)
    assert errors["x"] < 6e-3 and errors["w"] < 5e-3
    monkeypatch.setattr(head, "widened", lambda x: x)
    monkeypatch.setattr(head, "at_least_float32", lambda dtype: dtype)
    assert max(bfloat16_errors(tokens, words, monkeypatch).values()) > 1e-2, "the control"


def test_the_sums_of_a_block_in_bfloat16_are_wide(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits_TW = (3 * torch.randn(16, 8192, generator=generator)).bfloat16()
    labels_T = torch.arange(16)

    def error() -> float:
        sums = LossSums.empty(labels_T, torch.bfloat16)
        for first in range(0, 8192, 1024):
            LossKernels().add(sums, logits_TW[:, first : first + 1024].clone(), labels_T, first)
        lse_T = sums.largest_T.double() + sums.exponentials_T.double().log()
        assert torch.equal(sums.label_T, logits_TW.float().gather(1, labels_T[:, None])[:, 0])
        return float((lse_T - logits_TW.double().logsumexp(1)).abs().max())

    assert error() < 1e-5
    monkeypatch.setattr(loss, "at_least_float32", lambda dtype: dtype)
    assert error() > 1e-4, "the control"
