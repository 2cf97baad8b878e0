"""Initial weights depend on seed, name and logical index only."""

from __future__ import annotations

import pytest
import torch

from model.config import InitConfig, ModelConfig
from model.init import initial_slice
from model.roles import ParameterInfo, Role, registry
from tests.support.models import build, small

CPU = torch.device("cpu")
MODEL = small()
INFO = ParameterInfo("layers.0.ffn.experts.down.weight", Role.expert_down, torch.Size([4, 6, 8]))


def whole(seed: int = 0, info: ParameterInfo = INFO) -> torch.Tensor:
    return initial_slice(info, MODEL, seed, [0] * len(info.shape), info.shape, CPU)


@pytest.mark.parametrize("offset, shape", [([0, 0, 0], [2, 6, 8]), ([3, 1, 2], [1, 4, 5]), ([1, 0, 7], [2, 6, 1])])
def test_a_slice_is_the_slice_of_the_whole(offset, shape):
    region = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    assert torch.equal(initial_slice(INFO, MODEL, 0, offset, shape, CPU), whole()[region])


def test_seed_and_name_matter():
    other = ParameterInfo("layers.1.ffn.experts.down.weight", Role.expert_down, INFO.shape)
    assert not torch.equal(whole(0), whole(1))
    assert not torch.equal(whole(), whole(info=other))


def test_values_are_normal_with_the_configured_std():
    info = ParameterInfo("head.weight", Role.head, torch.Size([512, 512]))
    values = whole(info=info) / MODEL.init.std
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    within = (values.abs() < 1).double().mean()
    assert abs(within - 0.6827) < 0.005, "68.27% of a normal distribution lie within one standard deviation"
    neighbours = torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_fan_in_and_depth():
    model = ModelConfig(hidden_size=64, num_layers=8, init=InitConfig(std=1.0, fan_in=True, depth_scaled=True))
    down = ParameterInfo("x", Role.dense_down, torch.Size([256, 256]))
    up = ParameterInfo("x", Role.dense_up, torch.Size([256, 256]))
    made = [initial_slice(info, model, 0, [0, 0], info.shape, CPU).std() for info in (up, down)]
    assert made[0] == pytest.approx(1 / 16, rel=0.02)
    assert made[1] == pytest.approx(1 / 64, rel=0.02)


def test_a_parameter_without_a_role_is_an_error():
    model = build(MODEL)
    model.layers["0"].attention.extra = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"layers\.0\.attention\.extra\.weight has no role"):
        registry(model)
