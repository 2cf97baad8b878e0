"""Checkpoints of DeepSeek-V3's family: FP8 with scales of blocks, selection biases, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, ConfigError
from model.config import LatentConfig, ModelConfig, QKNorm, RouterConfig, YarnScaling
from model.huggingface import HuggingFaceCheckpoint, export, read_config
from model.huggingface.files import SINGLE
from model.tensor_source import whole
from tests.support import hf_models

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WIDE = {"hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return hf_models.save(hf_models.make("deepseek_v3", **WIDE), tmp_path_factory.mktemp("deepseek") / "plain")


@pytest.fixture(scope="module")
def quantised(saved, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save every projection in FP8 with random scales. Return the directory and the values, computed element by element
    in float32 and rounded to bfloat16.
    """
    root = tmp_path_factory.mktemp("quantised")
    generator, content, values = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in load_file(saved / SINGLE).items():
        content[name] = tensor
        if name.endswith("_proj.weight"):
            small = tensor.to(torch.float8_e4m3fn)
            scales = 2 * torch.rand([-(-size // 128) for size in tensor.shape], generator=generator)
            content |= {name: small, f"{name}_scale_inv": scales}
            rows, columns = (torch.arange(size) // 128 for size in tensor.shape)
            values[name] = (small.float() * scales[rows][:, columns]).bfloat16()
    save_file(content, root / SINGLE, {"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    return root, values


def test_matrices_in_fp8_are_read_as_their_products_with_scales(quantised):
    directory, values = quantised
    checkpoint = HuggingFaceCheckpoint(directory)
    compared = 0
    for name, shape in checkpoint.shapes.items():
        place = checkpoint.locations[name]
        if len(shape) == 2 and place.name in values:
            expected, compared = values[place.name], compared + 1
            assert torch.equal(whole(checkpoint, name), expected), name
            part = checkpoint.read(name, (100, 7), (shape[0] - 100, 5)) if shape[0] > 128 else None
            assert part is None or torch.equal(part, expected[100:, 7:12])
    assert compared > 8 and checkpoint.dtypes["layers.0.ffn.up.weight"] is torch.bfloat16
    gate = values["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert torch.equal(whole(checkpoint, "layers.1.ffn.experts.gate_up.weight")[3, 0], gate)


@pytest.mark.parametrize("damage", ["missing", "shape", "format"])
def test_fp8_without_its_scales_is_rejected(quantised, tmp_path, damage):
    content = load_file(quantised[0] / SINGLE)
    config = json.loads((quantised[0] / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    if damage == "missing":
        del content[name]
    elif damage == "shape":
        content[name] = torch.ones(1, 2)
    else:
        config["quantization_config"] = {**FP8, "weight_block_size": [64, 64]}
    save_file(content, tmp_path / SINGLE, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    reason = {
        "missing": rf"lacks {name}, the float32 scales \[2, 2\]",
        "shape": rf"lacks {name}, the float32 scales \[2, 2\]",
        "format": r"quantization_config.weight_block_size=\[64, 64\]: is not supported",
    }
    with pytest.raises((CheckpointError, ConfigError), match=reason[damage]):
        HuggingFaceCheckpoint(tmp_path)


def test_selection_biases_go_out_and_in_again(saved, tmp_path):
    first = HuggingFaceCheckpoint(saved)
    export(first, tmp_path / "out", dtype=torch.bfloat16)
    written, before = load_file(tmp_path / "out" / SINGLE), load_file(saved / SINGLE)
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(names) == 1 and all(torch.equal(written[name], before[name]) for name in names)
    assert before[names[0]].abs().max() > 0.01, "the control: the biases are not zero"
    again = HuggingFaceCheckpoint(tmp_path / "out").selection_biases()
    assert again.keys() == first.selection_biases().keys() == {"layers.1.ffn.router.balance.bias_E"}
    del written[names[0]]
    save_file(written, tmp_path / "out" / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {names[0]} of 16 elements"):
        HuggingFaceCheckpoint(tmp_path / "out")


REFUSED = {
    "num_nextn_predict_layers": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "attention_bias": True,
    "qk_rope_head_dim": 7,
    "v_head_dim": 25,
    "num_key_value_heads": 2,
    "n_group": 5,
    "topk_group": 5,
    "n_shared_experts": -1,
    "kv_lora_rank": 0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_no_model_can_have_are_rejected(saved, key):
    config = json.loads((saved / "config.json").read_text())
    assert read_config(config)[1].latent == LatentConfig(24, 40, 8, 12)
    with pytest.raises(ConfigError):
        read_config({**config, key: REFUSED[key]})


LATENT = {
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 24,
    "qk_norm": QKNorm.none,
    "latent": LatentConfig(24, 40, 8, 12),
}
WRONG = {
    "value_dim=32": ({**LATENT, "latent": LatentConfig(24, 40, 8, 32)}, "must be less than model.head_dim=24"),
    "rope_dim=24": ({**LATENT, "latent": LatentConfig(24, 40, 24, 12)}, "must be less than model.head_dim=24"),
    "num_kv_heads=2": ({**LATENT, "num_kv_heads": 2}, "one key head"),
    "qk_norm": ({**LATENT, "qk_norm": QKNorm.full}, "norms of its own"),
    "router.groups=3": ({"router": RouterConfig(groups=3)}, "must divide the 16 experts"),
    "router.top_groups=1": ({"router": RouterConfig(top_k=5, groups=4)}, "cannot hold a token's 5"),
    "router.top_groups=2": ({"router": RouterConfig(top_k=2, groups=16, top_groups=2)}, "each needs two or more"),
}


@pytest.mark.parametrize("key", WRONG)
def test_models_that_cannot_be_are_rejected(key):
    changes, reason = WRONG[key]
    with pytest.raises(ConfigError, match=reason) as caught:
        ModelConfig(**changes)
    assert key in str(caught.value)


def test_yarn_factors_are_those_of_the_paper():
    plain, deepseek = YarnScaling(factor=40.0), YarnScaling(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    assert plain.rotation_factor == pytest.approx(1.3688879454) and plain.logit_factor == 1
    assert deepseek.rotation_factor == 1 and deepseek.logit_factor == pytest.approx(1.3688879454**2)
    with pytest.raises(ConfigError, match="with beta_slow <= beta_fast"):
        YarnScaling(beta_fast=1.0, beta_slow=2.0)
