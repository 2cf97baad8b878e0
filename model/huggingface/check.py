"""Check a conversion against transformers, which must read the same settings and compute the same logits.

Logits are compared only if both models fit into memory, and only on a few tokens: too few for the attention chunks and
query temperature of published models (8,192 positions) to matter. Settings are compared for models of any size, in the
form in which transformers reads them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.memory import available_memory
from model.config import (
    FeedForward,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    QKNorm,
    RopePairing,
    RopeScaling,
    RouterConfig,
    Score,
    WeightsOn,
    YarnScaling,
)
from model.huggingface.families import model_differences
from model.tensor_source import TensorSource, materialise
from model.vision.config import CHANNELS, VisionConfig

TOLERANCE = 5e-5
"""Largest allowed difference of a logit in float32, relative to the largest logit or to 1 if that is larger."""


def obstacle(directory: Path) -> str | None:
    """Return why this checkpoint cannot be compared with transformers, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        settings = _settings(directory)
    except Exception as error:  # transformers raises many types of errors
        return f"transformers refuses its config.json ({str(error).strip().splitlines()[-1].strip()})"
    if getattr(settings, "quantization_config", None):
        return "transformers multiplies in FP8 what is stored in FP8"
    return None


def shortage(source: TensorSource) -> str | None:
    """Return why logits cannot be compared on this machine, or None."""
    elements = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    need, have = 2 * 4 * elements, available_memory()
    if need > 0.8 * have:
        return f"both models need {need / 1e9:.0f} GB of memory and {have / 1e9:.0f} GB are free"
    return None


def compare_settings(model: ModelConfig, directory: Path) -> None:
    """Raise `CheckpointError` if transformers reads another network than `model` from `directory`."""
    different = model_differences(model, _as_transformers_reads(_settings(directory)))
    if different:
        key, (ours, theirs) = next(iter(different.items()))
        raise CheckpointError(f"{directory}: transformers reads its config.json as model.{key}={theirs}, not {ours}")


def _settings(directory: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _as_transformers_reads(config: Any) -> ModelConfig:
    """Return the model that transformers' configuration object describes, with transformers' defaults.

    This code is independent of `read_config`, which it checks.
    """
    theirs = config.get_text_config()
    kind, rope = theirs.model_type, theirs.rope_parameters
    scaling = yarn = None
    if rope["rope_type"] == "yarn":
        yarn = YarnScaling(
            factor=rope["factor"],
            original_seq_len=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            mscale=rope.get("mscale") or 0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0,
            truncate=rope.get("truncate", True),
        )
    elif rope["rope_type"] != "default":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(*(rope[name] for name in names))
    llama4, moe = kind == "llama4_text", {}
    if kind == "deepseek_v3":
        moe = _deepseek(theirs)
    elif kind not in ("llama", "qwen3"):
        wide = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
        norm_topk_prob = kind == "mixtral" or (not llama4 and theirs.norm_topk_prob)
        softmax = RouterConfig(theirs.num_experts_per_tok, Score.softmax, norm_topk_prob, weights_on=WeightsOn.output)
        moe = {
            "num_experts": theirs.num_local_experts if kind in ("llama4_text", "mixtral") else theirs.num_experts,
            "expert_hidden_size": getattr(theirs, wide),
            "shared_expert_hidden_size": None if llama4 else 0,
            "router": RouterConfig(theirs.num_experts_per_tok) if llama4 else softmax,
        }
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.qk_head_dim if kind == "deepseek_v3" else _head_dim(theirs),
        dense_hidden_size=theirs.intermediate_size_mlp if llama4 else theirs.intermediate_size,
        rope_theta=rope["rope_theta"],
        rope_pairing=RopePairing.adjacent if llama4 or getattr(theirs, "rope_interleave", 0) else RopePairing.halves,
        rope_scaling=scaling,
        rope_yarn=yarn,
        temperature_floor=theirs.floor_scale if llama4 else 1.0,
        temperature_scale=theirs.attn_scale if llama4 else 0.0,
        norm_eps=theirs.rms_norm_eps,
        layer_list=[_layer(theirs, index) for index in range(theirs.num_hidden_layers)],
        vision=_encoder(config) if config.model_type == "llama4" else None,
        **moe,
    )


def _head_dim(theirs: Any) -> int:
    return getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads


