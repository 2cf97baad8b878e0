"""What happens around the steps: logging, evaluation, saving, profiling, the closing summary."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.config import plain
from core.errors import ConfigError, Diverged, LeviathanError
from core.files import append_json_line, write_json
from data.loader import Batch
from data.ngram_baseline import NgramBaseline
from data.sampling import key_of
from model.flops import count_parameters, training_flops
from parallel.comm.world import wait_for
from parallel.cost import StaticBytes, static_bytes
from train.config import Phase
from train.eval.held_out import HeldOut, held_out_batches, held_out_loss
from train.eval.sequence_loss import row_losses
from train.metrics import MetricsWriter, Throughput, expert_load, peak_memory_bytes
from train.online_filter import OnlineFilter, OnlineWindow
from train.optim.optimizer import OptimizerKind
from train.run_directory import read_lines
from train.stragglers import SLOW_HOSTS

if TYPE_CHECKING:
    from train.trainer import StepMetrics, Trainer


class Callback:
    """Called on every rank, so that it may use collectives. `after_step` gets the number of steps done."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        pass

    def at_end(self) -> None:
        pass


def make(trainer: Trainer) -> Sequence[Callback]:
    """The callbacks of a run in their order: the summary comes last and sees what the others left."""
    logging = LoggingCallback(trainer)
    evaluation = EvaluationCallback(trainer, logging)
    found: list[Callback] = [logging, CheckpointCallback(trainer), evaluation]
    if trainer.config.online.every:
        found.insert(0, OnlineFilterCallback(trainer))
    if trainer.config.profile.steps:
        found.append(ProfilerCallback(trainer))
    found.append(SummaryCallback(trainer, logging, evaluation))
    if trainer.config.logging.report:
        found.append(Report(trainer))
    return [*found, RunName(trainer)]


def refuse_nonsense(metrics: StepMetrics, steps: int) -> None:
    """A loss or a gradient that is no number makes every later step a waste, and every later checkpoint worthless."""
    for name, figure in (("loss", metrics.loss), ("gradient norm", metrics.gradient_norm)):
        if not math.isfinite(figure.item()):
            raise _nonsense(f"the {name} after step {steps} is {figure.item()}")
    if not metrics.finite.item():
        raise _nonsense(f"a loss or a gradient norm before step {steps} was no number")


def _nonsense(what: str) -> Diverged:
    error = Diverged(f"{what}: start a new run (run.name) with a lower optimizer.lr")
    error.everywhere = True
    return error


class OnlineFilterCallback(Callback):
    """Before every `online.every`-th step of a phase the present model scores what comes next (`train.online_filter`).
    Each window is a line of `online.jsonl`, so that it can be told later which steps trained on a document.
    """

    def before_step(self, step: int) -> None:
        trainer, config = self.trainer, self.trainer.config.online
        phase, window = trainer.phase(step), trainer.window
        if (step - phase.start) % config.every:
            return
        if step == phase.start:
            window = OnlineWindow(generation=window.generation)
        key = key_of(trainer.config.run.seed, "online", phase.name)
        filter_ = OnlineFilter(config, phase.global_batch_size, key, partial(self._losses, phase))
        before = trainer.paused_s
        with trainer.pause():
            trainer.window = filter_.next(window, step, min(config.every, phase.stop - step))
        seconds = trainer.paused_s - before
        trainer.scoring_s += seconds
        if trainer.world.is_main:
            self._write({"phase": phase.name, "seconds": round(seconds, 3), **trainer.window.plain()})
        taken, seen = len(trainer.window.rows), trainer.window.cursor - window.cursor
        above = f"losses above {trainer.window.threshold:.3f}"
        trainer.log(f"online filter {trainer.window.generation}: {taken:,} rows of {seen:,} new ones, {above}")

    def _write(self, window: dict[str, Any]) -> None:
        try:
            append_json_line(self.trainer.directory.online, window)
        except OSError as error:  # like the metrics: a full disk must not end the run
            self.trainer.log(f"online.jsonl: {error.strerror}")

    def _losses(self, phase: Phase, ordinals: Sequence[int]) -> Any:
        trainer = self.trainer
        loader = trainer.loaders[phase.name]

        def take(start: int, stop: int) -> Batch:
            return loader.samples(ordinals[start:stop])

        found = row_losses(trainer.engine.placed, take, len(ordinals), phase.micro_batch_size)
        return found.cpu().numpy()


