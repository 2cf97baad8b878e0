"""The interface of engines, with the loop over a step's micro-batches that all engines use, and the optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.loader import Batch
from model.attention.plan import ForwardContext
from model.load_balance import Balancer
from parallel.parallelize import ParallelModel, ParallelNetwork
from parallel.pipeline.runtime import Pipeline
from parallel.sharding import LocalShard
from train.checkpoint.state import TensorShard
from train.engine.images import give_images
from train.engine.inputs import AheadCopies, StepInputs, step_inputs
from train.loss import BatchLoss


@dataclass(frozen=True)
class StepResult:
    """Results of a step, still on the device. `gradient_norm`: the norm before clipping."""

    loss: Tensor
    gradient_norm: Tensor
    balance: dict[str, Tensor] = field(default_factory=dict)
    """The routers' statistics."""
    modality_losses: dict[str, Tensor] = field(default_factory=dict)
    """The losses of documents with images and of those without; empty for data without images."""


class Engine(ABC):
    """Computes the gradients of batches and updates the parameters."""

    placed: ParallelNetwork

    def __init__(self, placed: ParallelNetwork) -> None:
        self.placed, self.meshes, self.device = placed, placed.meshes, placed.device
        self.modality_losses: dict[str, Tensor] = {}
        """Those of the last batch: see `StepResult`."""

    @abstractmethod
    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Compute the gradients of this rank's sequences, in micro-batches of `micro_batch_size` sequences.

        Returns the loss of the global batch: a scalar on the device, equal on every rank.
        """

    def prepare(self, batch: Batch, micro_batch_size: int) -> None:
        """Start to copy a batch to the device ahead of its step. The thread that makes batches calls it. By default
        nothing is copied ahead.
        """
        batch.ahead = None

    @abstractmethod
    def complete_gradients(self) -> None:
        """Finish the reductions over ranks after the last micro-batch."""

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients down if their global norm exceeds `limit`. Returns the norm before clipping, a scalar on
        the device.
        """
        norm = self.norm()
        if limit is not None:
            self.scale((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @abstractmethod
    def norm(self) -> Tensor:
        """Return the norm of all gradients, the same on every rank."""

    @abstractmethod
    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`."""

    @abstractmethod
    def step(self, learning_rate_factor: float) -> None:
        """Update the parameters at `learning_rate_factor` times each group's peak learning rate; drop the gradients."""

    @abstractmethod
    def gradients(self) -> Iterator[LocalShard]:
        """Yield this rank's blocks of the gradients, between `forward_backward` and `step`. The blocks of all ranks
        together cover every parameter, some parts more than once.
        """

    @abstractmethod
    def weights(self) -> Iterator[LocalShard]:
        """Yield this rank's blocks of the master weights, to read or to write; call `written` after writing."""

    @abstractmethod
    def state(self) -> list[TensorShard]:
        """Return the shards of a checkpoint, which share the engine's memory; call `written` after changing them."""

    @abstractmethod
    def written(self) -> None:
        """Update the engine's copies of weights and state after a caller wrote to tensors of `weights` or `state`."""


class LanguageEngine(Engine):
    """Computes the gradients of a language model."""

    placed: ParallelModel

    def __init__(self, placed: ParallelModel) -> None:
        super().__init__(placed)
        self.pipeline = None
        self.copies = AheadCopies(placed) if self.device.type == "cuda" else None
        if self.meshes.pp.size > 1:
            self.pipeline = Pipeline(placed.model, placed.stacks, self.meshes, self.device)

    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Compute the gradients of this rank's sequences, in micro-batches of `micro_batch_size` sequences.

        Returns the mean loss over the labelled tokens of the global batch: a scalar on the device, equal on every rank.
        """
        inputs = self._inputs(batch, micro_batch_size)
        tokens_BT, labels_BT, contexts = inputs.tokens_BT, inputs.labels_BT, inputs.contexts
        share = self.placed.context_shard(batch.tokens_BT.shape[1])
        loss = BatchLoss(batch, labels_BT, share, micro_batch_size, self.meshes)
        encoded = give_images(self.placed, inputs.images, contexts)
        for context, wanted_BT in zip(contexts, labels_BT.split(micro_batch_size), strict=True):
            context.labels_BT = wanted_BT
            self.placed.prepare(context)
        if self.pipeline is not None:
            total = self.pipeline.forward_backward(tokens_BT, contexts, loss)
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for part_BT, context in _micro_batches(tokens_BT, contexts, micro_batch_size):
                one = loss(self.placed.model(part_BT, context))
                self.before_backward(context is contexts[-1])
                one.backward()
                total += one.detach()
                self.after_backward(context is contexts[-1])
        if encoded is not None:
            encoded.backward()
        self.complete_gradients()
        total, self.modality_losses = loss.reduce(total)
        return total

    def prepare(self, batch: Batch, micro_batch_size: int) -> None:
        if self.copies is not None:
            batch.ahead = self.copies.prepare(batch, micro_batch_size)

    def _inputs(self, batch: Batch, micro_batch_size: int) -> StepInputs:
        """Return what `prepare` has copied, once, or copy it now."""
        ahead, batch.ahead = batch.ahead, None
        if self.copies is not None and isinstance(ahead, StepInputs) and ahead.micro_batch_size == micro_batch_size:
            return self.copies.take(ahead)
        return step_inputs(self.placed, batch, micro_batch_size)

    def before_backward(self, last: bool) -> None:
        """Run before the backward pass of each micro-batch. It is not called with a pipeline."""

    def after_backward(self, last: bool) -> None:
        """Run after the backward pass of each micro-batch. It is not called with a pipeline."""


def optimizer_step(
    engine: Engine,
    balancer: Balancer,
    batch: Batch,
    micro_batch_size: int,
    clip_norm: float | None,
    factor: float,
    before_clipping: Callable[[], None] | None = None,
) -> StepResult:
    """Train on this rank's sequences of a global batch; `factor` scales every group's peak learning rate."""
    loss = engine.forward_backward(batch, micro_batch_size)
    if before_clipping is not None:
        before_clipping()
    norm = engine.clip(clip_norm)
    engine.step(factor)
    return StepResult(loss, norm, balancer.step(), engine.modality_losses)


def _micro_batches(
    tokens_BT: Tensor, contexts: list[ForwardContext], size: int
) -> Iterator[tuple[Tensor, ForwardContext]]:
    return zip(tokens_BT.split(size), contexts, strict=True)
