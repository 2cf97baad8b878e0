"""One optimizer step, whatever the engine, the layout and where the batch comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from data.loader import Batch
from model.load_balance import Balancer
from train.engine.fsdp import Updates


@dataclass(frozen=True)
class StepResult:
    """Tensors still on the device: the loss, the gradient norm before clipping, the routers' figures."""

    loss: Tensor
    gradient_norm: Tensor
    balance: dict[str, Tensor] = field(default_factory=dict)


def optimizer_step(
    engine: Updates, balancer: Balancer, batch: Batch, micro_batch_size: int, clip_norm: float | None, factor: float
) -> StepResult:
    """Learn from this rank's rows of a global batch; `factor` scales every group's peak learning rate."""
    loss = engine.forward_backward(batch, micro_batch_size)
    norm = engine.clip(clip_norm)
    engine.step(factor)
    return StepResult(loss, norm, balancer.step())
