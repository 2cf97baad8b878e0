"""Write a line to the log and to metrics.jsonl every `logging.every` steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from core.config import plain
from core.errors import ConfigError
from model.load_balance import RouterSums
from train.callbacks.base import Callback, TrainingRun
from train.contrastive.towers import costs_like
from train.metrics import MetricsWriter, StepMetrics, Throughput, expert_load, expert_overlap, peak_memory_bytes
from train.run_directory import read_lines, read_prediction
from train.stragglers import SLOW_HOSTS


class LoggingCallback(Callback):
    """Writes a line with the step's metrics. Raises `Diverged` if the loss or gradient norm is NaN or infinite."""

    only_reports = True

    def __init__(self, trainer: TrainingRun) -> None:
        super().__init__(trainer)
        config, world = trainer.config, trainer.world
        self.throughput = Throughput(costs_like(config), world.device, world.size, config.training.frozen)
        self.writer: MetricsWriter | None = None
        self.last_loss: float | None = None
        self.last_rate = 0.0
        self.planned: float | None = None

    def before_training(self) -> None:
        trainer = self.trainer
        if trainer.world.is_main:
            shown = plain(replace(trainer.config, launch={}))  # `launch` may hold secrets in environment variables
            settings = trainer.config.logging
            self.writer = MetricsWriter(trainer.directory.metrics, settings, shown, trainer.log, trainer.step)
        if steps := list(read_lines(trainer.directory.metrics, {"loss": float, "tokens_per_second": float})):
            self.last_loss, self.last_rate = steps[-1]["loss"], steps[-1]["tokens_per_second"]
        if trainer.world.is_main and (planned := read_prediction(trainer.directory.prediction)):
            self.planned = planned["tokens_per_second"]
        self._start()

    def after_rewind(self) -> None:
        self.trainer.meshes.traffic.take()
        self.trainer.batches.read(self.trainer.world.device)
        self._start()

    def _start(self) -> None:
        """Measure from here on."""
        trainer = self.trainer
        self._clock, self._paused, self._tokens = time.perf_counter(), trainer.paused_s, trainer.tokens
        self._begin, self._logged = (self._clock, trainer.step), trainer.step

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        trainer = self.trainer
        if steps % trainer.config.logging.every and steps != trainer.steps:
            return
        metrics.check_finite(steps)
        self.last_loss = metrics.loss.item()
        slow = trainer.stragglers.read(trainer.batches.waited_s)
        now = time.perf_counter()
        seconds = now - self._clock - (trainer.paused_s - self._paused)
        line, self._logged = self._line(steps, metrics, seconds), steps
        self._clock, self._paused, self._tokens = now, trainer.paused_s, metrics.tokens
        extra = {name: value.item() for name, value in metrics.extra.items()}
        for callback in trainer.callbacks:
            for name, value in callback.metrics().items():
                if name in line or name in extra:
                    raise ConfigError("callbacks", callback.key, f"metrics() returns {name}, which is taken; rename it")
                extra[name] = float(value)
        if slow:
            line["slow_ranks"] = [vars(one) for one in slow]
        trainer.log(self._text(line, extra, now))
        for one in slow:
            times = f"{one.times_the_median:.1f} times the ranks' median"
            trainer.log(f"rank {one.rank} on {one.host} is slow: {one.kind} take {times}")
        if self.writer is not None:
            self.writer.write(line | extra)
            trainer.stragglers.note(slow, steps, trainer.directory.logs / SLOW_HOSTS)

    def _line(self, steps: int, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        trainer = self.trainer
        tokens, data = metrics.tokens - self._tokens, trainer.batches.read(trainer.world.device)
        lengths = trainer.batches.lengths
        if "tiles" in data:
            data["tiles_per_second"] = round(data["tiles"] / max(seconds, 1e-9), 2)
            data["encoder_flops_share"] = round(self.throughput.encoder_share(tokens, lengths, data["tiles"]), 4)
        rate, mfu = self.throughput.read(seconds, tokens, lengths, data.get("tiles", 0))
        line: dict[str, Any] = {
            "step": steps,
            "tokens": metrics.tokens,
            "loss": self.last_loss,
            "learning_rate": metrics.learning_rate,
            "gradient_norm": metrics.gradient_norm.item(),
            "tokens_per_second": round(rate, 1),
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(trainer.world.device),
            **data,
        }
        if traffic := trainer.meshes.traffic.take():
            done = steps - self._logged
            line["collective_bytes"] = {f"{axis}/{why}": size // done for (axis, why), size in traffic.items()}
        if metrics.balance:
            for name in RouterSums._fields:
                key = "aux_loss" if name == "aux" else f"router_{name}"
                line[key] = [round(value, 6) for value in metrics.balance[name].tolist()]
            line["expert_load"] = expert_load(metrics.balance["counts"])
        return line | _by_modality(metrics)

    def _text(self, line: dict[str, Any], extra: dict[str, float], now: float) -> str:
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
        if self.planned is not None:
            parts[-1] += f" (planned {self.planned:,.0f})"
        if line["mfu"] is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if "expert_load" in line:
            busiest = max(layer["max_over_mean"] for layer in line["expert_load"])
            dead = sum(layer["dead"] for layer in line["expert_load"])
            parts.append(f"busiest expert {busiest:.1f}x" + (f", {dead} dead" if dead else ""))
        parts += [f"{name} {value:.4g}" for name, value in extra.items()]
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)


def _by_modality(metrics: StepMetrics) -> dict[str, Any]:
    """Return the step's losses of documents with and without images, and the experts' loads of image and text tokens.
    Metrics that the step does not have are omitted.
    """
    line: dict[str, Any] = {}
    losses = {name: loss.item() for name, loss in metrics.modality_losses.items()}
    if losses := {name: loss for name, loss in losses.items() if not math.isnan(loss)}:
        line["loss_by_modality"] = losses
    images = metrics.balance.get("image_counts")
    if images is not None and images.any():
        text = metrics.balance["counts"] - images
        line["expert_load_by_modality"] = {"images": expert_load(images), "text": expert_load(text)}
        line["expert_overlap"] = expert_overlap(images, text)
    return line
