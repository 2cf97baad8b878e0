"""A dense checkpoint seen as a mixture of experts: the same network at first where `keeps_the_function` says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.errors import ConfigError
from model.config import FeedForward, InitConfig, ModelConfig, UpcycleConfig, UpcycleMethod, WeightsOn
from model.init import initial_slice
from model.roles import ParameterInfo, Role
from model.source import TensorSource, parameter_shapes


class Upcycled:
    """`dense`'s tensors under the names and shapes of `config`, a mixture of experts.

    New routers are drawn as in a fresh model. Raises `ConfigError` where the widths do not fit the method.
    """

    def __init__(self, dense: TensorSource, config: ModelConfig, seed: int) -> None:
        assert config.upcycle is not None
        self.dense, self.config, self.seed = dense, config, seed
        self.how: UpcycleConfig = config.upcycle
        _check(dense.config, config, self.how.method)
        self.shapes = parameter_shapes(config)
        kind = dense.dtypes["embedding.weight"]
        self.dtypes = dict.fromkeys(self.shapes, kind)
        self.slices = dense.config.dense_width // config.expert_width

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        if name in self.dense.shapes:
            return self.dense.read(name, offset, shape)
        layer, _, part = name.partition(".ffn.")
        owner, _, which = part.partition(".")  # router.weight, shared.gate.weight, experts.gate.weight
        if owner == "router":
            return self._router(name, offset, shape)
        dense_name = f"{layer}.ffn.{which}"
        if owner == "shared":
            return self.dense.read(dense_name, offset, shape)
        experts = [self._expert(name, dense_name, offset[0] + e, offset[1:], shape[1:]) for e in range(shape[0])]
        return torch.stack(experts)

    def _expert(self, name: str, dense: str, expert: int, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A block of one expert's matrix."""
        down = ".down." in name
        if self.config.shared_expert_width:
            if down:
                return torch.zeros(tuple(shape), dtype=self.dtypes[name])
            if self.config.expert_width != self.dense.config.dense_width:
                return self._drawn(name, Role.expert_gate, [expert, *offset], [1, *shape], self.config)[0]
        if self.how.method is UpcycleMethod.split:
            first = (expert % self.slices) * self.config.expert_width
            place = [offset[0], offset[1] + first] if down else [offset[0] + first, offset[1]]
            factor = self.slices / self.config.router.scale if down else 1.0
            return self.dense.read(dense, place, shape) * factor
        matrix = self.dense.read(dense, offset, shape)
        if self.how.method is UpcycleMethod.noise:
            spread = replace(self.config, init=InitConfig(std=self.how.noise_std))
            noise = self._drawn(f"{name} noise", Role.expert_gate, [expert, *offset], [1, *shape], spread, name)
            matrix = (matrix + noise[0]).to(matrix.dtype)
        return matrix

    def _router(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """One row per expert; where experts are slices, all slices of a set have the same row and tie."""
        if self.how.method is not UpcycleMethod.split or self.config.shared_expert_width:
            return self._drawn(name, Role.router, offset, shape, self.config)
        rows = [(offset[0] + row) // self.slices for row in range(shape[0])]
        sets = self._drawn(name, Role.router, [rows[0], offset[1]], [rows[-1] - rows[0] + 1, shape[1]], self.config)
        return sets[[row - rows[0] for row in rows]]

    def _drawn(
        self,
        key: str,
        role: Role,
        offset: Sequence[int],
        shape: Sequence[int],
        config: ModelConfig,
        name: str | None = None,
    ) -> Tensor:
        whole = torch.Size(self.shapes[name or key])
        values = initial_slice(ParameterInfo(key, role, whole), config, self.seed, offset, shape, torch.device("cpu"))
        return values.to(self.dtypes[name or key])


def keeps_the_function(config: ModelConfig) -> bool:
    """Whether the upcycled model computes exactly what the dense one does, up to rounding.

    With a shared expert the routed ones add nothing yet. Without one the weights of a token's experts must sum to one
    and scale outputs.
    """
    assert config.upcycle is not None
    if config.shared_expert_width:
        return True
    router = config.router
    summing = router.renormalise and router.weights_on is WeightsOn.output
    if config.upcycle.method is UpcycleMethod.split:
        return summing
    return summing and router.scale == 1 and config.upcycle.method is UpcycleMethod.copy


def _check(dense: ModelConfig, config: ModelConfig, method: UpcycleMethod) -> None:
    if any(layer.feed_forward is FeedForward.moe for layer in dense.blocks):
        raise ConfigError("upcycle", None, "init_from is a mixture of experts already; remove upcycle")
    experts, width = config.expert_width, dense.dense_width
    if config.shared_expert_width:
        if config.shared_expert_width != width:
            reason = f"the shared expert takes the dense layer over, whose width is {width}"
            raise ConfigError("shared_width", config.shared_expert_width, reason, [width])
        if method is UpcycleMethod.split:
            raise ConfigError("upcycle.method", method, "has no shared expert; set shared_width=0", ["copy"])
    elif method is UpcycleMethod.split:
        slices = width // experts
        if width % experts or slices < 2:
            raise ConfigError("expert_width", experts, f"must divide the dense width {width} into 2 slices or more")
        for key, count in (("experts", config.experts), ("router.top_k", config.router.top_k)):
            if count % slices:
                raise ConfigError(key, count, f"must be a multiple of the {slices} slices", [slices])
    elif experts != width:
        raise ConfigError("expert_width", experts, f"must be the dense width for {method.value}", [width])