class LoggingCallback(Callback):
    """Reads the tensors, writes a line, and refuses to go on from what is no number."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        config, world = trainer.config, trainer.world
        self.throughput = Throughput(config.model, world.device, world.size)
        self.writer: MetricsWriter | None = None
        if world.is_main:
            shown = plain(replace(config, launch={}))  # its environment may hold secrets
            self.writer = MetricsWriter(trainer.directory.metrics, config.logging, shown, trainer.log)
        earlier = list(read_lines(trainer.directory.metrics)) if trainer.directory.metrics.exists() else []
        steps = [line for line in earlier if "loss" in line]
        self.last_loss: float | None = steps[-1]["loss"] if steps else None
        self.last_rate: float = steps[-1]["tokens_per_second"] if steps else 0.0
        self._clock, self._paused, self._tokens = time.perf_counter(), trainer.paused_s, trainer.tokens
        self._begin, self._logged, self._scoring = (self._clock, trainer.step), trainer.step, trainer.scoring_s

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        trainer = self.trainer
        if steps % trainer.config.logging.every and steps != trainer.steps:
            return
        refuse_nonsense(metrics, steps)
        self.last_loss = metrics.loss.item()
        slow = trainer.stragglers.read()
        now = time.perf_counter()
        seconds = now - self._clock - (trainer.paused_s - self._paused)
        self.throughput.add(seconds, metrics.tokens - self._tokens)
        line, self._logged = self._line(steps, metrics), steps
        if trainer.config.online.every:
            line["scoring_share"] = round((trainer.scoring_s - self._scoring) / max(now - self._clock, 1e-9), 4)
        self._clock, self._paused, self._tokens = now, trainer.paused_s, metrics.tokens
        self._scoring = trainer.scoring_s
        if slow:
            line["slow_ranks"] = [vars(one) for one in slow]
        trainer.log(self._text(line, now))
        for one in slow:
            times = f"{one.times_the_median:.1f} times the ranks' median"
            trainer.log(f"rank {one.rank} on {one.host} is slow: {one.kind} take {times}")
        if self.writer is not None:
            self.writer.write(line)
            trainer.stragglers.note(slow, steps, trainer.directory.logs / SLOW_HOSTS)

    def close(self) -> None:
        """After the last line: evaluation at the end still writes one."""
        if self.writer is not None:
            self.writer.close()

    def _line(self, steps: int, metrics: StepMetrics) -> dict[str, Any]:
        trainer = self.trainer
        phase = trainer.phase(steps - 1)
        rate, mfu = self.throughput.read(phase.seq_len)
        line: dict[str, Any] = {
            "step": steps,
            "tokens": metrics.tokens,
            "loss": self.last_loss,
            "learning_rate": metrics.learning_rate,
            "gradient_norm": metrics.gradient_norm.item(),
            "tokens_per_second": round(rate, 1),
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(trainer.world.device),
            **trainer.consumption.read(),
        }
        if traffic := trainer.meshes.traffic.take():
            done = steps - self._logged
            line["collective_bytes"] = {f"{axis}/{why}": size // done for (axis, why), size in traffic.items()}
        if metrics.balance:
            line["router_z"] = [round(z, 6) for z in metrics.balance["z"].tolist()]
            line["router_entropy"] = [round(e, 6) for e in metrics.balance["entropy"].tolist()]
            line["aux_loss"] = [round(a, 6) for a in metrics.balance["aux"].tolist()]
            line["expert_load"] = expert_load(metrics.balance["counts"])
        return line

    def _text(self, line: dict[str, Any], now: float) -> str:
        steps, total = line["step"], self.trainer.steps
        begin, first = self._begin
        left = (now - begin) / max(1, steps - first) * (total - steps)
        parts = [
            f"step {steps:>{len(str(total))}}/{total}",
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.2e}",
            f"|g| {line['gradient_norm']:.3f}",
            f"{line['tokens_per_second']:,.0f} tok/s",
        ]
        if line["mfu"] is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if "expert_load" in line:
            busiest = max(layer["max_over_mean"] for layer in line["expert_load"])
            dead = sum(layer["dead"] for layer in line["expert_load"])
            parts.append(f"busiest expert {busiest:.1f}x" + (f", {dead} dead" if dead else ""))
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)


class EvaluationCallback(Callback):
    """Held-out loss every so often and at the end."""

    result: HeldOut | None = None

    def __init__(self, trainer: Trainer, logging: LoggingCallback) -> None:
        super().__init__(trainer)
        self.logging = logging

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        every = self.trainer.config.evaluation.every
        if every and steps % every == 0 and steps != self.trainer.steps:
            self.measure()

    def at_end(self) -> None:
        self.measure()

    def measure(self) -> None:
        trainer = self.trainer
        phase = trainer.phase(max(0, trainer.step - 1))
        loader, rows = trainer.loaders[phase.name], trainer.config.evaluation.sequences
        with trainer.pause():
            if not any(loader.num_held_out(name) for name in trainer.weights):
                trainer.log("no held-out rows at this context: no held-out loss")
                return
            bytes_V = torch.from_numpy(trainer.corpus.tokenizer.token_bytes())
            placed = trainer.engine.placed
            self.result = held_out_loss(placed, loader, bytes_V, rows, phase.micro_batch_size, trainer.weights)
        if self.logging.writer is not None:
            sources = {name: vars(found) for name, found in self.result.sources.items()}
            line = {"step": trainer.step, "tokens": trainer.tokens, "heldout_loss": self.result.loss}
            self.logging.writer.write({**line, "heldout": sources})
        parts = [f"{name} {found.loss:.3f}" for name, found in self.result.sources.items()]
        trainer.log(
            f"held-out loss {self.result.loss:.4f} nats/token, {self.result.bits_per_byte:.3f} bits/byte"
            f" ({', '.join(parts)})"
        )


class CheckpointCallback(Callback):
    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        every = self.trainer.config.checkpoint.every
        if every and steps % every == 0 and steps != self.trainer.steps:
            with self.trainer.pause():
                self.trainer.save()

    def at_end(self) -> None:
        if self.trainer.step and not self.trainer.checkpointer.has(self.trainer.step):
            self.trainer.save()
        self.trainer.checkpointer.wait()


class ProfilerCallback(Callback):
    """A trace of chosen steps for chrome://tracing or Perfetto and a table of operators by memory; on a GPU, if asked
    for, PyTorch's memory snapshot for pytorch.org/memory_viz. One file set per step, from rank 0.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.directory = trainer.directory.path / "profile"
        self.cuda = trainer.world.device.type == "cuda"
        if trainer.config.profile.memory and not self.cuda:
            raise ConfigError("profile.memory", True, "memory snapshots need a GPU; the trace has CPU memory", [False])
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        if not self.trainer.world.is_main or step not in self.trainer.config.profile.steps:
            return
        self.directory.mkdir(exist_ok=True)
        if self.trainer.config.profile.memory:
            torch.cuda.memory._record_memory_history()
        self._profiler = torch.profiler.profile(profile_memory=True, record_shapes=True)
        self._profiler.start()

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        if self._profiler is None:
            return
        wait_for(self.trainer.world.device)
        self._profiler.stop()
        base = str(self.directory / f"step-{steps - 1:08d}")
        self._profiler.export_chrome_trace(f"{base}.trace.json")
        order = "self_cuda_memory_usage" if self.cuda else "self_cpu_memory_usage"
        Path(f"{base}.memory.txt").write_text(self._profiler.key_averages().table(sort_by=order, row_limit=40))
        if self.trainer.config.profile.memory:
            torch.cuda.memory._dump_snapshot(f"{base}.snapshot.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None


class SummaryCallback(Callback):
    """The closing figures, in summary.json and in the terminal."""

    def __init__(self, trainer: Trainer, logging: LoggingCallback, evaluation: EvaluationCallback) -> None:
        super().__init__(trainer)
        self.logging, self.evaluation = logging, evaluation

    def at_end(self) -> None:
        trainer = self.trainer
        if trainer.world.is_main:
            summary = self.summary()
            write_json(trainer.directory.summary, summary)
        self.logging.close()

    def summary(self) -> dict[str, Any]:
        trainer, config = self.trainer, self.trainer.config
        parameters, held_out = count_parameters(config.model), self.evaluation.result
        flops = training_flops(config.model, trainer.phases[-1].seq_len)
        summary: dict[str, Any] = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "train_loss": self.logging.last_loss,
            "heldout_loss": held_out.loss if held_out else None,
            "unigram_loss": None,
            "bigram_loss": None,
            "tokens_per_second": round(self.logging.throughput.mean or self.logging.last_rate, 1),
            "peak_memory_bytes": peak_memory_bytes(trainer.world.device),
            "total_parameters": parameters.total,
            "active_parameters": parameters.active,
            "flops_per_token": flops.total,
            "world_size": trainer.world.size,
            "layout": trainer.meshes.layout.axes,
            "static_bytes": vars(self._static_bytes()),
            "heldout": held_out.plain() if held_out else None,
            "corpus": trainer.corpus.fingerprint,
        }
        if config.evaluation.baselines and held_out:
            summary |= self._baselines(list(held_out.sources))
        return summary

    def _static_bytes(self) -> StaticBytes:
        """What rank 0 keeps from step to step."""
        config, layout = self.trainer.config, self.trainer.meshes.layout
        moments = config.optimizer.moments_dtype(config.precision)
        muon = config.optimizer.kind is OptimizerKind.muon
        return static_bytes(config.model, config.precision, layout, moments, muon=muon)

    def _baselines(self, sources: list[str]) -> dict[str, Any]:
        """Unigram and bigram models of the very tokens consumed, on the very held-out tokens of the model."""
        trainer = self.trainer
        baseline = NgramBaseline(trainer.config.model.vocab_size)
        for step in range(trainer.step):
            phase = trainer.phase(step)
            batch = trainer.loaders[phase.name].batch(step - phase.start)
            baseline.add(batch.tokens_BT, batch.labels_BT)
        phase = trainer.phase(trainer.step - 1)
        loader, rows = trainer.loaders[phase.name], trainer.config.evaluation.sequences
        held_out = {s: list(held_out_batches(loader, s, rows, phase.micro_batch_size)) for s in sources}
        found = baseline.evaluate(held_out, {s: trainer.weights[s] for s in sources})
        trainer.log(
            f"unigram {found['unigram_loss']:.4f} (add {found['unigram_constant']:g}), "
            f"bigram {found['bigram_loss']:.4f} (smoothed by {found['bigram_constant']:g})"
        )
        return found


class Report(Callback):
    """The run's page. What cannot be drawn is said in a line: the run is done all the same."""

    def at_end(self) -> None:
        trainer = self.trainer
        if not trainer.world.is_main:
            return
        from train.report.run import PAGE, write_report  # matplotlib takes a second to import

        try:
            write_report([trainer.directory.path], trainer.directory.path / PAGE)
        except (LeviathanError, OSError, ValueError) as error:
            trainer.log(f"no report: {error}")


class RunName(Callback):
    """The last line names the run."""

    def at_end(self) -> None:
        self.trainer.log(f"run: {self.trainer.directory.path}")
