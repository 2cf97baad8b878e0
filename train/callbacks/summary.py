"""Write summary.json and the report at the end of a run."""

from __future__ import annotations

from typing import Any

from core.errors import LeviathanError
from core.files import write_json
from data.ngram_baseline import NgramBaseline
from model.flops import Parameters, count_parameters, training_flops, vision_flops
from parallel.cost import bytes_of_shards, static_bytes
from train.callbacks.base import Callback, TrainingRun
from train.callbacks.evaluation import EvaluationCallback
from train.callbacks.logging import LoggingCallback
from train.config import Objective
from train.contrastive.towers import costs_like
from train.metrics import peak_memory_bytes
from train.optim.config import OptimizerKind


class SummaryCallback(Callback):
    """Writes summary.json from the last results of `logging` and `evaluation`, closes the writer, writes the report."""

    only_reports = True

    def __init__(self, trainer: TrainingRun, logging: LoggingCallback, evaluation: EvaluationCallback) -> None:
        super().__init__(trainer)
        self.logging, self.evaluation = logging, evaluation

    def at_end(self) -> None:
        if self.logging.writer is None:  # only rank 0 has a writer
            return
        write_json(self.trainer.directory.summary, self.summary())
        self.logging.writer.close()  # not earlier: the evaluation has just written the last line
        if self.trainer.config.logging.report:
            self._report()

    def summary(self) -> dict[str, Any]:
        trainer, config = self.trainer, self.trainer.config
        layout, moments = trainer.meshes.layout, config.optimizer.moments_dtype(config.precision)
        muon, frozen = config.optimizer.kind is OptimizerKind.muon, config.training.frozen
        specs = trainer.engine.placed.specs
        match config.training.objective:
            case Objective.language:
                parameters, model = count_parameters(config.model), config.model
                kept = static_bytes(config.model, config.precision, layout, moments, muon=muon, frozen=frozen)
            case Objective.contrastive:
                total = sum(spec.info.shape.numel() for spec in specs.values())
                parameters, model = Parameters(total, total), costs_like(config)
                kept = bytes_of_shards(specs, config.precision, moments, muon, frozen)
        flops = training_flops(model, trainer.phase(trainer.steps - 1).seq_len, frozen)
        summary: dict[str, Any] = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "train_loss": self.logging.last_loss,
            "heldout_loss": None,
            "unigram_loss": None,
            "bigram_loss": None,
            "tokens_per_second": round(self.logging.throughput.mean or self.logging.last_rate, 1),
            "peak_memory_bytes": peak_memory_bytes(trainer.world.device),
            "total_parameters": parameters.total,
            "active_parameters": parameters.active,
            "flops_per_token": flops.total,
            "world_size": trainer.world.size,
            "layout": layout.axes,
            "static_bytes": vars(kept),
            "corpus": trainer.corpus.fingerprint,
            **self.evaluation.summary(),
        }
        if config.model.vision is not None:
            summary["flops_per_tile"] = vision_flops(config.model.vision, config.model.hidden_size, frozen).total
        if config.evaluation.baselines and (held_out := self.evaluation.result):
            summary |= self._baselines(list(held_out.sources))
        return summary

    def _baselines(self, sources: list[str]) -> dict[str, Any]:
        """Fit a unigram and a bigram model to the consumed tokens, and evaluate both on the held-out tokens."""
        trainer = self.trainer
        baseline = NgramBaseline(trainer.config.model.vocab_size)
        for step in range(trainer.step):
            phase = trainer.phase(step)
            batch = trainer.loaders[phase.name].batch(step - phase.start)
            baseline.add(batch.tokens_BT, batch.labels_BT)
        phase = trainer.phase(trainer.step - 1)
        loader, size, held_out = trainer.loaders[phase.name], phase.micro_batch_size, {}
        for source in sources:
            count = min(trainer.config.evaluation.sequences, loader.num_held_out(source))
            batches = (loader.held_out(source, a, min(a + size, count)) for a in range(0, count, size))
            held_out[source] = list(batches)
        found = baseline.evaluate(held_out, {s: trainer.weights[s] for s in sources})
        trainer.log(
            f"unigram {found['unigram_loss']:.4f} (add {found['unigram_constant']:g}), "
            f"bigram {found['bigram_loss']:.4f} (smoothed by {found['bigram_constant']:g})"
        )
        return found

    def _report(self) -> None:
        """Write report.html. A failure is logged and does not fail the run."""
        from train.report.page import PAGE, write_report  # matplotlib takes a second to import

        directory = self.trainer.directory.path
        try:
            write_report([directory], directory / PAGE)
        except (LeviathanError, OSError, ValueError) as error:
            self.trainer.log(f"no report: {error}")
