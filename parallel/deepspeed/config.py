"""The `parallel.zero` section: how DeepSpeed's ZeRO is configured. Does not import DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError

VERSION = "0.19.8"
"""The only DeepSpeed version that `parallel.deepspeed` accepts, because it uses DeepSpeed's private interfaces."""
INSTALL = f"pip install 'leviathan[deepspeed]' (deepspeed=={VERSION})"


class Offload(Enum):
    """Where the optimizer's state (fp32 weights and moments) is kept between steps."""

    none = "none"
    cpu = "cpu"
    """In host memory, where PyTorch's fused AdamW updates it. It is as fast as DeepSpeed's CPUAdam and needs no
    compiler.
    """
    nvme = "nvme"
    """In files in the directory `nvme`. The host reads, updates and writes a chunk at a time: see `offload.py`."""


class ParameterOffload(Enum):
    """Where stage 3 keeps this rank's shards of the parameters that the model computes with."""

    none = "none"
    cpu = "cpu"
    """In host memory. They are copied to the device whenever they are gathered."""


@dataclass(frozen=True)
class ZeroConfig:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). Stage 1 shards the optimizer's state over the data-parallel
    ranks. Stage 2 shards the gradients as well, and reduces them with every micro-batch instead of once a step. Stage 3
    shards parameters too, gathers them for both passes of a micro-batch, and does not support routed experts.
    """

    stage: int = 1
    """What is sharded: 1, 2 or 3, as above."""
    bucket_size: int = 1 << 24
    """Number of elements whose gradients are reduced together, in an fp32 buffer."""
    offload: Offload = Offload.none
    """Saves up to 12 bytes of device memory per parameter of a rank's shard, and costs time in each step."""
    nvme: str | None = None
    """A directory on a local disk, for offload=nvme."""
    offload_parameters: ParameterOffload = ParameterOffload.none
    """For stage 3 only."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's section `zero_optimization`. Stage 3 keeps up to 1e9 elements gathered between
    passes unless `stage3_max_live_parameters` or `stage3_max_reuse_distance` are set lower.
    """

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ConfigError("stage", self.stage, "there are stages 1, 2 and 3", [1, 2, 3])
        if self.offload_parameters is not ParameterOffload.none and self.stage != 3:
            reason = f"parameters are whole on every rank in stage {self.stage}: zero.stage=3 shards them"
            raise ConfigError("offload_parameters", self.offload_parameters, reason, [ParameterOffload.none.value])
        if self.bucket_size < 1:
            raise ConfigError("bucket_size", self.bucket_size, "must be positive", [1 << 24])
        if (self.offload is Offload.nvme) != bool(self.nvme) or self.nvme == "":
            reason = "needs zero.offload=nvme" if self.nvme else "name a directory on a local disk"
            raise ConfigError("nvme", self.nvme, reason)
