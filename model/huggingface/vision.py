"""The vision encoder of Llama 4 in the Hugging Face format: its configuration, tensor names and processor files.

transformers 5.23 does not read `norm_eps` and `hidden_act` of `vision_config` (its layers have 1e-5 and exact GELU). We
write them nevertheless, and reject values that it would ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError
from model.huggingface.locations import Location
from model.huggingface.values import Json, layer_count, whole_number
from model.vision.config import CHANNELS, SHUFFLE, VisionConfig

TENSORS = ("vision_model.", "multi_modal_projector.")
"""Prefixes of the encoder's tensors."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FIXED: dict[str, Any] = {
    "num_channels": CHANNELS,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 1 / SHUFFLE,
    "multi_modal_projector_bias": False,
    "projector_dropout": 0.0,
    "attention_dropout": 0.0,
    "vision_feature_select_strategy": "default",
}
"""Settings of which transformers supports, or Llama 4 has, only one value."""


def read_vision(config: Json) -> VisionConfig:
    """Read the encoder from the `config.json` of a Llama 4 model. Raises `ConfigError` for what it cannot express."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError("config.json", None, "has no vision_config; text_only=true reads the text model alone")
    for key, value in _FIXED.items():
        if vision.get(key, value) != value:
            raise ConfigError(f"config.json vision_config.{key}", vision[key], "is not supported", [value])
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        key = "config.json vision_config.rope_parameters.rope_type"
        raise ConfigError(key, rope["rope_type"], "is not supported", ["default"])
    width = whole_number(vision, "hidden_size", 768)
    adapter = whole_number(vision, "projector_output_dim", 4096)
    needed = {
        "intermediate_size": (5632, width * SHUFFLE**2),
        "projector_input_dim": (4096, adapter),
        "vision_output_dim": (7680, adapter),
    }
    for key, (default, value) in needed.items():
        if whole_number(vision, key, default) != value:
            raise ConfigError(f"config.json vision_config.{key}", vision.get(key), "is not supported", [value])
    return VisionConfig(
        hidden_size=width,
        num_layers=layer_count(vision, 34),
        num_heads=whole_number(vision, "num_attention_heads", 16),
        mlp_hidden_size=width * SHUFFLE**2,
        adapter_hidden_size=adapter,
        tile_size=whole_number(vision, "image_size", 448),
        patch_size=whole_number(vision, "patch_size", 14),
        rope_theta=float(rope.get("rope_theta") or vision.get("rope_theta") or 10000.0),
        image_token_id=whole_number(config, "image_token_index", 200092),
    )


def write_vision(vision: VisionConfig) -> dict[str, Any]:
    """Return the entries of `config.json` beside `text_config`."""
    adapter = vision.adapter_hidden_size
    return {
        "image_token_index": vision.image_token_id,
        "vision_config": {
            "model_type": "llama4_vision_model",
            **_FIXED,
            "norm_eps": vision.norm_eps,
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_hidden_size,
            "image_size": vision.tile_size,
            "patch_size": vision.patch_size,
            "projector_input_dim": adapter,
            "projector_output_dim": adapter,
            "vision_output_dim": adapter,
            "rope_theta": vision.rope_theta,  # transformers 4 reads this, transformers 5 rope_parameters
            "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        },
    }


def processor_files(
    vision: VisionConfig, max_tiles: int = 16, resize_to_max_canvas: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the files without which transformers builds no processor, by name (transformers#37375)."""
    side, half = vision.tile_size, [0.5] * CHANNELS
    image = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "size": {"height": side, "width": side},
        "max_patches": max_tiles,
        "resize_to_max_canvas": resize_to_max_canvas,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "image_mean": half,
        "image_std": half,
    }
    whole = {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": 1 / SHUFFLE,
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
    }
    return dict(zip(PROCESSOR_FILES, (image, whole), strict=True))


def vision_locations(vision: VisionConfig) -> dict[str, Location]:
    """Return the location of each parameter of the encoder."""
    theirs = "vision_model"
    found = {
        "vision.patch.weight": f"{theirs}.patch_embedding.linear.weight",
        "vision.class_token": f"{theirs}.class_embedding",
        "vision.positions": f"{theirs}.positional_embedding_vlm",
        "vision.adapter_in.weight": f"{theirs}.vision_adapter.mlp.fc1.weight",
        "vision.adapter_out.weight": f"{theirs}.vision_adapter.mlp.fc2.weight",
        "vision.projector.weight": "multi_modal_projector.linear_1.weight",
    }
    parts = {"first_norm": "layernorm_pre", "last_norm": "layernorm_post"}
    for index in range(vision.num_layers):
        ours, layer = f"layers.{index}", f"model.layers.{index}"
        parts |= {
            f"{ours}.attention_norm": f"{layer}.input_layernorm",
            f"{ours}.mlp_norm": f"{layer}.post_attention_layernorm",
            f"{ours}.mlp.up": f"{layer}.mlp.fc1",
            f"{ours}.mlp.down": f"{layer}.mlp.fc2",
        }
        for part in ("query", "key", "value", "output"):
            parts[f"{ours}.attention.{part}"] = f"{layer}.self_attn.{part[0]}_proj"
    for part, name in parts.items():
        found |= {f"vision.{part}.{kind}": f"{theirs}.{name}.{kind}" for kind in ("weight", "bias")}
    return {name: Location(stored) for name, stored in found.items()}
