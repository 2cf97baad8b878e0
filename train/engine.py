"""What turns batches into updates. The trainer speaks to this protocol, so that another engine can take its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from data.loader import Batch
from model.context import SequenceContext
from model.transformer import Transformer
from parallel.mesh import Meshes
from parallel.norm import gradient_norm, scale_gradients
from parallel.shards import ShardSpec, sum_copies
from train.loss import label_count, summed_loss
from train.optimizer import OptimizerConfig, make_optimizer, set_learning_rate


class Engine(Protocol):
    """One optimizer step is forward_backward, clip, step, in this order."""

    model: Transformer
    specs: Mapping[str, ShardSpec]
    optimizer: torch.optim.Optimizer

    def forward_backward(self, batch: Batch, micro_batch: int) -> Tensor:
        """Gradients of this rank's rows of a step, cut into micro-batches of rows. Returns the loss: the sum over the
        global batch's tokens divided by their number, a scalar still on the device, equal on every rank.
        """
        ...

    def clip(self, limit: float | None) -> Tensor:
        """Global gradient norm before clipping, a scalar on the device; above `limit` gradients are scaled down."""
        ...

    def step(self, learning_rate_factor: float) -> None:
        """Update the parameters and drop the gradients."""
        ...


class TorchEngine:
    """Engine for a plain model or one sharded by FSDP2."""

    def __init__(
        self, model: Transformer, specs: Mapping[str, ShardSpec], config: OptimizerConfig, meshes: Meshes
    ) -> None:
        self.model, self.specs, self.meshes = model, specs, meshes
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, specs, config, meshes)

    def forward_backward(self, batch: Batch, micro_batch: int) -> Tensor:
        rows = self.meshes.rows
        tokens = label_count(batch.labels_BT).to(self.device)
        rows.sum(tokens, "loss")
        routed = float(batch.tokens_BT.numel() * rows.size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in _micro_batches(batch, micro_batch):
            context = SequenceContext(part.positions_BT, self.device, routed)
            part = part.to(self.device)
            loss = summed_loss(self.model(part.tokens_BT, context), part.labels_BT, self.meshes.tp)
            loss = loss / tokens.clamp_min(1)  # a batch of one-token documents has nothing to predict
            loss.backward()
            total += loss.detach()
        sum_copies(self.model, self.specs)
        rows.sum(total, "loss")
        return total

    def clip(self, limit: float | None) -> Tensor:
        norm = gradient_norm(self.model, self.specs, self.meshes)
        if limit is not None:
            scale_gradients(self.model, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, learning_rate_factor: float) -> None:
        set_learning_rate(self.optimizer, learning_rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    for start in range(0, batch.tokens_BT.shape[0], rows):
        yield batch.slice(start, start + rows)
