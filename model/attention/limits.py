"""The heads that the kernels for GPUs can take. Checked before a model is built."""

from __future__ import annotations

import torch

from core.errors import ConfigError
from model.config import ModelConfig
from precision.config import AttentionKind, KernelKind, PrecisionConfig
from precision.resolve import Precision, wants_varlen

FLASH_MULTIPLE, FLASH_LARGEST = 8, 256
"""Flash attention takes heads whose width is a multiple of 8 and at most 256 (torch 2.12 and 2.13, flash_api.cpp)."""


def check_heads(model: ModelConfig, precision: PrecisionConfig, device: torch.device) -> None:
    """Reject heads of a width that flash attention of varying lengths, where it is asked for, cannot take."""
    width = model.head_dim
    if not wants_varlen(precision, device) or (width % FLASH_MULTIPLE == 0 and width <= FLASH_LARGEST):
        return
    limits = f"multiples of {FLASH_MULTIPLE} up to {FLASH_LARGEST}"
    reason = f"flash attention takes heads of {limits}, not model.head_dim={width}"
    raise ConfigError("precision.attention", precision.attention, reason, [AttentionKind.segments.value])


def slower_heads(model: ModelConfig, precision: Precision) -> str | None:
    """Return a line that says that heads are rotated and normalised without Triton, or None."""
    width = model.head_dim
    if precision.kernels is not KernelKind.triton or width & (width - 1) == 0:
        return None
    return f"model.head_dim={width} is no power of two: PyTorch's operations, not Triton's, rotate and normalise heads"
