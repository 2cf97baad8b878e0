"""Rotary position embedding: rotate pair j of a head by position * theta^(-2j/K).

Shapes: B batch, T sequence, H heads, K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import RopePairing, RopeScaling, YarnScaling
from precision.gemm import at_least_float32, widened


def frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | YarnScaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the angle per position of each pair in radians, float64 [K/2] (Su et al. 2021, section 3.2.2). They are
    computed on the device, since a copy from the host would make the step wait.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    plain = theta ** (-pairs / head_dim)
    match scaling:
        case None:
            return plain
        case RopeScaling():
            return _scaled(plain, scaling)
        case YarnScaling():
            return _yarn(plain, theta, scaling)


def _scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Apply Llama 3.1's scaling: stretch wavelengths above original/low by `factor`, keep those below original/high."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_seq_len
    wavelength = 2 * math.pi / plain
    stretched = plain / scaling.factor
    short, long = original / high, original / low
    result = torch.where(wavelength > long, stretched, plain)
    if high > low:  # with equal bounds, no wavelength is between them, and the blend would divide by zero
        blend = (original / wavelength - low) / (high - low)
        between = (wavelength <= long) & (wavelength >= short)
        result = torch.where(between, (1 - blend) * stretched + blend * plain, result)
    return result


def _yarn(plain: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Stretch slow pairs by `factor`, keep fast ones, and blend linearly in the index of the pair in between."""
    pairs = len(plain)

    def pair(turns: float) -> float:
        """Return the (fractional) pair that turns this often in the original sequence."""
        return pairs * math.log(scaling.original_seq_len / (2 * math.pi * turns)) / math.log(theta)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    indices = torch.arange(pairs, dtype=plain.dtype, device=plain.device)
    stretched = ((indices - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def rotation(positions_BT: Tensor, frequencies_K2: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cosine and sine of the angle of each pair at each position, [B, T, 1, K/2, 2]. Angles are float64."""
    angles = positions_BT.to(torch.float64)[:, :, None, None] * frequencies_K2
    return cos_and_sin(angles, dtype)


def cos_and_sin(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cosine and sine of each angle in at least float32, in a last dimension of 2."""
    return torch.stack([angles.cos(), angles.sin()], -1).to(at_least_float32(dtype))


def rotate(x_BTHK: Tensor, rotation_BT1K22: Tensor, pairing: RopePairing = RopePairing.adjacent) -> Tensor:
    """Rotate each pair of `x` in at least float32. The result has the dtype of `x`. The rotation may be complex instead
    of cosine and sine.
    """
    wide = widened(x_BTHK)
    if rotation_BT1K22.is_complex():
        rotation_BT1K22 = torch.view_as_real(rotation_BT1K22)
    halves = pairing is RopePairing.halves
    if torch.compiler.is_compiling():  # Inductor cannot generate code for complex numbers
        first, second = wide.chunk(2, dim=-1) if halves else wide.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation_BT1K22.unbind(-1)
        turned = [first * cos - second * sin, first * sin + second * cos]
        both = torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
        return both.to(x_BTHK.dtype)
    turns = torch.view_as_complex(rotation_BT1K22)
    if halves:
        turned_BTHK2 = torch.complex(*wide.chunk(2, dim=-1)) * turns
        return torch.cat([turned_BTHK2.real, turned_BTHK2.imag], dim=-1).to(x_BTHK.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x_BTHK.dtype)
