"""Copies of weights in the compute dtype follow every write of an engine, and gradients reach the weights."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from precision.native_gemm import NativeGemm
from precision.weight_copies import WeightClock, WeightCopies


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def copies() -> WeightCopies:
    made = WeightCopies(torch.bfloat16, WeightClock())
    made.clock.tick()
    return made


def test_a_copy_is_kept_until_an_engine_writes(copies):
    w = weight(3, 4)
    first = copies.plain(w)
    assert torch.equal(first, w.bfloat16()) and copies.plain(w).data_ptr() == first.data_ptr()
    w.data.add_(1)  # as the fused AdamW does: PyTorch counts no write
    assert not torch.equal(copies.plain(w), w.bfloat16()), "only the clock can tell"
    copies.clock.tick()
    assert torch.equal(copies.plain(w), w.bfloat16()) and copies.plain(w).data_ptr() == first.data_ptr()
    with torch.no_grad():
        w.mul_(2)
    assert torch.equal(copies.plain(w), w.bfloat16()), "counted writes need no tick"


def test_without_an_engine_nothing_is_kept():
    copies, w = WeightCopies(torch.bfloat16), weight(3, 4)
    copies.plain(w)
    w.data.add_(1)
    assert torch.equal(copies.plain(w), w.bfloat16()) and not copies._kept


def test_gradients_reach_weights_and_views_of_them(copies):
    w, others = weight(2, 3, 4), [weight(2, 4), weight(3, 4)]
    copies.narrow(w.flatten(0, 1)).sum().backward()
    assert w.grad.dtype is torch.float32 and bool((w.grad == 1).all())
    joined = copies.joint(list(others))
    assert torch.equal(joined, torch.cat([x.bfloat16() for x in others]))
    (joined * torch.arange(5.0)[:, None]).sum().backward()
    assert torch.equal(torch.cat([x.grad for x in others])[:, 0], torch.arange(5.0))


def test_a_part_of_a_weight_is_cast_anew(copies):
    w = weight(4, 2)
    assert torch.equal(copies.plain(w[1:3]), w[1:3].bfloat16()) and not copies._kept


def test_copies_die_with_their_weights(copies):
    w = weight(3, 4)
    copies.plain(w)
    del w
    gc.collect()
    assert not copies._kept


def test_stacked_weights_are_not_kept_for_the_backward_pass():
    """Under FSDP2 weights are gathered in the compute dtype, and freed between the passes."""
    weights, kept = [nn.Parameter(weight(n, 4).detach().bfloat16()) for n in (8, 16)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = NativeGemm(torch.bfloat16).joint(torch.ones(2, 4, dtype=torch.bfloat16), weights)
    assert {x.data_ptr() for x in kept if len(x) > 2} == {w.data_ptr() for w in weights}
    y.sum().backward()
    assert all(bool((w.grad == 2).all()) for w in weights)


def test_a_write_of_any_stacked_weight_refreshes_the_copy(copies):
    weights = [weight(2, 4), weight(3, 4)]
    copies.joint(weights)
    with torch.no_grad():
        weights[1].mul_(2)
    assert torch.equal(copies.joint(weights), torch.cat([w.bfloat16() for w in weights]))
