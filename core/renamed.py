"""Old names of configuration keys and values, so that an old configuration is rejected with the new name."""

from __future__ import annotations

from dataclasses import is_dataclass

_BATCH = {"global_batch": "global_batch_size", "micro_batch": "micro_batch_size"}
_SIZES = {"width": "hidden_size", "layers": "num_layers", "experts": "num_experts"}

FIELDS: dict[str, dict[str, str]] = {
    "ModelConfig": {
        **_SIZES,
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "head_width": "head_dim",
        "dense_width": "dense_hidden_size",
        "expert_width": "expert_hidden_size",
        "shared_width": "shared_expert_hidden_size",
        "chunk": "attention_chunk_size",
    },
    "LayerConfig": {"chunk": "attention_chunk_size"},
    "RouterConfig": {"renormalise": "norm_topk_prob"},
    "RopeScaling": {"original_context": "original_seq_len", "low": "low_freq_factor", "high": "high_freq_factor"},
    "Scale": _SIZES,
    "TrainingConfig": {**_BATCH, "context": "seq_len"},
    "PhaseConfig": {**_BATCH, "context": "seq_len"},
    "EvaluationConfig": {"rows": "sequences"},
    "EvaluateConfig": {"rows": "sequences", "micro_batch": "micro_batch_size"},
    "AblateConfig": {"rows": "sequences"},
    "DataConfig": {"pack_context": "pack_seq_len"},
    "ScorerConfig": {"context": "seq_len", "batch": "batch_size", "parallel": "concurrency"},
    "ParallelConfig": {"context": "cp_method", "reduce": "reduce_dtype"},
    "ZeroConfig": {"bucket": "bucket_size"},
    "PrecisionConfig": {"storage": "param_dtype", "float8": "fp8_products"},
    "SlurmConfig": {"together": "max_concurrent"},
}
"""New name of each old field, by configuration class."""

UNTYPED = {"launch.slurm": "SlurmConfig"}
"""Configuration class of each key whose type the schema of `train` leaves open."""

VALUES: dict[str, dict[str, str]] = {"Backend": {"bf16": "native", "reference": "emulated"}}
"""New name of each old member, by enum."""


def old_fields(owner: object, key: str = "") -> dict[str, str]:
    """Return the new name of each old field of the class `owner`, which is at `key`."""
    name = owner.__name__ if isinstance(owner, type) and is_dataclass(owner) else UNTYPED.get(key, "")
    return FIELDS.get(name, {})


def new_value(kind: object, value: object) -> str | None:
    """Return the new name of the old member `value` of the enum `kind`, or None if it was not renamed."""
    return VALUES.get(getattr(kind, "__name__", ""), {}).get(str(value))
