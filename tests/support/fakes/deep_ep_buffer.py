"""A stand-in for DeepEP's `Buffer` on gloo ranks: `deep_ep/buffers/legacy.py` of deepseek-ai/DeepEP at 189df346.

Every tensor that the kernels would write is NaN, or -1, until the event that is returned with it is waited for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_EVENTS = "previous_event=None, async_finish=False, allocate_on_comm_stream=False"
SIGNATURES = {
    "get_dispatch_layout": f"(self, topk_idx, num_experts, {_EVENTS})",
    "dispatch": "(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, "
    "num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, "
    f"config=None, {_EVENTS})",
    "combine": f"(self, x, handle, topk_weights=None, bias=None, config=None, {_EVENTS})",
}
"""Signatures of DeepEP's methods, without annotations."""


class Event:
    def __init__(self, written: list[tuple[Tensor, Tensor]]) -> None:
        self.written = written

    def current_stream_wait(self) -> None:
        for tensor, value in self.written:
            tensor.copy_(value)


class Buffer:
    def __init__(self, group: Any) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def get_dispatch_layout(  # type: ignore[no-untyped-def]
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        ranks_TK = topk_idx // (num_experts // self.size)
        in_rank_TN = torch.stack([(ranks_TK == rank).any(1) for rank in range(self.size)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return in_rank_TN.sum(0), None, per_expert, in_rank_TN, None

    def dispatch(  # type: ignore[no-untyped-def]
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
        config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):  # fmt: skip
        assert async_finish and x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            (rows,), event = self._later([self._spread(x, handle)])
            return rows, None, None, None, None, event
        assert topk_weights.dtype is torch.float32 and num_tokens_per_rank is not None
        held = len(num_tokens_per_expert) // self.size
        x_RD, ids_RK, weights_RK = (self._spread(part, is_token_in_rank) for part in (x, topk_idx, topk_weights))
        local_RK = ids_RK - self.rank * held
        here_RK = (local_RK >= 0) & (local_RK < held)
        counts = torch.bincount(local_RK[here_RK], minlength=held).tolist()
        aligned = [-(-count // expert_alignment) * expert_alignment for count in counts]
        results, event = self._later([x_RD, local_RK.where(here_RK, -1), weights_RK * here_RK])
        return *results, aligned, is_token_in_rank, event

    def combine(  # type: ignore[no-untyped-def]
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False
    ):  # fmt: skip
        assert async_finish and x.is_contiguous()
        parts = [self._sum(x, handle)] + ([] if topk_weights is None else [self._sum(topk_weights, handle)])
        results, event = self._later(parts)
        return results[0], results[1] if topk_weights is not None else None, event

    def _later(self, values: list[Tensor]) -> tuple[list[Tensor], Event]:
        results = [torch.full_like(x, torch.nan if x.is_floating_point() else -1) for x in values]
        return results, Event(list(zip(results, values, strict=True)))

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _spread(self, x: Tensor, in_rank_TN: Tensor) -> Tensor:
        return torch.cat([x[chosen[:, self.rank]] for x, chosen in self._gathered((x, in_rank_TN))])

    def _sum(self, rows: Tensor, in_rank_TN: Tensor) -> Tensor:
        """Add what each rank has for the tokens that this rank sent to it."""
        total = rows.new_zeros(len(in_rank_TN), *rows.shape[1:])
        for rank, (theirs, chosen) in enumerate(self._gathered((rows, self._chosen(in_rank_TN)))):
            begin = sum(chosen[source] for source in range(self.rank))
            total[in_rank_TN[:, rank]] += theirs[begin : begin + chosen[self.rank]]
        return total

    def _chosen(self, in_rank_TN: Tensor) -> list[int]:
        """Return how many tokens this rank got from each."""
        return [int(chosen[:, self.rank].sum()) for chosen in self._gathered(in_rank_TN)]
