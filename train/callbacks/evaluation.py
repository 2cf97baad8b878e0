"""Measure the held-out loss every `evaluation.every` steps and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core.errors import DataError, one_line
from data.images.batch import MODALITIES
from parallel.parallelize import ParallelModel
from train.callbacks.base import Callback, TrainingRun
from train.callbacks.logging import LoggingCallback
from train.eval.answers import Answers, measure
from train.eval.examples import Example, examples, write_examples
from train.eval.held_out import HeldOut, held_out_loss
from train.metrics import StepMetrics


class EvaluationCallback(Callback):
    """Measures the held-out loss and writes it with the writer of `logging`. `result`: the last measurement, `answers`:
    that of sources with pictures.
    """

    only_reports = True
    result: HeldOut | None = None
    answers: Mapping[str, Answers] = {}

    def __init__(self, trainer: TrainingRun, logging: LoggingCallback) -> None:
        super().__init__(trainer)
        self.logging = logging

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        every = self.trainer.config.evaluation.every
        if every and steps % every == 0 and steps != self.trainer.steps:
            self.measure()

    def at_end(self) -> None:
        self.measure()

    def summary(self) -> dict[str, Any]:
        """Return the entries of summary.json."""
        if self.result is None:
            return {"heldout_loss": None, "heldout": None}
        return {"heldout_loss": self.result.loss, "heldout": self.result.plain()}

    def measure(self) -> None:
        trainer = self.trainer
        phase = trainer.phase(max(0, trainer.step - 1))
        loader, sequences = trainer.loaders[phase.name], trainer.config.evaluation.sequences
        with trainer.pause():
            if not any(loader.num_held_out(name) for name in trainer.weights):
                trainer.log("no held-out loss: no source has a held-out sequence of this length")
                return
            bytes_V = torch.from_numpy(trainer.corpus.tokenizer.token_bytes())
            placed, size = trainer.engine.placed, phase.micro_batch_size
            assert isinstance(placed, ParallelModel)
            self.result = result = held_out_loss(placed, loader, bytes_V, sequences, size, trainer.weights)
            if trainer.config.evaluation.answers:
                self.answers = measure(placed, loader, trainer.weights, sequences, size, trainer.corpus)
                shown = [one for name in self.answers for one in examples(placed, loader, name, size, trainer.corpus)]
                if shown and trainer.world.is_main:
                    self._keep(shown)
        if self.logging.writer is not None:
            line: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens, "heldout_loss": result.loss}
            found = result.plain()
            line["heldout"] = found["sources"]
            if result.modalities:
                line["heldout_by_modality"] = found["modalities"]
            if self.answers:
                line["answers"] = {name: one.plain() for name, one in self.answers.items()}
            self.logging.writer.write(line)
        parts = ", ".join(f"{name} {found.loss:.3f}" for name, found in result.sources.items())
        trainer.log(f"held-out loss {result.loss:.4f} nats/token, {result.bits_per_byte:.3f} bits/byte ({parts})")
        if len(result.modalities) > 1:
            images, text = (result.modalities[name].loss for name in MODALITIES)
            trainer.log(f"held-out loss of documents with images {images:.4f}, of text alone {text:.4f}")
        for name, one in self.answers.items():
            trainer.log(
                f"last tokens of {one.documents} held-out documents of {name}: {one.own:.1%} right, with another "
                f"document's pictures {one.other:.1%}, with black ones {one.none:.1%}"
            )

    def _keep(self, found: list[Example]) -> None:
        """Write examples for the report. A failure (a full disk, a damaged picture) is logged, and the run goes on."""
        try:
            write_examples(self.trainer.directory.examples, self.trainer.step, found, self.trainer.corpus)
        except (OSError, DataError) as error:
            self.trainer.log(f"no examples for the report: {one_line(error)}")
