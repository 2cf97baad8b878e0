"""Small models of transformers, one per family, with weights large enough that a broken port is far off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 0.05,  # far from every default, and large enough to be seen in the logits
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA4: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "attention_chunk_size": 5,
    "floor_scale": 4,
    "attn_scale": 0.5,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "scout": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 1, "rope_parameters": SCALED}),
    "maverick": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False}),
    "llama4_top2": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {**COMMON, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **COMMON,
            "intermediate_size": 48,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            **{key: value for key, value in COMMON.items() if key != "head_dim"},
            "intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "llama": (
        "Llama",
        {
            **COMMON,
            "intermediate_size": 48,
            "tie_word_embeddings": True,
            "rope_parameters": {
                **SCALED,
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "qwen3": ("Qwen3", {**COMMON, "intermediate_size": 48}),
}


def make(name: str, **changes: Any) -> Any:
    """transformers' model, float32, weights of order one over the square root of their width, gains around 1."""
    import transformers

    kind, settings = PEERS[name]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    cls = "Llama4ForCausalLM" if kind == "Llama4Text" else f"{kind}ForCausalLM"
    model = getattr(transformers, cls)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in key:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / 64**0.5)
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory
