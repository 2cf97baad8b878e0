"""Fold the constant factors of a model's forward pass into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.errors import ConfigError
from model.config import ModelConfig, MultipliersConfig, QKNorm
from model.roles import ParameterInfo, Role
from model.tensor_source import TensorSource, parameter_infos, selection_biases


def fold_multipliers(source: TensorSource) -> TensorSource:
    """Return `source` with its factors folded into the weights. Raises `ConfigError` if a factor cannot be."""
    return source if source.config.multipliers == MultipliersConfig() else FoldedMultipliers(source)


class FoldedMultipliers:
    """The tensors of `source`, multiplied by the factors.

    Matrices that write to the residual stream absorb `residual`, and those of routed experts also `gates`. The gain of
    the final norm absorbs `logits`, so that a tied embedding stays unchanged. Query norms absorb `attention`, or query
    matrices if there are no norms.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source, model = source, source.config
        self.factors = {name: _factor(info, model) for name, info in parameter_infos(model).items()}
        self.config = replace(model, multipliers=MultipliersConfig())
        self.shapes, self.dtypes = source.shapes, source.dtypes

    def selection_biases(self) -> dict[str, Tensor]:
        return selection_biases(self.source)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        block, factor = self.source.read(name, offset, shape), self.factors[name]
        if factor == 1:
            return block
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        return (wide * factor).to(block.dtype)


def _factor(info: ParameterInfo, model: ModelConfig) -> float:
    factors = model.multipliers
    if info.role.writes_residual:
        return factors.residual * (factors.gates if info.role is Role.expert_down else 1.0)
    if info.role is Role.final_norm:
        return factors.logits
    if factors.attention == 1:
        return 1.0
    parts = info.name.split(".")
    norm = model.blocks[int(parts[1])].qk_norm if parts[0] == "layers" else None
    if info.role is Role.query_up:
        return factors.attention
    if info.role is Role.query and norm is QKNorm.weightless:
        reason = "cannot be folded: queries are normalised without a gain (qk_norm: weightless)"
        raise ConfigError("model.multipliers.attention", factors.attention, reason, [1.0])
    if info.role is Role.qk_norm and ".query_norm." in info.name:
        return factors.attention
    return factors.attention if info.role is Role.query and norm is QKNorm.none else 1.0
