"""A small model and searches of it."""

from __future__ import annotations

import torch

from launch.plan.calibration import default_calibration
from launch.plan.cluster import ClusterConfig
from launch.plan.search.config import RunShape, SearchConfig
from launch.plan.search.search import LayoutSearch, PlannedRun
from model.config import ModelConfig, RouterConfig

SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    dense_hidden_size=768,
    expert_hidden_size=192,
    num_experts=8,
    moe_every=2,
    attention_chunk_size=512,
    router=RouterConfig(top_k=2),
)
"""Dense and MoE layers, chunked and full attention."""


def planned(model: ModelConfig = SMALL, nodes: int = 2, run: RunShape | None = None, **cluster: object) -> PlannedRun:
    shape = run or RunShape(seq_len=2048, global_batch_size=64, imbalance=1.3)
    return PlannedRun(model, ClusterConfig(nodes=nodes, **cluster), shape, torch.float32, False)  # type: ignore[arg-type]


def search(job: PlannedRun | None = None, **limits: object) -> LayoutSearch:
    return LayoutSearch(job or planned(), SearchConfig(**limits), default_calibration())  # type: ignore[arg-type]
