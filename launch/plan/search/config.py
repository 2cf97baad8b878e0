"""What the search may choose, and the run that it plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.errors import ConfigError, check_numbers
from parallel.layout import Recompute
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Backend

MOST_VALUES = 100
"""Longest list of values that the search takes."""


class PlanPrecision(Enum):
    """A preset of `precision=`."""

    bf16 = "bf16"
    fp8 = "fp8"
    """Not on GPUs without such products."""

    @property
    def backend(self) -> Backend:
        return Backend.te if self is PlanPrecision.fp8 else Backend.native


@dataclass(frozen=True)
class SearchConfig:
    """Values that the search may choose. An empty list allows every value that can work."""

    pp: list[int] = field(default_factory=list)
    """Pipeline parallelism."""
    dp_replicate: list[int] = field(default_factory=list)
    """Copies of the sharded model."""
    tp: list[int] = field(default_factory=list)
    """Tensor parallelism; empty: only inside an NVLink domain."""
    cp: list[int] = field(default_factory=list)
    """Context parallelism; empty: parts of at least 1,024 tokens."""
    ep: list[int] = field(default_factory=list)
    """Expert parallelism."""
    etp: list[int] = field(default_factory=list)
    """Expert tensor parallelism; empty: only inside an NVLink domain."""
    micro_batch_size: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Sequences per forward pass of a rank."""
    schedule: list[PipelineSchedule] = field(default_factory=lambda: list(PipelineSchedule))
    """Pipeline schedules."""
    stages_per_rank: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Stages on each rank, for schedules that take several."""
    recompute: list[Recompute] = field(default_factory=lambda: list(Recompute))
    """Recomputation of activations."""
    precision: list[PlanPrecision] = field(default_factory=lambda: list(PlanPrecision))
    """Dtypes of the products."""

    def __post_init__(self) -> None:
        for key in ("pp", "dp_replicate", "tp", "cp", "ep", "etp", "micro_batch_size", "stages_per_rank"):
            if len(getattr(self, key)) > MOST_VALUES:
                raise ConfigError(key, None, f"names more than {MOST_VALUES} values")
            for value in getattr(self, key):
                if not 1 <= value <= 1_000_000:
                    raise ConfigError(key, value, "must be a positive number of ranks or sequences", [1])
        for key in ("micro_batch_size", "schedule", "stages_per_rank", "recompute", "precision"):
            if not getattr(self, key):
                raise ConfigError(key, None, "must allow at least one value")


@dataclass(frozen=True)
class RunShape:
    """The batch of the run, and how uneven its routing is."""

    seq_len: int
    global_batch_size: int
    imbalance: float
    """Routed tokens of the fullest expert rank over the mean."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("seq_len", "global_batch_size"))
        for key, most in (("seq_len", 1 << 30), ("global_batch_size", 1 << 40)):
            if getattr(self, key) > most:
                raise ConfigError(key, getattr(self, key), f"must be at most {most:,}")
        if not 1 <= self.imbalance <= 100:
            raise ConfigError("imbalance", self.imbalance, "is the fullest rank's tokens over the mean, from 1", [1.3])
