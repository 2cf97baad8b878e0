"""Overrides that make the tiny run's model the one of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.init_from import open_model


def like(path: Path) -> list[str]:
    c = open_model(path).config
    keys = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "dense_width", "expert_width")
    keys += ("experts", "moe_every", "chunk", "temperature_floor", "temperature_scale", "norm_eps")  # type: ignore[assignment]
    found = [f"model.{key}={getattr(c, key)}" for key in keys]
    return [*found, f"model.qk_norm={c.qk_norm.value}", f"model.router.top_k={c.router.top_k}"]
