"""Measure what filtering costs: tokens per second of each stage, and its time per token relative to a training step's.

The records are the training documents of the built-in corpus. The smoke model both scores records by loss and is the
model that is trained; its weights do not affect the time. Everything runs on one thread, in one process.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import Result
from bench.trainer_step import make_trainer
from data.filter.config import DuplicateConfig, GateConfig
from data.filter.corpus import SourcePart
from data.filter.input.records import Record
from data.filter.runs import DiskArrays
from data.filter.score.losses import LossScorer
from data.filter.score.ngram import NgramScorer
from data.filter.screen.duplicates import DuplicateSearch, signatures
from data.filter.screen.gates import Gates
from data.filter.store import OneWorker
from data.sources import make_source
from model.attention.plan import ForwardContext
from train.eval.scoring_model import ScoringModel
from train.eval.text_loss import token_losses
from train.trainer import Trainer

STEPS, SCORED = 12, 24


def run() -> list[Result]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        trainer = make_trainer(Path(root), "filtering")
        data = trainer.config.data
        parts = [SourcePart(make_source(name, part, data), name) for name, part in data.sources.items()]
        records = [one for part in parts for one in part.records() if isinstance(one, Record)]
        tokens = sum(map(len, trainer.corpus.tokenizer.encode([record.text for record in records])))
        training = _training(trainer)
        few = records[:: max(len(records) // SCORED, 1)]
        share = sum(map(len, trainer.corpus.tokenizer.encode([record.text for record in few]))) / tokens
        stages: dict[str, tuple[Callable[[], object], float]] = {
            "gates": (lambda: _gates(records), 1.0),
            "duplicates": (lambda: _duplicates(records), 1.0),
            "ngram, fit and score": (lambda: _ngram(records), 1.0),
            "loss of the smoke model": (lambda: _by_model(trainer).score(few), share),
        }
        return [_result(name, stage, tokens * part, training) for name, (stage, part) in stages.items()]


def _result(name: str, stage: Callable[[], object], tokens: float, training: float) -> Result:
    begin = time.perf_counter()
    stage()
    rate = tokens / (time.perf_counter() - begin)
    what = f"filter: {name} (tokens/s; ratio: its time over the training step's, per token)"
    return Result(what, rate, training, training / rate, "-", not math.isnan(rate), f"{tokens:,.0f} tokens, 1 thread")


def _training(trainer: Trainer) -> float:
    """Return the tokens per second of training steps."""
    for _ in range(3):
        trainer.train_step(trainer.step)
    begin = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step(trainer.step)
    first = trainer.config.training
    return STEPS * first.global_batch_size * first.seq_len / (time.perf_counter() - begin)


def _gates(records: list[Record]) -> None:
    gates = Gates(GateConfig())
    for record in records:
        gates(record)


def _ngram(records: list[Record]) -> None:
    scorer = NgramScorer()
    scorer.fit(lambda: records)
    scorer.score(records)


def _duplicates(records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskArrays(Path(folder), {"0": len(records)}, OneWorker())
        search = DuplicateSearch(disk, DuplicateConfig(), lambda _: signatures([record.text for record in records]))
        search.run()
        search.copies("0", len(records))


def _by_model(trainer: Trainer) -> LossScorer:
    model, tokenizer, context = trainer.engine.placed.model.eval(), trainer.corpus.tokenizer, 256

    def logits(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, ForwardContext(torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)))

    scoring = ScoringModel(model, logits, tokenizer, context, ("smoke",))
    return LossScorer(token_losses(scoring, context, 8), "smoke")
