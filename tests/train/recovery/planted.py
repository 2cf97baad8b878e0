"""A small corpus with one document of garbage, and the troubles that tests plant in a run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.cli import main
from model import head
from model.attention.plan import ForwardContext
from tests.support.tiny import TINY
from train.trainer import Trainer

MARK, MARK_ID = "~", 95
"""The only character of the garbage, and its token."""
SMALL = [
    *TINY,
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "training.seq_len=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.steps=30",
    "training.clip_norm=null",
    "checkpoint.every=5",
    "checkpoint.keep=2",
    "evaluation.sequences=2",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "precision=fp64",
    "data.prefetch=0",
    "recovery.window=16",
    "recovery.history=6",
    "recovery.patience=2",
    "recovery.lookback=2",
    "recovery.loss_ratio=1.5",
    "recovery.lr_steps=10",
]


def write_corpus(root: Path) -> list[str]:
    """Write 240 short documents, one of them garbage. Return overrides that train on them."""
    draw, words = random.Random(0), "the model reads a line and writes another if it must".split()
    (root / "texts").mkdir(parents=True)
    for number in range(240):
        text = " ".join(draw.choices(words, k=12))
        (root / "texts" / f"{number:03d}.txt").write_text(text)
    (root / "texts" / "130.txt").write_text(MARK * 40)
    return [
        "data=files",
        f"data.sources.text.path={root / 'texts'}",
        "data.tokenizer.vocab_size=280",
        "data.held_out=0.1",
        f"data.cache={root / 'cache'}",
    ]


def losses_of_marked(factor: float) -> Any:
    """Return a patch of the cross-entropy that multiplies the losses of the garbage's tokens."""
    honest = head.token_losses

    def planted(logits_TV: Tensor, labels_T: Tensor, shard: Any = None) -> Tensor:
        losses_T = honest(logits_TV, labels_T, shard)
        return losses_T * torch.where(labels_T == MARK_ID, factor, 1.0)

    return planted


NAN_DOCUMENT = partial(losses_of_marked, torch.nan)
GARBAGE = partial(losses_of_marked, 300.0)


def run(root: Path, name: str, overrides: list[str]) -> int:
    return main(["train", *SMALL, f"run.root={root}", f"run.name={name}", *overrides])


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "recovery.jsonl").read_text().splitlines()]
