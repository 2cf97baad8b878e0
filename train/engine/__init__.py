"""Make an engine, which computes gradients and updates the parameters with FSDP2 or DeepSpeed."""

from __future__ import annotations

from parallel.layout import EngineKind
from parallel.parallelize import ParallelModel
from train.engine.base import Engine
from train.engine.deepspeed import ZeroEngine
from train.engine.fsdp import TorchEngine
from train.optim.config import OptimizerConfig


def make_engine(placed: ParallelModel, config: OptimizerConfig, seed: int) -> Engine:
    """Make the engine that the layout names. `seed`: the seed of the initial weights."""
    match placed.meshes.layout.engine:
        case EngineKind.deepspeed:
            return ZeroEngine(placed, config, seed)
        case EngineKind.fsdp2:
            return TorchEngine(placed, config)
