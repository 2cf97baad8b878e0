"""Expert parallelism: tokens are sent to the ranks of their experts, and the results are sent back.

The axis has ep * etp ranks. Rank (i, j) holds, of each expert in the i-th group, the j-th slice of the hidden size. A
token is sent to every rank that holds a slice of its expert. The results are summed, as are those of its K experts.
Dispatchers treat a slice as a virtual expert, so a token chooses K * etp virtual experts instead of K experts.

Shapes: T tokens of this rank, D hidden size, K experts per token, S slices of an expert (etp), N ranks of the axis, E
virtual experts on one rank, R slots (all-to-all) or tokens (other dispatchers) received, C input rows of the experts
(slots, plus padding). A slot is a token paired with one of the experts that it chose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from model.config import WeightsOn
from model.kernels import StepKernels
from model.moe import Dispatched, MixtureOfExperts, TopKRouting, dispatch_rows, permute_by_expert
from model.transformer import Transformer
from parallel.comm.collectives import all_gather, all_gather_no_grad, all_to_all, reduce_scatter
from parallel.layout import DispatchMethod
from parallel.mesh import MeshAxis, Meshes
from precision.gemm import Groups

_DEEPEP = "git+https://github.com/deepseek-ai/DeepEP"


def check(kind: DispatchMethod, compute_dtype: torch.dtype = torch.bfloat16) -> None:
    """Reject a dispatcher that is not installed, or does not support this dtype."""
    if kind is not DispatchMethod.deepep:
        return
    if compute_dtype is not torch.bfloat16:
        reason = "supports bfloat16 only: add precision=bf16, or use another dispatcher"
    elif importlib.util.find_spec("deep_ep") is None:
        reason = f"DeepEP is not installed: pip install '{_DEEPEP}'"
    else:
        return
    raise ConfigError("parallel.dispatch", kind, reason, [DispatchMethod.all_to_all.value])


def apply(model: Transformer, meshes: Meshes) -> None:
    """Give every MoE layer its dispatcher. The experts' parameters must have their local shapes already."""
    axis, etp, kind = meshes.experts, meshes.etp.size, meshes.layout.dispatch
    if axis.size == 1:
        return
    check(kind)
    buffer = cache(partial(_deepep_buffer, axis))  # shared by all layers, and created at its first use
    for layer in model.layers.values():
        if isinstance(layer.ffn, MixtureOfExperts):
            local, experts = model.config.num_experts // meshes.ep.size, layer.ffn.experts
            weights_on, multiple = model.config.router.weights_on, experts.token_multiple
            layer.ffn.dispatch = _KINDS[kind](axis, etp, local, weights_on, multiple, experts.kernels, buffer)


