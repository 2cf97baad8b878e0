"""Metrics of a run and where they are written: the terminal, log.txt, metrics.jsonl, wandb, TensorBoard, Prometheus.

Metrics stay tensors on the device until a step is logged, so that other steps do not wait for the device.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import Diverged
from core.files import append_json_line, append_text
from core.process import say
from model.config import ModelConfig
from model.flops import Lengths, peak_flops, training_flops, vision_flops
from model.roles import Role
from train.config import LoggingConfig, Wandb
from train.engine.base import StepResult
from train.report.prometheus import PrometheusFile


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepResult):
    """A step's result. `tokens`: number of tokens trained on so far. `finite`: whether every loss and gradient norm so
    far was finite, a bool still on the device.
    """

    learning_rate: float
    tokens: int
    finite: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars to log under their names."""

    def check_finite(self, steps: int) -> None:
        """Raise `Diverged` if a loss or gradient norm is NaN or infinite: all later steps and checkpoints would be
        useless.
        """
        if self.finite.item():
            return
        figures = {"loss": self.loss.item(), "gradient norm": self.gradient_norm.item()}
        wrong = [f"the {name} after step {steps} is {x}" for name, x in figures.items() if not math.isfinite(x)]
        what = wrong[0] if wrong else f"a loss or a gradient norm before step {steps} was NaN or infinite"
        raise Diverged(f"{what}: start a new run (run.name) with a lower optimizer.lr")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def expert_load(counts_LE: Tensor) -> list[dict[str, float]]:
    """Return per MoE layer: largest load over the mean, load entropy over its maximum, and number of idle experts."""
    rows = []
    for counts_E in counts_LE.double().cpu():
        share = counts_E / counts_E.sum().clamp_min(1)
        entropy = -(share * share.clamp_min(1e-30).log()).sum() / math.log(len(share))
        rows.append(
            {
                "max_over_mean": round(float(share.max() * len(share)), 4),
                "entropy": round(float(entropy), 4),
                "dead": int((counts_E == 0).sum()),
            }
        )
    return rows


def expert_overlap(images_LE: Tensor, text_LE: Tensor) -> list[float]:
    """Return per MoE layer which fraction of the slots images and text have in common: 1 if both spread over the
    experts alike, 0 if no expert gets tokens of both.
    """
    shares = [counts.double() / counts.sum(1, keepdim=True).clamp_min(1) for counts in (images_LE.cpu(), text_LE.cpu())]
    return [round(float(value), 4) for value in torch.minimum(*shares).sum(1)]


class Log:
    """Writes lines to the terminal and to log.txt. Without a path (on ranks other than 0) it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, line: str) -> None:
        if self.path is None:
            return
        say(line)
        try:
            append_text(self.path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except OSError as error:  # a full disk must not end the run
            print(f"log.txt: {os.strerror(error.errno or 0)}", file=sys.stderr)


class Throughput:
    """Measures tokens per second and MFU, of an interval and of the run. `frozen`: roles without gradients."""

    def __init__(
        self, model: ModelConfig, device: torch.device, world_size: int, frozen: AbstractSet[Role] = frozenset()
    ) -> None:
        self.model, self.frozen = model, frozen
        peak = peak_flops(device)
        self.peak = None if peak is None else peak * world_size
        self.seconds = self.tokens = 0.0

    def read(self, seconds: float, tokens: int, lengths: Lengths, tiles: int = 0) -> tuple[float, float | None]:
        """Return tokens per second and MFU of an interval in which `tiles` tiles were encoded. `lengths`: those of its
        documents. `seconds` exclude pauses for evaluation and saving.
        """
        self.seconds += seconds
        self.tokens += tokens
        rate, encoded = tokens / max(seconds, 1e-9), tiles / max(seconds, 1e-9)
        flops = rate * self._decoder(lengths) + encoded * self._encoder
        return rate, None if self.peak is None else flops / self.peak

    def encoder_share(self, tokens: int, lengths: Lengths, tiles: int) -> float:
        """Return the fraction of the FLOPs of `tokens` tokens and `tiles` tiles that the vision encoder takes."""
        encoder = tiles * self._encoder
        return encoder / max(tokens * self._decoder(lengths) + encoder, 1.0)

    def _decoder(self, lengths: Lengths) -> float:
        return training_flops(self.model, lengths, self.frozen).total

    @property
    def _encoder(self) -> float:
        """FLOPs per tile."""
        vision = self.model.vision
        return 0.0 if vision is None else vision_flops(vision, self.model.hidden_size, self.frozen).total

    @property
    def mean(self) -> float:
        """Tokens per second of the run since this process started."""
        return self.tokens / max(self.seconds, 1e-9)


def append_or_log(path: Path, line: dict[str, Any], log: Log) -> None:
    """Append a JSON line; a failure (a full disk) is logged and does not end the run."""
    try:
        append_json_line(path, line)
    except OSError as error:
        log(f"{path.name}: {os.strerror(error.errno or 0)}; a line of it is lost")


class MetricsWriter:
    """Appends to metrics.jsonl and, if configured, to wandb and TensorBoard's event files, and replaces the file for
    Prometheus. Rank 0 only.

    `step`: number of steps done. Lines of later steps, from before a resume, are void.
    """

    def __init__(self, path: Path, config: LoggingConfig, run_config: dict[str, Any], log: Log, step: int) -> None:
        self.path, self.log = path, log
        self.wandb = _wandb(config, path.parent, run_config)
        self.tensorboard = _tensorboard(path.parent / "tensorboard", step) if config.tensorboard else None
        self.prometheus = _prometheus(config, path.parent.name, log)

    def write(self, line: dict[str, Any]) -> None:
        append_or_log(self.path, line, self.log)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        if self.tensorboard is not None:
            self._try_tensorboard(partial(_write_scalars, self.tensorboard, line))
        if self.prometheus is not None:
            self.prometheus.write(scalars(line), line.get("slow_ranks", []) if "loss" in line else None)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self._try_tensorboard(self.tensorboard.close)

    def _try_tensorboard(self, call: Callable[[], None]) -> None:
        """Call a function; a failure (a full disk) is logged, ends the event file and does not end the run."""
        try:
            call()
        except OSError as error:
            self.log(f"tensorboard: {os.strerror(error.errno or 0)}; it gets no further lines")
            self.tensorboard = None


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a line of metrics, each with its path of keys and positions, such as `router_z/0`."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from scalars(part, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _write_scalars(writer: Any, line: dict[str, Any]) -> None:
    for name, value in scalars(line):
        if name != "step":
            writer.add_scalar(name, value, line["step"])
    writer.flush()  # a killed run keeps its lines, and a reader sees them at once


def _prometheus(config: LoggingConfig, run: str, log: Log) -> PrometheusFile | None:
    return None if config.prometheus is None else PrometheusFile(Path(config.prometheus).expanduser(), run, log)


def _tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1)  # readers drop what a killed attempt wrote from there on


def _wandb(config: LoggingConfig, directory: Path, run_config: dict[str, Any]) -> Any:
    if config.wandb is Wandb.disabled:
        return None
    import wandb

    online = config.wandb is Wandb.online or (config.wandb is Wandb.auto and bool(os.environ.get("WANDB_API_KEY")))
    return wandb.init(
        project=config.project,
        name=directory.name,
        dir=str(directory),
        config=run_config,
        mode="online" if online else "offline",
        settings=wandb.Settings(silent=True),
    )
