"""Sparse upcycling: read a dense checkpoint as a mixture-of-experts model. See `UpcycleMethod`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.errors import ConfigError
from model.config import InitConfig, ModelConfig, UpcycleConfig, UpcycleMethod, WeightsOn
from model.init import initial_slice
from model.roles import ParameterInfo, Role
from model.tensor_source import TensorSource, parameter_shapes


class Upcycled:
    """The tensors of `dense` under the names and shapes of `config`, a mixture-of-experts model.

    Routers are initialised as in a new model. Under `split`, experts that together are one copy of the dense layer have
    equal router rows. Raises `ConfigError` if the sizes do not fit the method.
    """

    def __init__(self, dense: TensorSource, config: ModelConfig, seed: int) -> None:
        assert config.upcycle is not None
        self.dense, self.config, self.seed = dense, config, seed
        self.how: UpcycleConfig = config.upcycle
        _check(dense.config, config, self.how.method)
        self.shapes = parameter_shapes(config)
        for name in self.shapes.keys() & dense.shapes.keys():
            have, need = list(dense.shapes[name]), list(self.shapes[name])
            if have != need:
                reason = f"has {name} of shape {have}, but the model needs {need}"
                raise ConfigError("init_from", config.init_from, reason)
        self.dtypes = dict.fromkeys(self.shapes, dense.dtypes["embedding.weight"])
        self.slices = dense.config.dense_hidden_size // config.expert_hidden_size

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        if name in self.dense.shapes:
            return self.dense.read(name, offset, shape)
        layer, _, part = name.partition(".ffn.")
        owner, _, which = part.partition(".")  # router.weight, shared.gate.weight, experts.gate_up.weight
        if owner == "router":
            return self._router(name, offset, shape)
        if owner == "shared":
            return self.dense.read(f"{layer}.ffn.{which}", offset, shape)
        if which == "down.weight":
            experts = [self._down(name, f"{layer}.ffn.{which}", offset[0] + e, offset, shape) for e in range(shape[0])]
            return torch.stack(experts)
        result = torch.empty(tuple(shape), dtype=self.dtypes[name])
        for e in range(shape[0]):
            for h in range(shape[1]):
                half = f"{layer}.ffn.{('gate', 'up')[offset[1] + h]}.weight"
                result[e, h] = self._gate_up(name, half, (offset[0] + e, offset[1] + h, *offset[2:]), shape[2:])
        return result

    def _gate_up(self, name: str, dense: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of one expert's gate or up matrix."""
        expert, _, row, column = offset
        if self.config.shared_hidden_size and self.config.expert_hidden_size != self.dense.config.dense_hidden_size:
            return self._random(name, Role.expert_gate_up, offset, (1, 1, *shape), self.config)[0, 0]
        if self.how.method is UpcycleMethod.split:
            row += (expert % self.slices) * self.config.expert_hidden_size
        matrix = self.dense.read(dense, (row, column), shape)
        return self._noisy(name, matrix, offset, (1, 1, *shape))

    def _down(self, name: str, dense: str, expert: int, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of one expert's down matrix."""
        _, row, column = offset
        if self.config.shared_hidden_size:
            return torch.zeros(tuple(shape[1:]), dtype=self.dtypes[name])
        if self.how.method is UpcycleMethod.split:
            column += (expert % self.slices) * self.config.expert_hidden_size
            return self.dense.read(dense, (row, column), shape[1:]) * (self.slices / self.config.router.scale)
        matrix = self.dense.read(dense, (row, column), shape[1:])
        return self._noisy(name, matrix, (expert, *offset[1:]), (1, *shape[1:]))

    def _noisy(self, name: str, matrix: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return `matrix`, a block of `name`, with noise added under the method `noise`."""
        if self.how.method is not UpcycleMethod.noise:
            return matrix
        noisy = replace(self.config, init=InitConfig(std=self.how.noise_std))
        noise = self._random(name, Role.expert_gate_up, offset, shape, noisy, "noise of ")
        return (matrix + noise.view_as(matrix)).to(matrix.dtype)

    def _router(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block with one row per expert. The slices of one dense layer have equal rows, so that they tie."""
        if self.how.method is not UpcycleMethod.split or self.config.shared_hidden_size:
            return self._random(name, Role.router, offset, shape, self.config)
        rows = [(offset[0] + row) // self.slices for row in range(shape[0])]
        sets = self._random(name, Role.router, [rows[0], offset[1]], [rows[-1] - rows[0] + 1, shape[1]], self.config)
        return sets[[row - rows[0] for row in rows]]

    def _random(
        self, name: str, role: Role, offset: Sequence[int], shape: Sequence[int], config: ModelConfig, key: str = ""
    ) -> Tensor:
        """Return a block of random values, as in a new model."""
        info = ParameterInfo(key + name, role, torch.Size(self.shapes[name]))
        return initial_slice(info, config, self.seed, offset, shape, torch.device("cpu")).to(self.dtypes[name])


def keeps_the_function(config: ModelConfig) -> bool:
    """Return whether the upcycled model computes the same function as the dense one, up to rounding.

    With a shared expert, the routed experts add nothing at first. Without one, the routing weights of a token must sum
    to one and scale the outputs of experts.
    """
    assert config.upcycle is not None
    if config.shared_hidden_size:
        return True
    router = config.router
    summing = router.norm_topk_prob and router.weights_on is WeightsOn.output
    if config.upcycle.method is UpcycleMethod.split:
        return summing
    return summing and router.scale == 1 and config.upcycle.method is UpcycleMethod.copy


def _check(dense: ModelConfig, config: ModelConfig, method: UpcycleMethod) -> None:
    experts, width = config.expert_hidden_size, dense.dense_hidden_size
    if config.shared_hidden_size:
        if config.shared_hidden_size != width:
            reason = f"must be the dense hidden size, {width}: the shared expert is the dense layer"
            raise ConfigError("shared_expert_hidden_size", config.shared_hidden_size, reason, [width])
        if method is UpcycleMethod.split:
            reason = "does not allow a shared expert; set shared_expert_hidden_size=0"
            raise ConfigError("upcycle.method", method, reason, ["copy"])
    elif method is UpcycleMethod.split:
        slices = width // experts
        if width % experts or slices < 2:
            reason = f"must divide the dense hidden size {width} into 2 slices or more"
            raise ConfigError("expert_hidden_size", experts, reason)
        for key, count in (("num_experts", config.num_experts), ("router.top_k", config.router.top_k)):
            if count % slices:
                raise ConfigError(key, count, f"must be a multiple of the {slices} slices", [slices])
    elif experts != width:
        raise ConfigError("expert_hidden_size", experts, f"must be the dense hidden size for {method.value}", [width])
