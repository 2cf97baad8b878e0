"""Layers share rotary factors only if they restart angles at the same positions."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.attention.plan import ForwardContext
from tests.support.models import small


def test_rotary_factors_depend_on_the_chunk_size():
    model, positions = small(), torch.arange(12)[None]
    chunked = replace(model.blocks[0], rope=True, attention_chunk_size=4)
    context = ForwardContext(positions)
    found = context.rotation(model, chunked, torch.float64)
    whole = context.rotation(model, replace(chunked, attention_chunk_size=None), torch.float64)
    assert torch.equal(found[:, :4], whole[:, :4]) and not torch.equal(found[:, 4:], whole[:, 4:])
    assert torch.equal(found, whole[:, :4].repeat(1, 3, 1, 1, 1))
    assert context.rotation(model, chunked, torch.float64) is found, "made once"
