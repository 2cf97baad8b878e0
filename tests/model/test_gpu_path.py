"""The arrangement of operations for GPUs, in float64 on a CPU, equals the plain one: joint matmuls, SwiGLU made again, one
call of attention for all documents.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model import head, layers
from model.attention import layer as attention
from model.attention.plan import ForwardContext
from model.config import ModelConfig, QKNorm, RopePairing, RouterConfig, WeightsOn
from model.kernels import LossKernels, TorchKernels
from model.transformer import Transformer
from parallel import activation_checkpoint
from parallel.layout import Recompute
from tests.model.test_transformer import CLOSED, PACKED, SMALL, WHOLE, draw_tokens
from tests.support.models import build

VARIANTS = {
    "llama4": SMALL,
    "gains": replace(SMALL, qk_norm=QKNorm.per_head, rope_pairing=RopePairing.halves),
    "gains of all heads": replace(SMALL, qk_norm=QKNorm.full),
    "top-2": replace(SMALL, router=RouterConfig(top_k=2, weights_on=WeightsOn.output)),
}


class JoiningKernels(TorchKernels):
    """PyTorch's operations in the arrangement for GPUs."""

    joins = True


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """Compute what torch's varlen attention does, as its documentation says: [T, H, K] in sequences of their own."""
    assert options.pop("window_size") == (-1, 0) and options.pop("enable_gqa") == (q.shape[1] != k.shape[1])
    assert not options and cu_q.dtype is cu_k.dtype is torch.int32 and torch.equal(cu_q, cu_k)
    assert max_q == max_k == int(cu_q.diff().max()) and cu_q[0] == 0 and int(cu_q[-1]) == len(q)
    found = []
    for begin, end in pairwise(cu_q.tolist()):
        one = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        y = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        found.append(y.transpose(0, 1))
    return torch.cat(found)


def gpu_model(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(attention, "varlen_attn", flash)
    model = build(config, seed=1)
    for module in model.modules():
        if isinstance(getattr(module, "kernels", None), TorchKernels):
            module.kernels = JoiningKernels()
        if isinstance(module, attention.Attention):
            module.attend = attention.varlen_attention
    return model


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss use seven blocks of the vocabulary of 64 words, and several of the tokens."""
    monkeypatch.setattr(head, "_MULTIPLE", 10)
    monkeypatch.setattr(head, "_BLOCK_BYTES", 8 * 10 * 10)


def outputs(model: Transformer, positions: Tensor, labels: bool) -> dict[str, Tensor]:
    context = ForwardContext(positions, routed_tokens=1.0)
    if labels:
        context.labels_BT = draw_tokens(positions).roll(-1, 1)
    y = model(draw_tokens(positions), context)
    y.mul(torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "losses"])
@pytest.mark.parametrize("positions", [WHOLE, PACKED, CLOSED], ids=["whole", "packed", "closed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_arrangement_for_gpus_computes_the_same(monkeypatch, config, positions, labels):
    small_blocks(monkeypatch)
    found = outputs(gpu_model(config, monkeypatch), positions, labels)
    monkeypatch.undo()
    wanted = outputs(build(config, seed=1), positions, labels)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)


def swapped(gate_up: Tensor, *rest: Any) -> Tensor:
    return honest_product(torch.cat(gate_up.chunk(2, -1)[::-1], -1), *rest)


honest_product, honest_borders = layers.gated_product, ForwardContext.borders
honest_add, honest_blocks = LossKernels.add, head._blocks
FLAWS = {
    "no chunks": (ForwardContext, "borders", lambda self, chunk: honest_borders(self, None)),
    "no documents": (
        ForwardContext,
        "borders",
        lambda self, chunk: (torch.tensor([0, 13, 26]).int(), 13),
    ),
    "gate and up swapped": (layers, "gated_product", swapped),
    "a block of words forgotten": (
        LossKernels,
        "add",
        lambda self, sums, x, y, first: first or honest_add(self, sums, x, y, first),
    ),
    "a block of tokens forgotten": (
        head,
        "_blocks",
        lambda *sizes: ((rows, parts[1:]) for rows, parts in honest_blocks(*sizes)),
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_of_the_arrangement_is_noticed(monkeypatch, flaw):
    owner, name, broken = FLAWS[flaw]
    model = gpu_model(SMALL, monkeypatch)
    small_blocks(monkeypatch)
    monkeypatch.setattr(owner, name, broken)
    found = outputs(model, PACKED, labels=True)
    monkeypatch.undo()
    wanted = outputs(build(SMALL, seed=1), PACKED, labels=True)
    assert max(float((found[name] - value).abs().max()) for name, value in wanted.items()) > 1e-4


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_activations_made_again_change_no_bit(monkeypatch, config):
    found = []
    for mode in Recompute:
        model = gpu_model(config, monkeypatch)
        activation_checkpoint.apply(model, mode)
        found.append(outputs(model, PACKED, labels=True))
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


def test_what_is_made_again_is_freed(monkeypatch):
    taken: list[Any] = []

    def noted(maker: Any) -> Tensor:
        taken.append(maker)
        return take(maker)

    take = activation_checkpoint._Maker.take
    monkeypatch.setattr(activation_checkpoint._Maker, "take", noted)
    model = gpu_model(SMALL, monkeypatch)
    activation_checkpoint.apply(model, Recompute.selective)
    outputs(model, PACKED, labels=True)
    assert taken and all(maker.made is None for maker in taken), "after its last use"
    assert not any(layer.forward.func.__self__._makers for layer in model.layers.values()), "after the forward pass"
