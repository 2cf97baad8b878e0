"""Count what an optimizer step costs beside its layers: the clip norm, the optimizer, the balancer.

The model has four of Scout's layers, on meta tensors with the code that runs on GPUs; the step trains on one
micro-batch of 8,192 tokens. The kernels of clipping and of the optimizer take 320 chunks of 65,536 elements at a time,
so that their number grows with the weights of a rank. FSDP2's own work is not counted.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from data.loader import Batch
from model.config import ModelConfig
from model.load_balance import Balancer
from parallel import parallelize
from parallel.checks.counting import Counter
from parallel.checks.meta import META, fused_adamw_on_meta
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from precision.config import Compute, PrecisionConfig
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.optim.config import OptimizerConfig

STEP_LAYERS = 4
GPU = torch.device("cuda")


class StepCase:
    """An engine on meta tensors, and the launches of each part of its last step, by operator."""

    def __init__(self, model: ModelConfig | None = None) -> None:
        model = model or replace(ModelConfig(), num_layers=STEP_LAYERS)
        meshes = meshes_of_rank(ParallelConfig().resolve(1), 0)
        placed = parallelize.build(model, PrecisionConfig(Compute.bfloat16), meshes, META, 0, kind=GPU)
        self.engine = TorchEngine(placed, OptimizerConfig())
        self.balancer = Balancer(placed.model)
        self.parts: dict[str, Counts[str]] = {}

    def __call__(self, tokens: int) -> Counter:
        """Train on a sequence of `tokens`. Return the counts of the whole step."""
        ids = torch.arange(tokens)[None]
        batch = Batch(ids % 64, ids % 64, ids, torch.zeros(1, dtype=torch.int64))
        engine, balancer, whole = self.engine, self.balancer, Counter()
        methods = {"clip": (engine, "clip"), "optimizer": (engine, "step"), "balancer": (balancer, "step")}
        with ExitStack() as patches:
            for name, (owner, method) in methods.items():
                noted = partial(self._noted, name, whole, getattr(owner, method))
                patches.enter_context(patch.object(owner, method, noted))
            patches.enter_context(fused_adamw_on_meta())
            patches.enter_context(whole)
            optimizer_step(engine, balancer, batch, 1, 1.0, 1.0)
        return whole

    def _noted(self, name: str, whole: Counter, work: Callable[..., Any], *given: Any) -> Any:
        before = whole.launches.copy()
        result = work(*given)
        self.parts[name] = whole.launches - before
        return result


def step_counts(tokens: int) -> tuple[dict[str, int], int]:
    """Return the launches of each part of a step that is not the first, and the host synchronisations of all of it."""
    case = StepCase()
    case(tokens)  # makes the optimizer's state
    syncs = case(tokens).syncs.total()
    return {name: launches.total() for name, launches in case.parts.items()}, syncs
