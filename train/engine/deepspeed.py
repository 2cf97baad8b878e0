"""The engine that trains with DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.deepspeed.config import Offload
from parallel.deepspeed.offload import PagedAdamW
from parallel.deepspeed.zero3 import Zero3
from parallel.deepspeed.zero12 import Zero12, ZeroOptimizer
from parallel.grad_norm import gradient_norm
from parallel.parallelize import ParallelModel
from parallel.sharding import LocalShard, initialise, sum_partial_gradients
from train.checkpoint.state import TensorShard, buffers
from train.engine.base import LanguageEngine
from train.optim.config import OptimizerConfig
from train.optim.optimizer import elementwise, prime, role_groups, set_learning_rate


class ZeroEngine(LanguageEngine):
    """Keeps this rank's ranges of the fp32 master weights, moments and summed gradients. Up to stage 2 the model's own
    weights are not sharded over data-parallel ranks.
    """

    def __init__(self, placed: ParallelModel, config: OptimizerConfig, seed: int) -> None:
        super().__init__(placed)
        model, specs, meshes = placed.model, placed.specs, placed.meshes
        groups, self.stage = role_groups(model, specs, config), meshes.layout.zero_stage
        make = partial(make_inner, config=config, offload=meshes.layout.zero.offload)
        self.zero: ZeroOptimizer
        if self.stage == 3:
            self.zero = Zero3(model, groups, make, prime, specs, meshes)
        else:
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.zero = Zero12(groups, make, prime, names, specs, meshes)
        initialise(self.weights(), placed.model.config, seed)  # draw in fp32; the model's own weights may be rounded
        self.written()

    def after_backward(self, last: bool) -> None:
        if self.stage > 1:
            self.zero.after_backward(last)

    def complete_gradients(self) -> None:
        if self.stage == 1:
            sum_partial_gradients(self.placed.model, self.placed.specs)
        self.zero.reduce()

    def norm(self) -> Tensor:
        return gradient_norm(self.gradients(), self.meshes.world, self.device, torch.float64)

    def scale(self, factor: Tensor) -> None:
        self.zero.scale(factor)

    def step(self, learning_rate_factor: float) -> None:
        set_learning_rate(self.zero.param_groups, learning_rate_factor)
        self.zero.step()

    def gradients(self) -> Iterator[LocalShard]:
        return self.zero.gradients()

    def weights(self) -> Iterator[LocalShard]:
        return self.zero.weights()

    def state(self) -> list[TensorShard]:
        found = buffers(self.placed.model, self.meshes.is_first_of_stage)
        for one in self.zero.slices:
            found += _parts(f"model.{one.spec.info.name}", one, one.masters)
            for key, held in one.state.items():
                found += _parts(f"optimizer.{one.spec.info.name}.{key}", one, held)
        for still in self.zero.frozen:
            name, shape = f"model.{still.spec.info.name}", tuple(still.spec.info.shape)
            for block, values in still.of(still.masters):
                found.append(TensorShard(name, values, shape, block.offset, still.writes))
        return found

    def written(self) -> None:
        self.zero.spread()


def make_inner(groups: list[dict[str, Any]], config: OptimizerConfig, offload: Offload) -> torch.optim.Optimizer:
    """Make the optimizer of the fp32 master weights, on the device or the host. PyTorch's fused AdamW is as fast on the
    host as DeepSpeed's CPUAdam (bench/RESULTS.md) and needs no compiler.
    """
    if offload is not Offload.nvme:
        return elementwise(groups, config)
    return PagedAdamW(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0})


def _parts(name: str, one: Any, held: Tensor) -> list[TensorShard]:
    spec = one.spec
    if held.dim() == 0:  # the step count of a whole group, which one rank writes
        first = one.start == 0 and not any(spec.compute_block.offset)
        return [TensorShard(name, held, (), (), spec.is_owner and first)]
    shape = tuple(spec.info.shape)
    return [TensorShard(name, values, shape, block.offset, spec.is_owner) for block, values in one.of(held)]
