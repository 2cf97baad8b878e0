"""Load balancing of experts: auxiliary loss, router z-loss, selection biases, and the measured loads.

The two losses enter by gradient injection. The router's logits pass through an autograd function whose forward pass
changes nothing and whose backward pass adds the gradients of the losses and counts the loads. The backward pass runs
once per micro-batch, so recomputed layers are counted once.

Shapes: B batch, T sequence, E experts, K experts per token, L MoE layers. Every term is a sum over tokens divided by
the global number of tokens of the optimizer step, which is known before the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.config import AuxScope, BalanceConfig, FeedForward, ModelConfig, RouterConfig
from model.router_scores import aux_loss, log_probabilities


class RouterSums(NamedTuple):
    """Metrics of a router, as means over the tokens of a step: the losses without their coefficients, and the entropy
    of the normalised scores divided by its maximum ln E.

    A field added here is counted, certified and logged as `router_NAME` without further code. To plot it, add a row to
    `train.report.plots._LAYER_PLOTS`.
    """

    aux: Tensor
    z: Tensor
    entropy: Tensor


class RouterBalance(nn.Module):
    """Balancing state of one router.

    Persistent buffers, which make resumption exact, are the selection bias `bias_E` and the global load `load_E` of the
    last step (mean 1). The counts of this step, those of image tokens among them (`image_counts_E`), and the
    `RouterSums` are not persistent; `step` resets them.
    """

    bias_E: Tensor
    load_E: Tensor
    counts_E: Tensor
    image_counts_E: Tensor
    sums: Tensor

    def __init__(self, experts: int, router: RouterConfig, config: BalanceConfig) -> None:
        super().__init__()
        self.config, self.router = config, router
        self.sum_over_sequence: Callable[[Tensor], None] = lambda counts_BE: None
        """Sums the counts of each sequence in place over the ranks that hold parts of it."""
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.ones(experts))
        self.register_buffer("counts_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("image_counts_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("sums", torch.zeros(len(RouterSums._fields), dtype=torch.float64), persistent=False)

    def reset(self) -> None:
        """Set the initial values, because `to_empty` leaves the buffers undefined."""
        for buffer in (self.bias_E, self.counts_E, self.image_counts_E, self.sums):
            buffer.zero_()
        self.load_E.fill_(1)

    def forward(
        self,
        logits_BTE: Tensor,
        experts_BTK: Tensor,
        routed_tokens: Tensor | float | None,
        is_image_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the logits unchanged. Their backward pass adds the losses' gradients and counts the loads."""
        if not torch.is_grad_enabled():
            return logits_BTE
        if routed_tokens is None:
            if self.config.aux or self.config.z:
                raise ValueError("balancing losses need ForwardContext.routed_tokens, the step's global token count")
            routed_tokens = float(logits_BTE.shape[0] * logits_BTE.shape[1])
        if not logits_BTE.requires_grad:  # everything up to here is frozen
            if not in_backward():
                self.measure(logits_BTE, experts_BTK, routed_tokens, is_image_BT)
            return logits_BTE
        return _InjectGradient.apply(logits_BTE, experts_BTK, self, routed_tokens, is_image_BT)

    def measure(
        self,
        logits_BTE: Tensor,
        experts_BTK: Tensor,
        routed_tokens: Tensor | float,
        is_image_BT: Tensor | None,
        grad_BTE: Tensor | None = None,
    ) -> Tensor | None:
        """Count the loads and `RouterSums` of a micro-batch. Returns `grad_BTE`, the gradient of the logits, plus the
        gradients of the losses.
        """
        counts_BE = count(experts_BTK, logits_BTE.shape[-1])
        self.counts_E += counts_BE.sum(0)
        if is_image_BT is not None:
            self.image_counts_E += count(experts_BTK, logits_BTE.shape[-1], is_image_BT).sum(0)
        log_p_BTE = logits_BTE.log_softmax(-1)
        lse_BT = logits_BTE.amax(-1) - log_p_BTE.amax(-1)  # as exact as logsumexp, in a fraction of its time
        aux = None
        if self.config.z and grad_BTE is not None:
            grad_BTE = grad_BTE + log_p_BTE.exp() * (2 * self.config.z / routed_tokens * lse_BT)[..., None]
        if self.config.aux:
            if self.config.aux_scope is not AuxScope.whole:
                self.sum_over_sequence(counts_BE)
            load_BE = _load(counts_BE, self)
            aux, gradient_BTE = aux_loss(self.router, logits_BTE, load_BE.to(logits_BTE.dtype))
            if grad_BTE is not None:
                grad_BTE = grad_BTE + gradient_BTE * (self.config.aux / routed_tokens)
        z = _dot(lse_BT, lse_BT)
        log_p_BTE = log_probabilities(self.router, logits_BTE, log_p_BTE)
        entropy = _dot(log_p_BTE.exp(), log_p_BTE) * (-1 / math.log(logits_BTE.shape[-1]))
        sums = RouterSums(aux=torch.zeros_like(z) if aux is None else aux, z=z, entropy=entropy)
        self.sums += torch.stack(sums) / routed_tokens
        return grad_BTE

    @torch.no_grad()
    def step(self, counts_E: Tensor, frozen: bool = False) -> None:
        """Update load and, unless the router is `frozen`, selection bias from the step's global counts; reset this
        step's counts.
        """
        mean = counts_E.double().mean().clamp_min(1)
        self.load_E.copy_(counts_E.double() / mean)
        if self.config.bias_rate and not frozen:
            delta_E = torch.sign(1 - self.load_E) * self.config.bias_rate
            self.bias_E.add_(delta_E - delta_E.mean())
        for buffer in (self.counts_E, self.image_counts_E, self.sums):
            buffer.zero_()


