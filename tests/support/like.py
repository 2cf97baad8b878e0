"""Overrides that make the tiny run's model the one of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.init_from import open_model


def like(path: Path) -> list[str]:
    c = open_model(path).config
    sizes = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "dense_hidden_size"]
    others = ["attention_chunk_size", "temperature_floor", "temperature_scale", "norm_eps"]
    keys = [*sizes, "num_experts", "moe_every", "expert_hidden_size", *others]
    found = [f"model.{key}={getattr(c, key)}" for key in keys]
    return [*found, f"model.qk_norm={c.qk_norm.value}", f"model.router.top_k={c.router.top_k}"]
