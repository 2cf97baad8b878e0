"""Small models of transformers, one per family. Their weights are so large that an error of ours is clearly visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launch.cli import main
from tests.support.tiny import TINY
from train.checkpoint.init_from import open_model

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
TOP2 = {**COMMON, "intermediate_size": 32, "num_experts_per_tok": 2}
QWEN3_MOE = {"intermediate_size": 48, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}
DEEPSEEK = {
    **{key: value for key, value in COMMON.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_mtp_layers": 0,
    "rope_parameters": YARN,
}
LLAMA_ROPE = {**SCALED, "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "scout": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 1, "rope_parameters": SCALED}),
    "maverick": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False}),
    "llama4_top2": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {**TOP2, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {**TOP2, **QWEN3_MOE, "num_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4} | {key: value for key, value in TOP2.items() if key != "head_dim"}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "latent_queries_direct": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": None},
    ),
    "llama": (
        "Llama",
        {**COMMON, "intermediate_size": 48, "tie_word_embeddings": True, "rope_parameters": LLAMA_ROPE},
    ),
    "qwen3": ("Qwen3", {**COMMON, "intermediate_size": 48}),
}


def make_with_vision(heads: int = 4, tile: int = 28, patch: int = 7, **changes: Any) -> Any:
    """Return a Llama 4 model with a small encoder, initialised like `make`; id 90 is the placeholder."""
    import transformers

    width = 12 * heads
    encoder = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": heads, "image_size": tile}
    encoder |= {"intermediate_size": 4 * width, "patch_size": patch}
    encoder |= dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 40)
    text = {key: value for key, value in {**LLAMA4, **changes}.items() if key != "attn_implementation"}
    config = transformers.Llama4Config(vision_config=encoder, text_config=text, image_token_index=90)
    config._attn_implementation = "eager"
    return filled(transformers.Llama4ForConditionalGeneration(config).float().eval())


def make(name: str, **changes: Any) -> Any:
    """Return transformers' model in float32, with weights of about 1 / sqrt(width) and gains around 1."""
    import transformers

    kind, settings = PEERS[name]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    cls = "Llama4ForCausalLM" if kind == "Llama4Text" else f"{kind}ForCausalLM"
    return filled(getattr(transformers, cls)(config).float().eval())


def filled(model: Any) -> Any:
    """Fill a model with weights of about 1 / sqrt(width), gains around 1 and biases around 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif key.endswith(("class_embedding", "positional_embedding_vlm")):
                parameter.copy_(noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in key:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / 64**0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def like(path: Path) -> list[str]:
    """Return overrides that give the tiny run the model of a checkpoint."""
    c = open_model(path).config
    sizes = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "dense_hidden_size"]
    others = ["attention_chunk_size", "temperature_floor", "temperature_scale", "norm_eps"]
    keys = [*sizes, "num_experts", "moe_every", "expert_hidden_size", *others]
    found = [f"model.{key}={getattr(c, key)}" for key in keys]
    return [*found, f"model.qk_norm={c.qk_norm.value}", f"model.router.top_k={c.router.top_k}"]


def byte_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 300 ids with few merges, in the format of the Hugging Face hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the model reads a line and writes another"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_gpt2(folder: Path, positions: int) -> Path:
    """Save a random GPT-2, which only transformers can open, with a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    byte_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    return folder


def save_llava(folder: Path, positions: int) -> Path:
    """Save a random LLaVA with its processor: 4 tokens to a picture of 28 pixels."""
    import transformers as library

    byte_tokenizer(folder)
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    vision = library.CLIPVisionConfig(hidden_size=16, image_size=28, patch_size=14, projection_dim=16, **sizes)
    text = library.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    place = tokenizer.convert_tokens_to_ids("<image>")
    config = library.LlavaConfig(vision_config=vision, text_config=text, image_token_index=place)
    library.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    patches = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    library.LlavaProcessor(
        image_processor=library.CLIPImageProcessorPil(**pixels), tokenizer=tokenizer, **patches
    ).save_pretrained(folder)
    return folder


FOREIGN = {"gpt2": save_gpt2, "llava": save_llava}
"""Architectures that are not ours."""


def train_and_export(root: Path, *words: str) -> None:
    """Train a short run without selection biases in `root/run`, and export it to `root/exported`."""
    line = ["train", *TINY, *words, "model.balance.bias_rate=0", f"run.root={root}", "run.name=run"]
    assert main([*line, "training.steps=30", "optimizer.lr=0.01", "training.seq_len=64"]) == 0
    assert main(["export", str(root / "run"), str(root / "exported")]) == 0