def _deepep_buffer(axis: MeshAxis, token_bytes: int) -> Any:
    """Create DeepEP's communication buffer for tokens of `token_bytes` bytes."""
    import deep_ep

    size, kind = axis.size, deep_ep.Buffer
    configs = (kind.get_dispatch_config(size), kind.get_combine_config(size))
    nvlink = max(config.get_nvl_buffer_size_hint(token_bytes, size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(token_bytes, size) for config in configs)
    return kind(axis.group, nvlink, rdma)


@dataclass(frozen=True)
class _Dispatcher:
    axis: MeshAxis
    etp: int
    local_experts: int
    """Number of virtual experts on one rank."""
    weights_on: WeightsOn
    token_multiple: int
    kernels: StepKernels
    buffer: Callable[[int], Any] | None = None
    """Returns DeepEP's buffer for tokens of the given number of bytes."""

    def virtual(self, choice: TopKRouting) -> TopKRouting:
        """Translate a choice of experts to virtual experts, which are numbered by rank, then by index on the rank."""
        if self.etp == 1:
            return choice
        local = self.local_experts
        group_TK1, index_TK1 = (choice.experts_TK // local)[..., None], (choice.experts_TK % local)[..., None]
        slices = torch.arange(self.etp, device=index_TK1.device)
        experts_TKS = (group_TK1 * self.etp + slices) * local + index_TK1
        weights_TKS = choice.weights_TK[..., None].expand(*choice.weights_TK.shape, self.etp)
        return TopKRouting(experts_TKS.flatten(1), weights_TKS.flatten(1))


class AllToAll(_Dispatcher):
    """Send each slot only to its expert's rank. Counts by rank and expert are copied to the host once per layer."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Dispatched:
        choice = self.virtual(choice)
        rows = permute_by_expert(choice.experts_TK, self.axis.size * self.local_experts)
        sent = dispatch_rows(self.kernels, rows, x_TD, choice.weights_TK, self.weights_on)
        sent_NE = rows.groups.counts_E.view(self.axis.size, self.local_experts)
        ones = [1] * self.axis.size
        arriving_NE = all_to_all(sent_NE, ones, ones, self.axis, "counts")
        send, *arriving = torch.cat([sent_NE.sum(1)[None], arriving_NE.t()]).tolist()  # `arriving`: [expert][rank]
        receive = [sum(counts) for counts in zip(*arriving, strict=True)]
        x_RD = all_to_all(sent.x_CD, send, receive, self.axis, "tokens")
        indices = torch.arange(self.local_experts, device=x_RD.device).repeat(self.axis.size)
        experts_R1 = indices.repeat_interleave(arriving_NE.flatten(), output_size=sum(receive))[:, None]
        by_expert = permute_by_expert(experts_R1, self.local_experts, self.token_multiple)
        known = [-(-sum(counts) // self.token_multiple) * self.token_multiple for counts in arriving]
        groups_E = Groups(by_expert.groups.counts_E, known)

        def combine(y_CD: Tensor) -> Tensor:
            y_RD = self.kernels.unpermute(y_CD, by_expert)
            return sent.combine(all_to_all(y_RD, receive, send, self.axis, "tokens"))

        return Dispatched(self.kernels.permute(x_RD, by_expert), groups_E, combine)


class AllGather(_Dispatcher):
    """Gather all tokens of the axis, compute those that chose this rank's experts, and reduce-scatter the results."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Dispatched:
        choice = self.virtual(choice)
        x_RD = all_gather(x_TD, self.axis, 0, "tokens")
        experts_RK = all_gather_no_grad(choice.experts_TK, self.axis, 0, "counts")
        weights_RK = all_gather(choice.weights_TK, self.axis, 0, "weights")
        mine = _select_local(self, x_RD, experts_RK - self.axis.rank * self.local_experts, weights_RK)
        return replace(mine, combine=lambda y_CD: reduce_scatter(mine.combine(y_CD), self.axis, 0, "tokens"))


class DeepEP(_Dispatcher):
    """DeepEP's kernels (https://github.com/deepseek-ai/DeepEP), bf16 only. Send a token once to each rank it needs."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Dispatched:
        assert self.buffer is not None
        buffer = self.buffer(x_TD.shape[1] * x_TD.element_size())
        x_RD, weights_RK, experts_RK, handle = _DeepEPDispatch.apply(
            x_TD, choice.weights_TK, choice.experts_TK, buffer, self.axis.size * self.local_experts
        )
        mine = _select_local(self, x_RD, experts_RK, weights_RK)
        return replace(mine, combine=lambda y_CD: _DeepEPCombine.apply(mine.combine(y_CD), buffer, handle))


_KINDS: dict[DispatchMethod, Any] = {
    DispatchMethod.all_to_all: AllToAll,
    DispatchMethod.all_gather: AllGather,
    DispatchMethod.deepep: DeepEP,
}


def _select_local(dispatcher: _Dispatcher, x_RD: Tensor, experts_RK: Tensor, weights_RK: Tensor) -> Dispatched:
    """Dispatch the slots of this rank's experts: ids from 0 to `local_experts` - 1. `combine` sums per token.

    Other slots are sorted to the end and dropped. The number of rows per local expert is copied to the host.
    """
    held = dispatcher.local_experts
    here_RK = (experts_RK >= 0) & (experts_RK < held)
    rows = permute_by_expert(experts_RK.where(here_RK, held), held + 1, dispatcher.token_multiple)
    sent = dispatch_rows(dispatcher.kernels, rows, x_RD, weights_RK, dispatcher.weights_on)
    mine = Groups(rows.groups.counts_E[:held])
    kept = sum(mine.host)

    def combine(y_CD: Tensor) -> Tensor:
        return sent.combine(F.pad(y_CD, (0, 0, 0, sent.x_CD.shape[0] - kept)))

    return Dispatched(sent.x_CD[:kept], mine, combine)


class _DeepEPDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, buffer: Any, experts: int) -> Any:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(experts_TK, experts)
        x_RD, experts_RK, weights_RK, _, handle, _ = buffer.dispatch(
            x_TD,
            topk_idx=experts_TK,
            topk_weights=weights_TK.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle, ctx.dtype = buffer, handle, weights_TK.dtype
        ctx.mark_non_differentiable(experts_RK)
        return x_RD, weights_RK, experts_RK, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_weights, _ = ctx.buffer.combine(grads[0].contiguous(), ctx.handle, topk_weights=grads[1].float())
        return grad_x, grad_weights.to(ctx.dtype), None, None, None


class _DeepEPCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y_RD, handle)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.handle)[0], None, None
