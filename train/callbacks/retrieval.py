"""Measure retrieval on held-out pairs every `evaluation.every` steps and at the end of a contrastive run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from data.corpus import TRAIN
from train.callbacks.evaluation import EvaluationCallback
from train.config import phases
from train.contrastive.engine import ContrastiveEngine
from train.contrastive.retrieval import Retrieval, held_out_retrieval


class RetrievalCallback(EvaluationCallback):
    """Measures the loss of held-out pairs, and how often a picture's nearest caption, and a caption's nearest picture,
    is its own.
    """

    found: Retrieval | None = None

    def before_training(self) -> None:
        trainer = self.trainer
        for phase in phases(trainer.config):
            sources = phase.weights or trainer.weights
            streams = (trainer.corpus.stream(name, TRAIN) for name in sources if sources[name])
            pairs = sum(stream.num_sequences(phase.seq_len) for stream in streams)
            if phase.global_batch_size > pairs:
                size = f"{phase.key}.global_batch_size={phase.global_batch_size}"
                trainer.log(
                    f"{size} is more than the {pairs} training pairs: equal pairs become negatives of each other"
                )

    def measure(self) -> None:
        trainer = self.trainer
        engine, phase = trainer.engine, trainer.phase(max(0, trainer.step - 1))
        assert isinstance(engine, ContrastiveEngine)
        loader, sequences = trainer.loaders[phase.name], trainer.config.evaluation.sequences
        with trainer.pause():
            placed, size = engine.placed, phase.micro_batch_size
            sizes = sequences, phase.global_batch_size, size
            self.found = found = held_out_retrieval(placed, loader, engine.ids, trainer.weights, *sizes)
        if found is None:
            trainer.log("no held-out retrieval: no source has a held-out pair")
            return
        if self.logging.writer is not None:
            line: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens, "heldout_loss": found.loss}
            self.logging.writer.write({**line, "retrieval": asdict(found)})
        trainer.log(
            f"held-out loss {found.loss:.4f} nats/pair among {found.compared} (chance {math.log(found.compared):.4f})"
        )
        trainer.log(
            f"of {found.pairs} held-out pairs the nearest caption is right for {found.to_text:.1%} of pictures, the "
            f"nearest picture for {found.to_image:.1%} of captions (chance {found.chance:.2%})"
        )

    def summary(self) -> dict[str, Any]:
        if self.found is None:
            return {"heldout_loss": None, "heldout": None, "retrieval": None}
        return {"heldout_loss": self.found.loss, "heldout": None, "retrieval": asdict(self.found)}
