"""Train a dense transformer on problems, and measure how many it answers exactly.

The network, its initialisation and the optimizer (Muon, AdamW for the rest) are those of the product. The labels are
the characters of the answer. Matrix products are in bfloat16, weights in float32.
Shapes: B problems, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.data.problems import Problem
from model.config import InitConfig, ModelConfig, QKNorm
from model.init import initialise
from model.roles import registry
from model.transformer import Transformer
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from parallel.sharding import shard_specs
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from train.optim.config import OptimizerConfig, OptimizerKind
from train.optim.lr_schedule import LRScheduleConfig
from train.optim.optimizer import make_optimizer, set_learning_rate

CHARACTERS = "\n0123456789abcdxy+="
"""The vocabulary. The first begins a problem, and the last ends its prompt."""
TOKENS = 36
"""Tokens of the longest problem; shorter ones are padded."""
IGNORED = -100
HEAD = 32


@dataclass(frozen=True)
class Size:
    """A model's hidden size and number of layers, and the run's peak learning rate and problems per step."""

    hidden: int
    layers: int
    lr: float
    batch: int = 16

    @property
    def model(self) -> ModelConfig:
        heads, init = self.hidden // HEAD, InitConfig(std=0.7, fan_in=True, embedding_std=0.1, head_std=0.02)
        return ModelConfig(
            vocab_size=32,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=HEAD,
            dense_hidden_size=3 * self.hidden,
            moe_every=0,
            nope_every=0,
            attention_chunk_size=None,
            qk_norm=QKNorm.none,
            temperature=False,
            rope_theta=100.0,  # the sequences are short
            init=init,
        )


SIZES = {"1M": Size(192, 2, 5e-3), "5M": Size(320, 4, 3e-3)}


def encoded(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, both int64 [B, T]. Spaces are no tokens, and only the answer has labels."""
    tokens_BT = torch.zeros((len(problems), TOKENS), dtype=torch.int64)
    labels_BT = torch.full((len(problems), TOKENS), IGNORED)
    for row, problem in enumerate(problems):
        ids = [0, *(CHARACTERS.index(one) for one in f"{problem.prompt} {problem.response}".replace(" ", ""))]
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        end, begin = len(ids) - 1, len(ids) - 1 - len(problem.response.replace(" ", ""))
        labels_BT[row, begin:end] = tokens_BT[row, begin + 1 : end + 1]
    return tokens_BT, labels_BT


def train_model(problems: Sequence[Problem], size: Size, seed: int) -> Transformer:
    """Train on the problems in order, each once, and return the model."""
    model = Transformer(size.model, resolve(PrecisionConfig(Compute.bfloat16)))
    initialise(model, size.model, seed)
    meshes = meshes_of_rank(ParallelConfig().resolve(1), 0)
    config = OptimizerConfig(kind=OptimizerKind.muon, lr=size.lr, beta2=0.98)
    optimizer = make_optimizer(model, shard_specs(registry(model), size.model, meshes), config, meshes)
    tokens_BT, labels_BT = encoded(problems)
    steps = len(problems) // size.batch
    schedule = LRScheduleConfig(warmup_steps=max(1, steps // 20), decay=0.5, final=0.02)
    for step in range(steps):
        here = slice(step * size.batch, (step + 1) * size.batch)
        set_learning_rate(optimizer.param_groups, schedule.factor(step, steps))
        logits = model(tokens_BT[here]).float()
        F.cross_entropy(logits.flatten(0, 1), labels_BT[here].flatten(), ignore_index=IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.inference_mode()
def answered(model: Transformer, problems: Sequence[Problem], batch: int = 256) -> NDArray[np.bool_]:
    """Return which problems greedy decoding answers exactly, [B].

    The tokens of an answer that greedy decoding finds are the most likely ones after the right tokens so far, so one
    forward pass over the right answer is enough.
    """
    found = []
    for begin in range(0, len(problems), batch):
        tokens_BT, labels_BT = encoded(problems[begin : begin + batch])
        best_BT = model(tokens_BT).argmax(-1)
        found.append(((best_BT == labels_BT) | (labels_BT == IGNORED)).all(1).numpy())
    return np.concatenate(found)
