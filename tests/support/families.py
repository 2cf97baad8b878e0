"""A family of small MoE models and their runs, for tests of scaling rules, and batches that need no corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from core.config import load
from data.loader import Batch
from train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.vocab_size=256",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.head_dim=16",
    "model.dense_hidden_size=128",
    "model.expert_hidden_size=64",
    "model.shared_expert_hidden_size=0",
    "model.num_experts=8",
    "model.moe_every=1",
    "model.nope_every=0",
    "model.attention_chunk_size=null",
    "model.qk_norm=none",
    "model.router.top_k=2",
    "model.router.score=softmax",
    "model.router.norm_topk_prob=true",
    "model.router.weights_on=output",
    "model.init.std=1",
    "model.init.fan_in=true",
    "model.init.depth_scaled=false",
    "model.init.embedding_std=1",
    "model.init.head_std=0",
    "model.init.router_std=0.00125",
    "training.seq_len=64",
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
    "training.clip_norm=null",
    "optimizer.weight_decay=0",
]
"""The head starts at zero and the router at small values, so that what the tests measure is learnt."""


def family(*overrides: str) -> TrainConfig:
    return load("train", TrainConfig, ["hparam=none", *SMALL, *overrides])


def text(rows: int = 8, context: int = 64) -> Batch:
    """Return a batch of bytes of the licence: real text that does not change and needs no tokenizer."""
    content = (ROOT / "LICENSE").read_bytes()[: rows * (context + 1)]
    ids = np.frombuffer(content, np.uint8).astype(np.int64).reshape(rows, context + 1)
    tokens = torch.from_numpy(ids.copy())
    positions = torch.arange(context).expand(rows, context)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, torch.zeros(rows, dtype=torch.int64))
