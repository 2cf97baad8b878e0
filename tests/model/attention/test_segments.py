"""Attention by segments equals masked attention, and its memory is linear in the sequence length."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import segments as module
from model.attention.layer import attend
from model.attention.plan import SEGMENTED_FROM, AttentionPlan, ForwardContext
from model.attention.segments import SegmentRun, attend_segments, document_bounds, plan_segments

B, H, G, K = 3, 4, 2, 8


def positions(length: int, every: int = 12) -> Tensor:
    """Return positions in documents [B, T]: random documents, except for one sequence of a single document."""
    starts = torch.rand(B, length, generator=torch.Generator().manual_seed(length)) < 1 / every
    starts[:, 0], starts[1, 1:] = True, False
    places = torch.arange(length).expand(B, -1)
    return places - torch.where(starts, places, 0).cummax(1).values


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, length, heads, K, generator=generator, dtype=dtype) for heads in (H, G, G, H)]


def figures(attention: Any, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of queries, keys and values."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = attention(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def masked(rows: Tensor) -> Any:
    plan = AttentionPlan(mask=ForwardContext(rows)._document_mask(rows == 0))
    return lambda q, k, v: attend(q, k, v, plan)


def segmented(rows: Tensor, cut: list[int], lost: int = 0) -> Any:
    """Return attention by segments, split at the positions `cut`. As a control, drop the last `lost` segments."""
    runs = [SegmentRun(a, b, a) for a, b in pairwise(cut)]
    segments = plan_segments(document_bounds(rows == 0), runs, runs)
    return lambda q, k, v: attend_segments(q, k, v, segments[: len(segments) - lost])


def largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert all(a.dtype is b.dtype for a, b in zip(found, wanted, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def difference(one: Any, other: Any, tensors: list[Tensor]) -> float:
    return largest(figures(one, *tensors), figures(other, *tensors))


CUTS = {"whole": [0, 64], "thirds": [0, 20, 48, 64], "first alone": [0, 1, 64]}


@pytest.mark.parametrize("kernel", ["flash", "plain"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_segments_equal_the_mask(cut, kernel, monkeypatch):
    if kernel == "plain":
        monkeypatch.setattr(module, "_QUERY_BLOCK", 7)
        monkeypatch.setattr(module, "_forward", module.plain_forward)
        monkeypatch.setattr(module, "_backward", module.plain_backward)
    rows = positions(64)
    assert difference(segmented(rows, cut), masked(rows), inputs(64)) < 1e-12
    if len(cut) > 2:
        assert difference(segmented(rows, cut, lost=1), masked(rows), inputs(64)) > 1e-3, "control"


@pytest.mark.parametrize("dtype, gate", [(torch.float32, 5e-6), (torch.bfloat16, 0.1)])
def test_narrow_formats_round(dtype, gate):
    rows = positions(64)
    assert 0 < difference(segmented(rows, [0, 40, 64]), masked(rows), inputs(64, dtype)) < gate


def test_only_long_packed_sequences_use_segments():
    assert ForwardContext(positions(SEGMENTED_FROM - 1)).plan(None).mask is not None
    rows = positions(SEGMENTED_FROM)
    plan = ForwardContext(rows).plan(None)
    assert plan.segments is not None and plan.mask is None
    assert difference(lambda q, k, v: attend(q, k, v, plan), masked(rows), inputs(SEGMENTED_FROM)) < 1e-12
    whole = torch.arange(SEGMENTED_FROM)[None]
    assert ForwardContext(whole).plan(None) == AttentionPlan(), "one document needs neither"


def test_a_run_of_keys_that_splits_queries_is_rejected():
    rows = document_bounds(torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(AssertionError, match="contain only part of the queries"):
        plan_segments(rows, [SegmentRun(0, 8, 0)], [SegmentRun(0, 4, 0), SegmentRun(4, 8, 4)])


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def most(length: int, attention: Any) -> int:
    with Largest() as seen:
        figures(attention, *inputs(length, torch.float32))
    return seen.elements


def test_memory_is_linear_in_the_length():
    """With twice the length, the largest tensor of both passes doubles; with a mask it grows fourfold."""

    def planned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, ForwardContext(positions(len(q[0]))).plan(None))

    assert [most(n, planned) for n in (1024, 2048)] == [1024 * B * H * K, 2048 * B * H * K]
    under = [most(n, masked(positions(n))) for n in (1024, 2048)]
    assert under[1] == 4 * under[0] > 2048 * B * H * K
