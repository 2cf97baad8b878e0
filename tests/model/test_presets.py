"""Published models: compare settings, and parameter counts (closed form, our network, transformers' network)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load
from model.config import LatentConfig, ModelConfig, RopeScaling, YarnScaling
from model.flops import count_parameters
from model.huggingface import model_differences, read_config, write_config
from model.tensor_source import parameter_shapes
from model.vision.config import VisionConfig
from train.config import TrainConfig

ENCODER = 871_932_416
COUNTS = {
    # Llama 4: from its published configuration; the others: the totals stated in their checkpoints
    "llama4_scout": (107_769_861_120 + ENCODER, 17_172_894_720 + ENCODER),
    "llama4_maverick": (400_711_848_960 + ENCODER, 17_184_691_200 + ENCODER),
    "behemoth": (1_986_331_791_360, 287_638_671_360),
    "mixtral_8x7b": (46_702_792_704, None),
    "qwen3_30b_a3b": (30_532_122_624, None),
    "olmoe_1b_7b": (6_919_161_856, None),
    "deepseek_v3": (671_026_404_352, 37_552_282_624),
    "kimi_k2": (1_026_408_209_408, 32_861_477_888),
}


@cache
def preset(name: str) -> ModelConfig:
    return load("train", TrainConfig, [f"model={name}"]).model


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_to_the_digit(name):
    """Let transformers build its model from the configuration that an export writes."""
    import transformers

    total, active = COUNTS[name]
    counted = count_parameters(preset(name))
    assert counted.total == total and active in (None, counted.active)
    assert sum(math.prod(shape) for shape in parameter_shapes(preset(name)).values()) == total
    _, config = write_config(preset(name))
    text = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        vision = preset(name).vision is not None
        cls = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
        theirs = cls.from_config(text)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == total
    assert model_differences(read_config(text.to_dict())[1], preset(name)) == {}


@pytest.mark.parametrize("name", ["llama4_scout", "llama4_maverick"])
def test_text_presets_are_the_models_without_an_encoder(name):
    assert preset(f"{name}_text") == replace(preset(name), vision=None)
    assert preset(name).vision == VisionConfig()


def published(name: str) -> dict[str, Any]:
    """Return a copy of the release's `config.json`. Llama 4's are gated and were assembled from printed copies: Scout's
    with the later correction of its RoPE, Maverick's as first released, which lists many defaults. DeepSeek-V3's and
    Kimi-K2's were assembled from printed copies too; multi-token prediction, which is not supported, is omitted.
    """
    found = json.loads((Path(__file__).with_name("published") / f"{name}.json").read_text())
    return {**found, "num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in found else found


CHANGED = {
    "llama4_scout": {"rope_scaling": RopeScaling(factor=8.0, high_freq_factor=4.0)},  # as first published
    "llama4_maverick": {"vision": VisionConfig(num_layers=33)},
    "mixtral_8x7b": {"rope_theta": 10000.0},
    "qwen3_30b_a3b": {"norm_eps": 1e-5},
    "olmoe_1b_7b": {"expert_hidden_size": 2048},
    "deepseek_v3": {"latent": LatentConfig(query_rank=None)},
    "kimi_k2": {"rope_yarn": YarnScaling(factor=64.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)},
}


@pytest.mark.parametrize("name", CHANGED)
def test_presets_equal_the_published_configuration(name):
    released = read_config(published(name))[1]
    assert model_differences(released, preset(name)) == {}
    different = model_differences(released, replace(preset(name), **CHANGED[name]))
    assert different and all(key.split(".")[0] in (*CHANGED[name], "layer_list") for key in different)
