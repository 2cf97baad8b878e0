"""A small corpus with documents of garbage, and the troubles that tests plant in a run."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import LeviathanError
from model import head
from tests.support.tiny import TINY, trainer
from train.callbacks.base import Callback, TrainingRun
from train.metrics import StepMetrics
from train.trainer import Trainer

WORDS = "the model reads a line and writes another if it must"
MARK, MARK_ID = "~", 95
"""The only character of the garbage, and its token."""
STEPS = 30
SMALL = [
    *TINY,
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "training.seq_len=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    f"training.steps={STEPS}",
    "training.clip_norm=null",
    "checkpoint.every=5",
    "checkpoint.keep=2",
    "evaluation.sequences=2",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "precision=fp64",
    "recovery.window=16",
    "recovery.history=6",
    "recovery.patience=2",
    "recovery.lookback=2",
    "recovery.loss_ratio=1.5",
    "recovery.lr_steps=10",
    "run.seed=1",
]
FIRST = 12
"""The step, counted from 0, that first reads the garbage of `write_corpus`."""


def write_corpus(root: Path, garbage: tuple[int, ...] = (130,)) -> list[str]:
    """Write 240 short documents, some of them garbage. Return overrides that train on them."""
    draw = random.Random(0)
    (root / "texts").mkdir(parents=True)
    for number in range(240):
        text = " ".join(draw.choices(WORDS.split(), k=12))
        (root / "texts" / f"{number:03d}.txt").write_text(MARK * 40 if number in garbage else text)
    place, cache = f"data.sources.text.path={root / 'texts'}", f"data.cache={root / 'cache'}"
    return ["data=files", place, "data.tokenizer.vocab_size=280", "data.held_out=0.1", cache]


class Planted(Callback):
    """Does `harm` to the weights before step `step`, counted from 0: once, or each time that the step comes."""

    def __init__(self, trainer: TrainingRun, step: int, once: bool = False, rank: int | None = None) -> None:
        super().__init__(trainer)
        self.step, self.once, self.rank = step, once, rank

    def before_step(self, step: int) -> None:
        if step == self.step and self.rank in (None, self.trainer.world.rank):
            self.harm()
            self.step = -1 if self.once else self.step

    @torch.no_grad()
    def harm(self) -> None:
        raise NotImplementedError

    def tensors(self, *words: str) -> list[Tensor]:
        return [one.tensor for one in self.trainer.engine.state() if all(word in one.name for word in words)]


class Scaled(Planted):
    """Makes weights too large, as a fault in one operation may."""

    @torch.no_grad()
    def harm(self) -> None:
        for weight in self.tensors("model.", "head"):
            weight.mul_(50)


class RouterCollapse(Planted):
    """Makes the routers so sure that some experts get almost everything."""

    @torch.no_grad()
    def harm(self) -> None:
        for weight in self.tensors("model.", "router"):
            weight.mul_(300)


class NanWeight(Planted):
    @torch.no_grad()
    def harm(self) -> None:
        self.tensors("model.", "head")[0][0] = torch.nan


class FlippedBit(Planted):
    """Flips a bit of one element of a weight or moment: `bit` counts from the least significant one of a float64."""

    def __init__(self, trainer: TrainingRun, step: int, rank: int, name: str, bit: int = 40) -> None:
        super().__init__(trainer, step, True, rank)
        self.name, self.bit = name, bit

    @torch.no_grad()
    def harm(self) -> None:
        tensor = self.tensors(*self.name.split())[0].view(-1)
        assert tensor.dtype == torch.float64
        tensor.view(torch.int64)[3] ^= 1 << self.bit


class HarmlessEarly(Callback):
    """Says whether the run has come to step `step`, from which on documents do harm."""

    late = True

    def __init__(self, trainer: TrainingRun, step: int) -> None:
        super().__init__(trainer)
        self.step = step

    def before_step(self, step: int) -> None:
        type(self).late = step >= self.step

    def after_rewind(self) -> None:
        type(self).late = self.trainer.step >= self.step


def rate_bump(step: int, steps: int, first: int, last: int, factor: float) -> float:
    """Return a learning rate that is too high in some steps."""
    return factor if first <= step <= last else 1.0


def multiply_marked(patch: pytest.MonkeyPatch, factor: float) -> None:
    """Multiply the losses of the garbage's tokens."""
    honest = head.token_losses

    def planted(logits_TV: Tensor, labels_T: Tensor, shard: Any = None) -> Tensor:
        harm = factor if HarmlessEarly.late else 1.0
        return honest(logits_TV, labels_T, shard) * torch.where(labels_T == MARK_ID, harm, 1.0)

    patch.setattr(head, "token_losses", planted)


def planted_callback(callback: str, **options: Any) -> str:
    shown = ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    )
    return f"callbacks=[{{target: '{__name__}:{callback}', options: {{{shown}}}}}]"


def train(root: Path, name: str, overrides: list[str], factor: float | None = None) -> Trainer | LeviathanError:
    """Train on these ranks, with harmful garbage if there is a `factor`. Return the trainer, or the error of the run."""
    HarmlessEarly.late = True
    with pytest.MonkeyPatch.context() as patch:
        if factor is not None:
            multiply_marked(patch, factor)
        run = trainer(root, name, [*SMALL, *overrides])
        try:
            assert run.fit() == 0
        except LeviathanError as error:
            return error
        return run


def outcome(root: Path, name: str, overrides: list[str], factor: float | None = None) -> tuple[int, str]:
    """Train on these ranks. Return the last step and the error, if any."""
    found = train(root, name, overrides, factor)
    return (-1, str(found)) if isinstance(found, LeviathanError) else (found.step, "")


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "recovery.jsonl").read_text().splitlines()]


def of_event(path: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in ledger(path) if line["event"] == event]


def verdicts(path: Path) -> list[str]:
    return [line["verdict"] for line in of_event(path, "verdict")]


def losses(path: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def digest_of(run: Trainer) -> dict[str, list[int]]:
    """Return all bits of the state of a run."""
    return {one.name: one.tensor.double().view(torch.int64).flatten().tolist() for one in run.engine.state()}


NAN, GARBAGE = torch.nan, 3000.0
nan_document, garbage = partial(train, factor=NAN), partial(train, factor=GARBAGE)


class Silent(Callback):
    """Keeps the metrics of each step that reaches it."""

    only_reports = True

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        self.trainer.log(f"step {steps} reported")
