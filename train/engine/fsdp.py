"""Engines for one device and for FSDP2, whose optimizer updates the model's parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from parallel.fsdp import reduce_within_step
from parallel.grad_norm import gradient_norm, scale_gradients
from parallel.parallelize import ParallelModel, ParallelNetwork
from parallel.sharding import LocalShard, local_gradients, local_shards, sum_partial_gradients
from train.checkpoint.state import TensorShard, run_state
from train.engine.base import Engine, LanguageEngine
from train.optim.config import OptimizerConfig
from train.optim.optimizer import make_optimizer, prime, set_learning_rate


class InPlaceEngine(Engine):
    """Updates the parameters in place, whether they are sharded by FSDP2 or whole."""

    def __init__(self, placed: ParallelNetwork, config: OptimizerConfig) -> None:
        super().__init__(placed)
        self.optimizer = make_optimizer(placed.model, placed.specs, config, placed.meshes)
        self.written()

    def complete_gradients(self) -> None:
        sum_partial_gradients(self.placed.model, self.placed.specs)

    def norm(self) -> Tensor:
        return gradient_norm(self.gradients(), self.meshes.world, self.device)

    def scale(self, factor: Tensor) -> None:
        scale_gradients(self.placed.model, factor)

    def step(self, learning_rate_factor: float) -> None:
        set_learning_rate(self.optimizer.param_groups, learning_rate_factor)
        self.optimizer.step()
        self.placed.model.clock.tick()
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
        self.placed.model.clock.tick()


class TorchEngine(InPlaceEngine, LanguageEngine):
    """Trains a language model, with or without a pipeline."""

    def __init__(self, placed: ParallelModel, config: OptimizerConfig) -> None:
        super().__init__(placed, config)

    def before_backward(self, last: bool) -> None:
        reduce_within_step(self.placed.model, self.meshes.layout, last)