def _deepseek(theirs: Any) -> dict[str, Any]:
    limited = theirs.n_group != theirs.topk_group
    return {
        "latent": LatentConfig(theirs.kv_lora_rank, theirs.q_lora_rank, theirs.qk_rope_head_dim, theirs.v_head_dim),
        "num_experts": theirs.n_routed_experts,
        "expert_hidden_size": theirs.moe_intermediate_size,
        "shared_expert_hidden_size": theirs.n_shared_experts * theirs.moe_intermediate_size,
        "router": RouterConfig(
            theirs.num_experts_per_tok,
            norm_topk_prob=theirs.norm_topk_prob,
            scale=theirs.routed_scaling_factor,
            weights_on=WeightsOn.output,
            groups=theirs.n_group if limited else 1,
            top_groups=theirs.topk_group if limited else 1,
            selection_bias=True,
        ),
    }


def _encoder(config: Any) -> VisionConfig:
    theirs = config.vision_config
    return VisionConfig(
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        mlp_hidden_size=theirs.intermediate_size,
        adapter_hidden_size=theirs.projector_output_dim,
        tile_size=theirs.image_size,
        patch_size=theirs.patch_size,
        rope_theta=theirs.rope_parameters["rope_theta"],
        image_token_id=config.image_token_index,
    )


def _layer(theirs: Any, index: int) -> LayerConfig:
    kind = theirs.model_type
    if kind == "llama4_text":
        rotated, chunked = bool(theirs.no_rope_layers[index]), theirs.layer_types[index] == "chunked_attention"
        return LayerConfig(
            FeedForward.moe if index in theirs.moe_layers else FeedForward.dense,
            rope=rotated,
            attention_chunk_size=theirs.attention_chunk_size if chunked else None,
            temperature=bool(theirs.attn_temperature_tuning) and not rotated,
            qk_norm=QKNorm.weightless if theirs.use_qk_norm and rotated else QKNorm.none,
        )
    is_moe = kind in ("mixtral", "olmoe") or (kind == "deepseek_v3" and index >= theirs.first_k_dense_replace)
    if kind == "qwen3_moe":
        every = theirs.decoder_sparse_step
        is_moe = index not in theirs.mlp_only_layers and theirs.num_experts > 0 and (index + 1) % every == 0
    norms = {"qwen3": QKNorm.per_head, "qwen3_moe": QKNorm.per_head, "olmoe": QKNorm.full}
    return LayerConfig(
        FeedForward.moe if is_moe else FeedForward.dense,
        attention_chunk_size=getattr(theirs, "sliding_window", None),  # a window is not a chunk; our value is None
        qk_norm=norms.get(kind, QKNorm.none),
    )


@torch.no_grad()
def compare_logits(source: TensorSource, directory: Path, dtype: torch.dtype | None = None) -> float:
    """Return the largest relative difference of logits between `source` and what transformers loads from `directory`.

    Raises `CheckpointError` if it exceeds `TOLERANCE`, or if transformers misses or ignores a tensor.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would appear among the lines of the command
    vision = source.config.vision
    loader: Any = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    loaded: Any = loader.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    theirs, report = loaded
    odd = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]
    if vision is None:  # of a checkpoint with an encoder that is read without it
        odd = [name for name in odd if "vision" not in str(name) and "multi_modal" not in str(name)]
    if odd:
        raise CheckpointError(f"transformers does not load {odd[0]} of {directory} as we do")
    ours = materialise(source, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, source.config.vocab_size, (2, 33), generator=generator)
    pixels, given = None, dict[str, Tensor]()
    if vision is not None:
        shape = (len(tokens), CHANNELS, vision.tile_size, vision.tile_size)
        pixels = torch.rand(shape, generator=generator).mul_(2).sub_(1)
        patches = torch.full((len(tokens), vision.tokens_per_tile), vision.image_token_id)
        other = (vision.image_token_id + 1) % source.config.vocab_size  # a placeholder must stand for a row
        tokens = torch.where(tokens == vision.image_token_id, other, tokens)
        tokens = torch.cat([tokens[:, :5], patches, tokens[:, 5:]], dim=1)
        given = {"pixel_values": pixels}
    expected, found = theirs.eval()(tokens, use_cache=False, **given).logits.float(), ours(tokens, pixels=pixels)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= TOLERANCE:
        limit = f"the tolerance is {TOLERANCE:.0e}"
        raise CheckpointError(f"logits differ from transformers' by {difference:.1e} of the largest; {limit}")
    return difference
