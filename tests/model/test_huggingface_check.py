"""Compare settings with transformers' reading of them: equal at published sizes, and each difference is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import CheckpointError
from model import huggingface
from model.config import LatentConfig, ModelConfig, QKNorm, RopeScaling, RouterConfig, YarnScaling
from model.vision.config import VisionConfig
from tests.model.test_presets import COUNTS, preset, published


def written(model: ModelConfig, directory: Path, **changes) -> Path:
    (directory / "config.json").write_text(json.dumps({**huggingface.write_config(model)[1], **changes}))
    return directory


@pytest.mark.parametrize("name", COUNTS)
def test_settings_of_published_sizes_are_equal(name, tmp_path):
    """Test both the `config.json` that we write and the published one: `compare_settings` raises for a difference."""
    huggingface.compare_settings(preset(name), written(preset(name), tmp_path))
    if name != "behemoth":
        config = published(name)
        config |= {"model_type": "deepseek_v3"} if name == "kimi_k2" else {}  # as transformers knows it
        (tmp_path / "config.json").write_text(json.dumps(config))
        huggingface.compare_settings(preset(name), tmp_path)


MISREAD = {
    "rope_theta": ("llama4_scout", {"rope_theta": 1e4}),
    "rope_scaling": ("llama4_scout", {"rope_scaling": RopeScaling(factor=8.0)}),
    "no_scaling": ("llama4_scout", {"rope_scaling": None}),
    "chunk": ("llama4_scout", {"attention_chunk_size": 4096}),
    "nope": ("llama4_scout", {"nope_every": 8}),
    "temperature": ("llama4_scout", {"temperature": False}),
    "temperature_floor": ("llama4_scout", {"temperature_floor": 4096.0}),
    "temperature_scale": ("llama4_scout", {"temperature_scale": 0.2}),
    "qk_norm": ("llama4_scout", {"qk_norm": QKNorm.none}),
    "encoder": ("llama4_scout", {"vision": VisionConfig(patch_size=12)}),
    "num_kv_heads": ("llama4_scout", {"num_kv_heads": 4}),
    "top_k": ("llama4_scout", {"router": RouterConfig(top_k=2)}),
    "moe_every": ("llama4_maverick", {"moe_every": 1}),
    "dense_hidden_size": ("llama4_maverick", {"dense_hidden_size": 8192}),
    "head_dim": ("qwen3_30b_a3b", {"head_dim": 64}),
    "experts": ("qwen3_30b_a3b", {"num_experts": 64}),
    "expert_hidden_size": ("qwen3_30b_a3b", {"expert_hidden_size": 6144}),
    "norm_eps": ("qwen3_30b_a3b", {"norm_eps": 1e-5}),
    "per_head_norm": ("qwen3_30b_a3b", {"qk_norm": QKNorm.full}),
    "full_norm": ("olmoe_1b_7b", {"qk_norm": QKNorm.none}),
    "latent": ("deepseek_v3", {"latent": LatentConfig(kv_rank=256)}),
    "rope_yarn": ("deepseek_v3", {"rope_yarn": YarnScaling(mscale=1.0, mscale_all_dim=1.0, truncate=False)}),
    "first_dense": ("kimi_k2", {"first_dense": 2}),
    "router": ("kimi_k2", {"router": RouterConfig(top_k=8, groups=8, top_groups=4)}),
    "norm_topk_prob": ("mixtral_8x7b", {"router": RouterConfig(top_k=2)}),
}


@pytest.mark.parametrize("name, change", MISREAD.values(), ids=MISREAD.keys())
def test_each_setting_read_otherwise_is_noticed(name, change, tmp_path):
    written(preset(name), tmp_path)
    key = f"({next(iter(change))}|layer_list)"  # a setting per layer shows up in the list of layers
    with pytest.raises(CheckpointError, match=rf"transformers reads its config.json as model\.{key}"):
        huggingface.compare_settings(replace(preset(name), **change), tmp_path)


def test_what_transformers_does_not_accept_is_an_obstacle(tmp_path):
    scout = preset("llama4_scout_text")
    assert huggingface.obstacle(written(scout, tmp_path)) is None
    why = huggingface.obstacle(written(scout, tmp_path, attn_temperature_tuning=4))  # an int, as first published
    assert why is not None and "expected bool, got int" in why
