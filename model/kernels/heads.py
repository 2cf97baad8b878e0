"""What is done to the heads of queries and keys between their projections and attention, and its PyTorch twin.

Shapes: B batch, T sequence, H query heads, G key/value heads, N = H + 2 G heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.rope import rotate
from model.config import RopePairing
from precision.gemm import widened


@dataclass(frozen=True)
class HeadStep:
    """Rotate queries and keys, normalise them without a gain, and scale queries.

    `norm_eps`: epsilon of the RMS norm of each head; None: no norm. `query_scale`: a constant factor of queries.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    pairing: RopePairing = RopePairing.adjacent
    norm_eps: float | None = None
    query_scale: float = 1.0

    @property
    def heads(self) -> list[int]:
        """The number of heads of queries, keys and values."""
        return [self.num_heads, self.num_kv_heads, self.num_kv_heads]


def turn(x_BTHK: Tensor, step: HeadStep, rotation_BT1K22: Tensor | None) -> Tensor:
    """Rotate and normalise heads of queries or keys; each result is rounded to the dtype of `x`."""
    if rotation_BT1K22 is not None:
        x_BTHK = rotate(x_BTHK, rotation_BT1K22, step.pairing)
    return x_BTHK if step.norm_eps is None else rms_normalise(x_BTHK, step.norm_eps)


def scale_queries(q_BTHK: Tensor, step: HeadStep, temperature_BT11: Tensor | None) -> Tensor:
    """Multiply queries by their constant factor and by the temperature of their position."""
    if step.query_scale != 1:
        q_BTHK = q_BTHK * step.query_scale
    return q_BTHK if temperature_BT11 is None else (q_BTHK * temperature_BT11).to(q_BTHK.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Apply an RMS norm without a gain over the last dimension in at least float32. The result has the dtype of `x`."""
    y = torch.rms_norm(widened(x), x.shape[-1:], None, eps)
    return y if y.dtype is x.dtype else y.to(x.dtype)
