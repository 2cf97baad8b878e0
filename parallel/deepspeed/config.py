"""How DeepSpeed's ZeRO is set: the `parallel.zero` section, which knows nothing of DeepSpeed itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError

VERSION = "0.19.8"
"""What `parallel.zero` was written for: it uses interfaces that are no promise."""
INSTALL = f"pip install 'leviathan[deepspeed]' (deepspeed=={VERSION})"


class Offload(Enum):
    """Where the optimizer's state (fp32 weights and moments) is between steps."""

    none = "none"
    cpu = "cpu"
    """In the host's memory; the update is computed there, by PyTorch's fused AdamW, which is as fast as DeepSpeed's
    CPUAdam and has not to be compiled.
    """
    nvme = "nvme"
    """In files below `nvme`, read and written in pieces while the host updates them (`parallel.deepspeed.offload`)."""


class ParameterOffload(Enum):
    """Where stage 3 keeps this rank's pieces of the parameters that the model computes with."""

    none = "none"
    cpu = "cpu"
    """In the host's memory, to be copied to the device whenever they are gathered."""


@dataclass(frozen=True)
class ZeroConfig:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). `stage` 1 spreads the optimizer's state over the data-parallel
    ranks, 2 the gradients as well, for a reduction with every micro-batch instead of one a step, 3 parameters too,
    which are then gathered with every micro-batch, twice; models without routed experts only.
    """

    stage: int = 1
    bucket_size: int = 1 << 24
    """Elements whose gradients are reduced together, in a buffer of fp32."""
    offload: Offload = Offload.none
    nvme: str | None = None
    """A directory on a local disk, for offload=nvme."""
    offload_parameters: ParameterOffload = ParameterOffload.none
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the section `zero_optimization` of a DeepSpeed configuration. Stage 3 keeps up to 1e9 elements
    whole between passes unless `stage3_max_live_parameters` or `stage3_max_reuse_distance` say less.
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
            reason = "goes with zero.offload=nvme" if self.nvme else "name a directory on a local disk"
            raise ConfigError("nvme", self.nvme, reason)
