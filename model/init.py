"""Initial weights as a pure function of (seed, parameter name, index in the global tensor).

Each value is a hash of its position in the global tensor, so any rank computes exactly its own slice and every layout
starts from the same model. Box-Muller turns two hashes into a normal value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import InitConfig, ModelConfig
from model.load_balance import RouterBalance
from model.roles import ParameterInfo, Role, registry

_BLOCK = 1 << 22
"""Elements computed at a time, which limits the scratch memory of a large slice to a few hundred megabytes."""


def role_std(role: Role, fan_in: int, layers: int, config: InitConfig) -> float:
    """Return the standard deviation of a role under `config`, ignoring `config.roles`."""
    own = {Role.embedding: config.embedding_std, Role.head: config.head_std, Role.router: config.router_std}.get(role)
    if own is not None:
        return own
    if role is Role.vision_position:
        return fan_in**-0.5  # as in Llama 4, whatever `config.std`
    std = config.std / math.sqrt(fan_in) if config.fan_in else config.std
    return std / math.sqrt(2 * layers) if config.depth_scaled and role.writes_residual else std


@torch.no_grad()
def initialise(module: nn.Module, model: ModelConfig, seed: int) -> None:
    """Fill every parameter of an unwrapped model and reset its load-balancing state."""
    for name, info in registry(module).items():
        parameter = module.get_parameter(name)
        parameter.copy_(initial_slice(info, model, seed, [0] * parameter.dim(), parameter.shape, parameter.device))
    reset_buffers(module)


def reset_buffers(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, RouterBalance):
            part.reset()


def initial_slice(
    info: ParameterInfo,
    model: ModelConfig,
    seed: int,
    offset: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return the parameter's block at `offset` in float32, computed in float64 and rounded once."""
    if (constant := info.initial_constant) is not None:
        return torch.full(tuple(shape), constant, device=device)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{info.name}".encode()).digest()[:7], "little")
    index = _logical_index(info.shape, offset, shape, device).flatten()
    usual = role_std(info.role, info.fan_in, model.num_layers, model.init)
    std = model.init.roles.get(info.role.name, usual)
    values = torch.empty(index.shape, device=device)
    for start in range(0, len(index), _BLOCK):
        values[start : start + _BLOCK] = _normal(index[start : start + _BLOCK], key).mul_(std)
    return values.view(tuple(shape))


def _logical_index(sizes: Sequence[int], offset: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return the row-major index in the global tensor of each element of the block, int64."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, length in zip(sizes, offset, shape, strict=True):
        index = index[..., None] * size + torch.arange(start, start + length, device=device)
    return index


def _normal(index: Tensor, key: int) -> Tensor:
    """Return standard normal values, float64 (Box & Muller 1958)."""
    radius = torch.sqrt(-2 * torch.log(_uniform(2 * index, key)))
    return radius * torch.cos(2 * math.pi * _uniform(2 * index + 1, key))


def _uniform(counter: Tensor, key: int) -> Tensor:
    """Return uniform values in (0, 1): the top 53 bits of SplitMix64 (Steele et al. 2014) of key and counter."""
    z = (counter + key) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 11).double() + 0.5) * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` on int64 would fill with the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
