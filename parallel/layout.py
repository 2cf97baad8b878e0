"""How many ranks each axis has, and what cannot work, refused before a process group exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from core.errors import ConfigError, divisors


class Recompute(Enum):
    """What a layer's backward computes again instead of keeping: nothing, all but matrix products, everything."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the layout and how memory is traded for time.

    Every rank sees its own rows; parameters, gradients and optimizer state are sharded over `dp_shard` ranks (FSDP2)
    and repeated over `dp_replicate` groups of them (HSDP).
    """

    dp_replicate: int = 1
    dp_shard: int | None = None
    """None: whatever fills the world."""
    recompute: Recompute = Recompute.none

    def __post_init__(self) -> None:
        for key in ("dp_replicate", "dp_shard"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "must be positive")

    def resolve(self, world_size: int) -> ParallelConfig:
        """The same layout with `dp_shard` filled in. Raises where the degrees do not make up the world."""
        if world_size % self.dp_replicate:
            reason = f"must divide the world's {world_size} ranks"
            raise ConfigError("parallel.dp_replicate", self.dp_replicate, reason, divisors(world_size))
        shard = world_size // self.dp_replicate
        if self.dp_shard not in (None, shard):
            reason = f"times dp_replicate={self.dp_replicate} must equal the world's {world_size} ranks"
            raise ConfigError("parallel.dp_shard", self.dp_shard, reason, [shard, "null"])
        return replace(self, dp_shard=shard)

    def check_batch(self, global_batch: int, micro_batch: int, world_size: int) -> None:
        """Rows per step must split evenly over the ranks, and a rank's rows into micro-batches."""
        if global_batch % world_size:
            legal = [n for n in divisors(global_batch) if n <= world_size]
            reason = f"must divide the global batch of {global_batch} rows (training.global_batch)"
            raise ConfigError("world size", world_size, reason, legal)
        rows = global_batch // world_size
        if rows % micro_batch:
            raise ConfigError("training.micro_batch", micro_batch, f"must divide a rank's {rows} rows", divisors(rows))
