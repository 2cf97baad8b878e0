"""Read and write checkpoints in the Hugging Face format: Llama 4, Mixtral, Qwen3 (dense and MoE), OLMoE and Llama."""

from __future__ import annotations

from pathlib import Path

from model.huggingface.check import compare_logits, compare_settings, obstacle, shortage
from model.huggingface.checkpoint import HuggingFaceCheckpoint
from model.huggingface.families import FAMILIES, compact, model_differences, read_config, write_config
from model.huggingface.writer import export
from model.tensor_source import materialise
from model.transformer import Transformer


def load(path: str | Path, text_only: bool = False) -> Transformer:
    """Load the model of a checkpoint directory in float32 on the CPU. It maps ids [B, T] to logits [B, T, V].

    Raises `CheckpointError` for an incomplete directory and `ConfigError` for an unsupported architecture.
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
