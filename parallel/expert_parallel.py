"""Expert parallelism: tokens are sent to the ranks of their experts, and the results are sent back.

The axis has ep * etp ranks. Rank (i, j) holds, of each expert in the i-th group, the j-th slice of the hidden size. A
token is sent to every rank that holds a slice of its expert. The results are summed, as are those of its K experts.
Dispatchers treat a slice as a virtual expert, so a token chooses K * etp virtual experts instead of K experts.

A rank that a token needs for several experts gets it once, and returns the sum of their results. Dispatch and combine
are asynchronous: the layer computes its shared expert while tokens travel.

Shapes: T tokens of this rank, D hidden size, K experts per token, S slices of an expert (etp), N ranks of the axis, E
virtual experts on one rank, M tokens sent, R tokens received (one per rank that a token needs), C input rows of the
experts (slots, plus padding). A slot is a token paired with one of the experts that it chose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError
from model.config import WeightsOn
from model.kernels import StepKernels
from model.kernels.moe import SortedSlots
from model.moe import (
    Dispatched,
    MixtureOfExperts,
    Pending,
    TopKRouting,
    dispatch_rows,
    keep_rows,
    permute_by_expert,
)
from model.transformer import Transformer
from parallel.comm.collectives import (
    all_gather_no_grad,
    all_to_all,
    start,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
)
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
            size = axis.size // meshes.layout.exchange_nodes
            layer.ffn.dispatch = _KINDS[kind](axis, etp, local, weights_on, multiple, experts.kernels, buffer, size)


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
    node_size: int | None = None
    """Ranks of the axis that are on one node, one after the other; None: all."""

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

    def _local_slots(self, experts_RK: Tensor, known: list[int] | None = None) -> SortedSlots:
        """Sort slots of this rank's experts: ids from 0 to `local_experts` - 1. Other slots get no row. The host needs
        the number of rows of each expert; unless it is `known`, it waits for the device.
        """
        held = self.local_experts
        here_RK = (experts_RK >= 0) & (experts_RK < held)
        slots = permute_by_expert(experts_RK.where(here_RK, held).long(), held + 1, self.token_multiple)
        groups = Groups(slots.groups.counts_E[:held], known)
        return keep_rows(slots, sum(groups.host), groups)


class AllToAll(_Dispatcher):
    """Send each token once to each rank that has one of its experts. Counts are copied to the host once per layer."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Pending[Dispatched]:
        routing = self.virtual(choice)
        if routing.experts_TK.shape[1] > 1 and self.node_size not in (None, self.axis.size):
            return self._by_node(x_TD, routing)
        return (self._by_slot if choice.experts_TK.shape[1] == 1 else self._by_rank)(x_TD, routing)

    def _by_slot(self, x_TD: Tensor, routing: TopKRouting) -> Pending[Dispatched]:
        """Dispatch tokens that have one expert each: none is sent twice to a rank, not even to the slices of an expert.
        The counts alone say which expert a row is for, and weights stay at home.
        """
        slots = permute_by_expert(routing.experts_TK, self.axis.size * self.local_experts)
        x_CD, collect = dispatch_rows(self.kernels, slots, x_TD, routing.weights_TK, self.weights_on)
        sent_NE = slots.groups.counts_E.view(self.axis.size, self.local_experts)
        arriving_NE = self._exchange_counts(sent_NE)
        send, *arriving = torch.cat([sent_NE.sum(1)[None], arriving_NE.t()]).tolist()  # `arriving`: [expert][rank]
        receive = [sum(counts) for counts in zip(*arriving, strict=True)]
        tokens = start_all_to_all(x_CD, send, receive, self.axis, "tokens")

        def arrived() -> Dispatched:
            indices = torch.arange(self.local_experts, device=x_TD.device).repeat(self.axis.size)
            experts_R1 = indices.repeat_interleave(arriving_NE.flatten(), output_size=sum(receive))[:, None]
            slots = permute_by_expert(experts_R1, self.local_experts, self.token_multiple)
            groups = Groups(slots.groups.counts_E, self._padded(arriving))

            def send_back(y_RD: Tensor) -> Pending[Tensor]:
                back = start_all_to_all(y_RD, receive, send, self.axis, "tokens")
                return lambda: collect(back())

            def combine(y_CD: Tensor) -> Callable[[], Pending[Tensor]]:
                return partial(send_back, self.kernels.unpermute(y_CD, slots))

            return Dispatched(self.kernels.permute(tokens(), slots), groups, combine)

        return arrived

    def _by_rank(self, x_TD: Tensor, routing: TopKRouting) -> Pending[Dispatched]:
        """Send ids and weights along with the tokens. Each rank sums its experts' rows per token."""
        copies = self._copies(routing.experts_TK // self.local_experts)
        send_N = copies.groups.counts_E[: self.axis.size]
        arriving_NX = self._exchange_counts(torch.cat([send_N[:, None], self._slots(routing.experts_TK)], 1))
        send, receive, *arriving = torch.cat([send_N[None], arriving_NX.t()]).tolist()  # `arriving`: [expert][rank]
        hop = _Hop(self.kernels, self.axis, copies, send, receive)
        tokens = hop.start(x_TD, routing.weights_TK, routing.experts_TK)

        def arrived() -> Dispatched:
            x_CD, groups, collect = self._rows(*tokens(), self._padded(arriving))
            return Dispatched(x_CD, groups, lambda y_CD: partial(hop.start_back, collect(y_CD)))

        return arrived

    def _by_node(self, x_TD: Tensor, routing: TopKRouting) -> Pending[Dispatched]:
        """Send a token once to each node that it needs, to the rank with this rank's index there. That rank passes it
        on to the ranks of its node that need it, and sums their results. All ranks learn all counts, so that the host
        waits once for the sizes of both exchanges.
        """
        assert self.node_size is not None
        size, here, ranks = self.node_size, self.axis.rank, self.axis.size
        ranks_TK = routing.experts_TK // self.local_experts
        across = self._copies(ranks_TK // size * size + here % size)
        direct_N = self._copies(ranks_TK).groups.counts_E[:ranks]
        sent_X = torch.cat([across.groups.counts_E[:ranks], direct_N, self._slots(routing.experts_TK).flatten()])
        counts_NX = all_gather_no_grad(sent_X[None], self.axis, 0, "counts")
        across_NN, direct_NN, slots_NX = counts_NX.split([ranks, ranks, ranks * self.local_experts], 1)
        by_index_PN = direct_NN.view(-1, size, ranks).sum(0)  # of the ranks with this index on all nodes, to each rank
        is_near_N = torch.arange(ranks, device=x_TD.device) // size == here // size
        near_N = by_index_PN[here % size] * is_near_N, by_index_PN[:, here].repeat(ranks // size) * is_near_N
        mine_E = slots_NX.unflatten(1, (ranks, -1))[:, here].sum(0)
        sizes = torch.cat([across_NN[here], across_NN[:, here], *near_N, mine_E]).tolist()
        send, receive, send_near, receive_near = (sizes[i * ranks : (i + 1) * ranks] for i in range(4))
        hop = _Hop(self.kernels, self.axis, across, send, receive)
        tokens = hop.start(x_TD, routing.weights_TK, routing.experts_TK)

        def arrived() -> Dispatched:
            x_RD, weights_RK, experts_RK = tokens()
            ranks_RK = experts_RK // self.local_experts
            near = self._copies(ranks_RK.where(ranks_RK // size == here // size, ranks))
            inside = _Hop(self.kernels, self.axis, near, send_near, receive_near, "inside nodes")
            known = self._padded([[count] for count in sizes[4 * ranks :]])
            x_CD, groups, collect = self._rows(*inside.start(x_RD, weights_RK, experts_RK)(), known)

            def send_back(y_RD: Tensor) -> Pending[Tensor]:
                return hop.start_back(inside.start_back(y_RD)())

            return Dispatched(x_CD, groups, lambda y_CD: partial(send_back, collect(y_CD)))

        return arrived

    def _rows(
        self, x_RD: Tensor, weights_RK: Tensor, experts_RK: Tensor, known: list[int]
    ) -> tuple[Tensor, Groups, Callable[[Tensor], Tensor]]:
        """Return the rows of this rank's experts and the function that sums their results per token received."""
        slots = self._local_slots(experts_RK - self.axis.rank * self.local_experts, known)
        x_CD, collect = dispatch_rows(self.kernels, slots, x_RD, weights_RK, self.weights_on)
        return x_CD, slots.groups, collect

    def _copies(self, ranks_TK: Tensor) -> SortedSlots:
        """Sort the copies of tokens by rank; a slot of rank `axis.size` needs none. A token's first slot on a rank has
        a row among the copies; rows of its others come last.
        """
        ranks = self.axis.size
        is_repeated_TK = (ranks_TK[:, :, None] == ranks_TK[:, None, :]).tril(-1).any(-1)
        return permute_by_expert(ranks_TK.masked_fill(is_repeated_TK, ranks), ranks + 1)

    def _slots(self, experts_TK: Tensor) -> Tensor:
        """Return the number of slots by rank and expert: [N, E]."""
        ids_S = experts_TK.flatten()
        counts_S = ids_S.new_zeros(self.axis.size * self.local_experts)
        return counts_S.scatter_add_(0, ids_S, torch.ones_like(ids_S)).view(self.axis.size, -1)

    def _exchange_counts(self, sent_NX: Tensor) -> Tensor:
        ones = [1] * self.axis.size
        return all_to_all(sent_NX, ones, ones, self.axis, "counts")

    def _padded(self, arriving: list[list[int]]) -> list[int]:
        """Return the rows of each expert, given the slots that arrive for each expert from each rank."""
        return [-(-sum(counts) // self.token_multiple) * self.token_multiple for counts in arriving]


@dataclass(frozen=True)
class _Hop:
    """An exchange in which a token travels once to each rank that it needs. `copies` sorts tokens by rank; `send` and
    `receive` are their numbers by rank. `where`: what the bytes are counted under, besides what is sent.
    """

    kernels: StepKernels
    axis: MeshAxis
    copies: SortedSlots
    send: list[int]
    receive: list[int]
    where: str = ""

    def start(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Pending[tuple[Tensor, Tensor, Tensor]]:
        """Start to send tokens, weights and ids, which arrive in this order."""
        copies = self._sent
        ids_MK = experts_TK.index_select(0, copies.source_C // copies.top_k).to(torch.int32)
        ids = self._exchange(ids_MK, self.send, self.receive, "ids")
        weights = self._exchange(self.kernels.permute(weights_TK, copies), self.send, self.receive, "weights")
        tokens = self._exchange(self.kernels.permute(x_TD, copies), self.send, self.receive, "tokens")

        def arrived() -> tuple[Tensor, Tensor, Tensor]:
            experts_RK = ids().long()
            weights_RK = weights()
            return tokens(), weights_RK, experts_RK

        return arrived

    def start_back(self, y_RD: Tensor) -> Pending[Tensor]:
        """Start to send results back. They are summed per token."""
        copies, back = self._sent, self._exchange(y_RD, self.receive, self.send, "tokens")
        return lambda: self.kernels.unpermute(back(), copies)

    @cached_property
    def _sent(self) -> SortedSlots:
        return keep_rows(self.copies, sum(self.send), Groups(self.copies.groups.counts_E[: self.axis.size], self.send))

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int], what: str) -> Pending[Tensor]:
        return start_all_to_all(rows, send, receive, self.axis, f"{what} {self.where}".strip())


class AllGather(_Dispatcher):
    """Gather all tokens of the axis, compute those that chose this rank's experts, and reduce-scatter the results."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Pending[Dispatched]:
        routing = self.virtual(choice)
        ids = start_all_gather(routing.experts_TK, self.axis, "ids")
        weights = start_all_gather(routing.weights_TK, self.axis, "weights")
        tokens = start_all_gather(x_TD, self.axis, "tokens")

        def arrived() -> Dispatched:
            slots = self._local_slots(ids() - self.axis.rank * self.local_experts)
            x_CD, collect = dispatch_rows(self.kernels, slots, tokens(), weights(), self.weights_on)

            def combine(y_CD: Tensor) -> Callable[[], Pending[Tensor]]:
                return partial(start_reduce_scatter, collect(y_CD), self.axis, "tokens")

            return Dispatched(x_CD, slots.groups, combine)

        return arrived


class DeepEP(_Dispatcher):
    """DeepEP's kernels (https://github.com/deepseek-ai/DeepEP), bf16 only. Send a token once to each rank it needs.

    They run on DeepEP's stream, on which DeepEP records the tensors (`async_finish`). `dispatch` waits on the host for
    the number of tokens and returns the number of rows of each expert as well, so nothing else waits.
    """

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Pending[Dispatched]:
        assert self.buffer is not None
        buffer = self.buffer(x_TD.shape[1] * x_TD.element_size())
        experts, known, handle = self.axis.size * self.local_experts, list[int](), None
        ids_RK: Tensor

        def send(x_TD: Tensor, weights_TK: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            nonlocal handle, ids_RK
            per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(choice.experts_TK, experts)
            x_RD, ids_RK, weights_RK, counts, handle, event = buffer.dispatch(
                x_TD,
                topk_idx=choice.experts_TK,
                topk_weights=weights_TK.float(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                expert_alignment=self.token_multiple,
                async_finish=True,
            )
            known.extend(counts)
            return _after(event, x_RD, weights_RK)

        def return_gradients(grad_RD: Tensor, grad_RK: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            grad_RD, grad_RK = grad_RD.contiguous(), grad_RK.float()
            grad_x, grad_weights, event = buffer.combine(grad_RD, handle, topk_weights=grad_RK, async_finish=True)
            return _after(event, grad_x, grad_weights)

        def send_back(y_RD: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            y_TD, _, event = buffer.combine(y_RD, handle, async_finish=True)
            return _after(event, y_TD)

        def send_gradients(grad_TD: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            grad_RD, *_, event = buffer.dispatch(grad_TD.contiguous(), handle=handle, async_finish=True)
            return _after(event, grad_RD)

        tokens = start((x_TD, choice.weights_TK), send, return_gradients)

        def arrived() -> Dispatched:
            x_RD, weights_RK = tokens()
            slots = self._local_slots(ids_RK, known)
            x_CD, collect = dispatch_rows(self.kernels, slots, x_RD, weights_RK, self.weights_on)

            def start_back(y_RD: Tensor) -> Pending[Tensor]:
                results = start((y_RD,), send_back, send_gradients)
                return lambda: results()[0]

            def combine(y_CD: Tensor) -> Callable[[], Pending[Tensor]]:
                return partial(start_back, collect(y_CD))

            return Dispatched(x_CD, slots.groups, combine)

        return arrived


def _after(event: Any, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that makes the current stream wait for DeepEP's, and returns what its kernels wrote."""

    def arrived() -> tuple[Tensor, ...]:
        event.current_stream_wait()
        return tensors

    return arrived


_KINDS: dict[DispatchMethod, Any] = {
    DispatchMethod.all_to_all: AllToAll,
    DispatchMethod.all_gather: AllGather,
    DispatchMethod.deepep: DeepEP,
}
