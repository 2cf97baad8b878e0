"""What turns batches into updates. The trainer speaks to this protocol, so that another engine can take its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from data.loader import Batch
from model.attention.plan import ForwardContext
from parallel.grad_norm import gradient_norm, scale_gradients
from parallel.parallelize import ParallelModel
from parallel.pipeline.runtime import Pipeline
from parallel.sharding import LocalShard, local_gradients, local_shards, sum_partial_gradients
from train.checkpoint.state import TensorShard, run_state
from train.loss import label_count, summed_loss
from train.optim.optimizer import OptimizerConfig, make_optimizer, prime, set_learning_rate


class Updates(Protocol):
    """One optimizer step is forward_backward, clip, step, in this order."""

    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
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


class Engine(Updates, Protocol):
    """Beside the steps, what they work on."""

    placed: ParallelModel

    def gradients(self) -> Iterator[LocalShard]:
        """This rank's blocks of the step's gradients; between `forward_backward` and `step`. All ranks' blocks
        together are every parameter's gradient, some blocks several times.
        """
        ...

    def weights(self) -> Iterator[LocalShard]:
        """This rank's blocks of the weights that are updated, to be read or written; call `written` after writing."""
        ...

    def state(self) -> list[TensorShard]:
        """Everything that a checkpoint must keep, sharing storage; call `written` after writing."""
        ...

    def written(self) -> None:
        """Weights or state were written from outside."""
        ...


class EngineBase:
    """What all engines do alike: the passes over a step's micro-batches, whatever keeps the gradients."""

    def __init__(self, placed: ParallelModel) -> None:
        self.placed, self.meshes, self.device = placed, placed.meshes, placed.device
        self.pipeline = None
        if self.meshes.pp.size > 1:
            self.pipeline = Pipeline(placed.model, placed.stacks, self.meshes, self.device)

    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
        meshes, share = self.meshes, self.placed.context_shard(batch.tokens_BT.shape[1])
        labels_BT = share.take(batch.labels_BT).to(self.device)
        tokens = label_count(labels_BT) * meshes.counts_tokens
        meshes.world.sum(tokens, "loss")
        routed = float(batch.tokens_BT.numel() * meshes.dp.size)
        starts = range(0, len(batch.tokens_BT), micro_batch_size)
        positions = [batch.positions_BT[start : start + micro_batch_size] for start in starts]
        contexts = [self.placed.sequence_context(part_BT, routed) for part_BT in positions]
        tokens_BT = share.take(batch.tokens_BT).to(self.device)

        def loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
            summed = summed_loss(logits_BTV, labels_BT, meshes.tp)
            return summed / tokens.clamp_min(1)  # a batch of one-token documents has nothing to predict

        if self.pipeline is not None:
            total = self.pipeline.forward_backward(tokens_BT, labels_BT, contexts, loss)
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for part_BT, wanted_BT, context in _micro_batches(tokens_BT, labels_BT, contexts, micro_batch_size):
                one = loss(self.placed.model(part_BT, context), wanted_BT)
                one.backward()
                total += one.detach()
                self.after_backward(context is contexts[-1])
        self.complete_gradients()
        total = total * (meshes.tp.rank == 0)
        meshes.world.sum(total, "loss")
        return total

    def after_backward(self, last: bool) -> None:
        """After each micro-batch, where there is no pipeline."""

    def complete_gradients(self) -> None:
        """After the last micro-batch: what is still to be summed over ranks."""
        raise NotImplementedError

    def clip(self, limit: float | None) -> Tensor:
        norm = self.norm()
        if limit is not None:
            self.scale((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def norm(self) -> Tensor:
        """Of all gradients, the same on every rank."""
        raise NotImplementedError

    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient."""
        raise NotImplementedError


class TorchEngine(EngineBase):
    """Engine for a model on one device or laid out by FSDP2 and pipelines."""

    def __init__(self, placed: ParallelModel, config: OptimizerConfig) -> None:
        super().__init__(placed)
        self.optimizer = make_optimizer(placed.model, placed.specs, config, placed.meshes)

    def complete_gradients(self) -> None:
        sum_partial_gradients(self.placed.model, self.placed.specs)

    def norm(self) -> Tensor:
        return gradient_norm(self.gradients(), self.meshes.world, self.device)

    def scale(self, factor: Tensor) -> None:
        scale_gradients(self.placed.model, factor)

    def step(self, learning_rate_factor: float) -> None:
        set_learning_rate(self.optimizer.param_groups, learning_rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Iterator[LocalShard]:
        return local_gradients(self.placed.model, self.placed.specs)

    def weights(self) -> Iterator[LocalShard]:
        return local_shards(self.placed.model, self.placed.specs)

    def state(self) -> list[TensorShard]:
        prime(self.optimizer)
        placed = self.placed
        return run_state(placed.model, self.optimizer, placed.specs, self.meshes.is_first_of_stage)

    def written(self) -> None:
        pass


def _micro_batches(
    tokens_BT: Tensor, labels_BT: Tensor, contexts: list[ForwardContext], rows: int
) -> Iterator[tuple[Tensor, Tensor, ForwardContext]]:
    return zip(tokens_BT.split(rows), labels_BT.split(rows), contexts, strict=True)
