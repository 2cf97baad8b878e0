"""config.json of every family, safetensors files and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from core.errors import CheckpointError, ConfigError
from model.huggingface import HuggingFaceCheckpoint, read_config
from model.huggingface.files import INDEX, SINGLE, open_directory, read_rows
from model.tensor_source import parameter_shapes
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_bytes, json_files, spoiled

SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
COMMON: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "intermediate_size": 32,
    },
    "rope_parameters": {**SCALED, "original_max_position_embeddings": 64},
}
LLAMA4 = {
    **{"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    **{"no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3], "attention_chunk_size": 8, "use_qk_norm": True},
    **{"attn_temperature_tuning": 4, "floor_scale": 4, "attn_scale": 0.1, "no_rope_layer_interval": 4},
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
CONFIGS = [
    {**COMMON, "model_type": "llama", "rope_scaling": None, "rope_theta": 5e5},
    {**COMMON, "model_type": "qwen3", "layer_types": ["full_attention"] * 4},
    {**COMMON, **LLAMA4, "model_type": "llama4_text"},
    {"model_type": "llama4", "text_config": {**COMMON, **LLAMA4, "model_type": "llama4_text"}},
    {**COMMON, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    {**COMMON, **MOE, "model_type": "qwen3_moe", "mlp_only_layers": [1], "decoder_sparse_step": 1},
    {**COMMON, **MOE, "model_type": "olmoe", "clip_qkv": None},
]


@example({**CONFIGS[0], "rope_scaling": "x"})
@example({**CONFIGS[0], "vocab_size": 2**55})
@example({**CONFIGS[0], "vocab_size": 2.0**63})
@example({**CONFIGS[5], "num_experts": 10**400})
@given(st.sampled_from(CONFIGS).flatmap(spoiled))
def test_any_config_json_is_a_model_or_refused(config):
    if isinstance(config, dict):
        found = assert_reads_or_refuses(lambda: read_config(config), ConfigError)
        if found and found[1].num_layers < 99:
            assert_reads_or_refuses(lambda: parameter_shapes(found[1]), ConfigError)


TENSORS = {"a": torch.ones(3, 4), "b": torch.zeros(2, 2, 2, dtype=torch.bfloat16), "c": torch.ones(())}
FILE = save(TENSORS, {"format": "pt"})
BEGIN = 8 + int.from_bytes(FILE[:8], "little")
HEADER = json.loads(FILE[8:BEGIN])


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + FILE[BEGIN:]


def read_all(directory: Path) -> None:
    for entry in open_directory(directory).values():
        assert all(type(size) is int and size >= 0 for size in entry.shape)
        read_rows(entry, 0, 1 if len(entry.shape) == 0 else min(1, entry.shape[0]))


@example(with_header(b"[" * 100_000))
@example(with_header(json_bytes({"a": {"dtype": "F32", "shape": [17.0], "data_offsets": [0, 68]}})))
@example(with_header(json_bytes({"a": {"dtype": "F32", "shape": [-1, -17], "data_offsets": [0, 68]}})))
@example(with_header(json_bytes({"a": {"dtype": "F32", "shape": [17], "data_offsets": [0.0, 68]}})))
@given(files(FILE) | json_files(HEADER).map(with_header))
def test_any_safetensors_file_is_read_or_refused(place, content):
    (place / SINGLE).write_bytes(content)
    assert_reads_or_refuses(lambda: read_all(place), CheckpointError)


SHARDED = {"metadata": {"total_size": 68}, "weight_map": {name: "x.safetensors" for name in TENSORS}}


@example(json_bytes({"weight_map": {"a": ".."}}))
@example(json_bytes({"weight_map": {"a": "x" * 5000}}))
@example(b"[" * 100_000)
@given(json_files(SHARDED))
def test_any_index_of_shards_is_read_or_refused(place, content):
    folder = place / "sharded"
    folder.mkdir(exist_ok=True)
    (folder / "x.safetensors").write_bytes(FILE)
    (folder / INDEX).write_bytes(content)
    assert_reads_or_refuses(lambda: read_all(folder), CheckpointError)


@example(b"[" * 100_000)
@example(b'{"vocab_size": ' + b"9" * 5000 + b"}")
@given(files(json_bytes(CONFIGS[0])))
def test_any_folder_of_a_model_is_read_or_refused(place, content):
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(FILE)
    (folder / "config.json").write_bytes(content)
    assert_reads_or_refuses(lambda: HuggingFaceCheckpoint(folder), CheckpointError, ConfigError)
