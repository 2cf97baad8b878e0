"""All routers of a model, once per optimizer step: the loads of the whole batch, the selection biases, the figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.config import FeedForward
from model.load_balance import RouterBalance
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer


class Balancer:
    """All routers of a model, once per optimizer step.

    `reduce` sums a tensor in place over all ranks (identity for one process). A rank may hold some of the layers only:
    what the others hold it counts as zero, and the sum makes the whole.
    """

    def __init__(self, model: Transformer, reduce: Callable[[Tensor], None] = lambda counts: None) -> None:
        mixtures = [i for i, layer in enumerate(model.config.blocks) if layer.feed_forward is FeedForward.moe]
        places = {str(layer): place for place, layer in enumerate(mixtures)}
        self.routers = {places[name]: _balance(layer) for name, layer in model.layers.items() if name in places}
        self.shape, self.reduce = (len(mixtures), model.config.num_experts), reduce
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Reduce the counts, move the biases and return this step's figures, still on the device.

        `counts` int64 [layers, E]; `aux` and `z`: the unscaled terms, and `entropy` of the routers' scores over its
        maximum, mean over tokens, [layers].
        """
        layers, experts = self.shape
        if not layers:
            return {}
        counts = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)
        sums = torch.zeros(layers, 3, dtype=torch.float64, device=self.device)
        for place, balance in self.routers.items():
            counts[place], sums[place] = balance.counts_E, balance.sums
        self.reduce(counts)
        self.reduce(sums)
        for place, balance in self.routers.items():
            balance.step(counts[place])
        return {"counts": counts, "aux": sums[:, 0], "z": sums[:, 1], "entropy": sums[:, 2]}


def _balance(layer: Any) -> RouterBalance:
    assert isinstance(layer, Layer) and isinstance(layer.ffn, MixtureOfExperts)
    return layer.ffn.router.balance
