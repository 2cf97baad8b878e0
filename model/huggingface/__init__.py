"""Checkpoints in the Hugging Face format, in and out: Llama 4, Mixtral, Qwen3 (dense and MoE), OLMoE and Llama."""

from __future__ import annotations

from pathlib import Path

from model.huggingface.check import compare_logits, compare_settings, obstacle, shortage
from model.huggingface.checkpoint import HuggingFaceCheckpoint
from model.huggingface.families import FAMILIES, compact, model_differences, read_config, write_config
from model.huggingface.writer import export
from model.tensor_source import materialise
from model.transformer import Transformer


def load(path: str | Path, text_only: bool = False) -> Transformer:
    """The model of a checkpoint directory, float32 on the CPU, ready to be called: ids [B, T] -> logits [B, T, V].

    Raises `CheckpointError` for a directory that is not whole, `ConfigError` for an architecture we do not compute.
    """
    return materialise(HuggingFaceCheckpoint(Path(path), text_only))


__all__ = [
    "FAMILIES",
    "HuggingFaceCheckpoint",
    "compact",
    "compare_logits",
    "compare_settings",
    "export",
    "load",
    "model_differences",
    "obstacle",
    "read_config",
    "shortage",
    "write_config",
]