def in_backward() -> bool:
    """Return whether a backward pass runs: a forward pass inside recomputes a layer."""
    return torch._C._current_graph_task_id() != -1


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        experts: Tensor,
        balance: RouterBalance,
        routed_tokens: Tensor | float,
        is_image: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(logits, experts)
        ctx.balance, ctx.routed_tokens, ctx.is_image_BT = balance, routed_tokens, is_image
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_BTE, experts_BTK = ctx.saved_tensors
        grad_BTE = ctx.balance.measure(logits_BTE, experts_BTK, ctx.routed_tokens, ctx.is_image_BT, grads[0])
        return grad_BTE, None, None, None, None


def count(experts_BTK: Tensor, experts: int, counted_BT: Tensor | None = None) -> Tensor:
    """Count how often each sequence chose each expert, for all tokens or those of `counted_BT`: int64 [B, E]. Integer
    sums are the same in any order.
    """
    chosen = experts_BTK.flatten(1)
    one = torch.ones_like(chosen)
    if counted_BT is not None:
        one = counted_BT[..., None].expand_as(experts_BTK).flatten(1).to(chosen.dtype)
    return chosen.new_zeros(chosen.shape[0], experts).scatter_add_(1, chosen, one)


def _load(counts_BE: Tensor, balance: RouterBalance) -> Tensor:
    """Return each expert's load over the configured scope, [B or 1, E]: its fraction of the slots, times E."""
    if balance.config.aux_scope is AuxScope.whole:
        return balance.load_E[None]
    counts = counts_BE if balance.config.aux_scope is AuxScope.sequence else counts_BE.sum(0, keepdim=True)
    return counts.double() * counts.shape[1] / counts.sum(1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


class RoutedModel(Protocol):
    """A decoder, or one of its pipeline stages. `layers` are named by their index in the whole model."""

    config: ModelConfig

    @property
    def layers(self) -> nn.ModuleDict: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def _router(layer: Any) -> nn.Parameter:
    weight: nn.Parameter = layer.ffn.router.weight
    return weight


class Balancer:
    """Updates all routers of a model once per optimizer step. A frozen router keeps its selection bias.

    `reduce` sums a tensor in place over all ranks (identity for one process). A rank that holds only some of the layers
    contributes zeros for the others.
    """

    def __init__(self, model: RoutedModel, reduce: Callable[[Tensor], None] = lambda counts: None) -> None:
        moe = [i for i, layer in enumerate(model.config.blocks) if layer.feed_forward is FeedForward.moe]
        index = {str(layer): i for i, layer in enumerate(moe)}
        self.routers = {
            index[name]: next(module for module in layer.modules() if isinstance(module, RouterBalance))
            for name, layer in model.layers.items()
            if name in index
        }
        self.frozen = {
            index[name] for name, layer in model.layers.items() if name in index and not _router(layer).requires_grad
        }
        self.shape, self.reduce = (len(moe), model.config.num_experts), reduce
        self.counts_images = model.config.vision is not None
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Reduce the counts, update the selection biases and return this step's metrics, still on the device: `counts`
        int64 [L, E], for a model with a vision encoder `image_counts` of image tokens, and each field of `RouterSums`
        [L].
        """
        layers, experts = self.shape
        if not layers:
            return {}
        # of all tokens and, for a model with a vision encoder, of image tokens
        counts = torch.zeros(1 + self.counts_images, layers, experts, dtype=torch.int64, device=self.device)
        sums = torch.zeros(layers, len(RouterSums._fields), dtype=torch.float64, device=self.device)
        for layer, balance in self.routers.items():
            counts[0, layer], sums[layer] = balance.counts_E, balance.sums
            if self.counts_images:
                counts[1, layer] = balance.image_counts_E
        self.reduce(counts)
        self.reduce(sums)
        for layer, balance in self.routers.items():
            balance.step(counts[0, layer], layer in self.frozen)
        named = dict(zip(("counts", "image_counts"), counts.unbind(), strict=False))
        return named | dict(zip(RouterSums._fields, sums.unbind(1), strict=True))
