"""What the files of a run say while it trains."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from core.errors import ConfigError, LeviathanError, printable
from core.files import check_regular, read_json
from launch.watch.curve import MetricCurve
from launch.watch.tail import Tail
from model.config import FeedForward
from train.config import Phase, TrainConfig, phases
from train.report.files import is_number
from train.report.run import SPIKE, UNEVEN
from train.run_directory import DIVERGED, load_config

METRICS = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "peak_memory_bytes")
LEDGER = "recovery.jsonl"
KEPT_LOADS, KEPT_EVENTS, MOST_LAYERS = 512, 100, 1024
"""Logged steps with loads, events of the ledger, and MoE layers that are kept in memory."""
LOG_BYTES = 16 << 10
"""Bytes at the end of log.txt that are read."""
SILENT_S, SILENT_INTERVALS = 60.0, 5
"""A run is silent if it has written nothing for this many seconds and this many intervals between logged steps."""
T = TypeVar("T")


class RunState(Enum):
    missing = "no such directory yet"
    starting = "no step logged yet"
    running = "running"
    silent = "silent"
    finished = "finished"
    diverged = "diverged"


class LoggedLoad(NamedTuple):
    """The load of each MoE layer at a logged step: largest over mean, and number of experts without a token."""

    step: int
    max_over_mean: list[float]
    dead: list[int]


class CachedFile(Generic[T]):
    """The content of a file, read again when the file changes. `missing`: the content without a readable file."""

    def __init__(self, path: Path, read: Callable[[Path], T], missing: T) -> None:
        self.path, self.read, self.missing, self.content = path, read, missing, missing
        self.problem, self._seen = "", (0, 0, 0)

    def poll(self) -> T:
        try:
            status = self.path.stat()
            seen = status.st_ino, status.st_size, status.st_mtime_ns
            if seen != self._seen:
                self._seen, self.problem = seen, ""
                self.content = self.read(self.path)
        except (OSError, ValueError, LeviathanError) as error:
            is_gone = isinstance(error, FileNotFoundError)
            self.content = self.missing
            self.problem = "" if is_gone else str(error).removeprefix(f"{self.path}: ")
        return self.content


class WatchedRun:
    """The newest state of one run. `poll` reads what is new; everything else is kept in bounded memory.

    Raises `ConfigError` for a path that exists and is not the directory of a run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, printable(directory.resolve().name)
        check_run_directory(directory)
        self.metrics, self.ledger = Tail(directory / "metrics.jsonl"), Tail(directory / LEDGER)
        self._config = CachedFile[TrainConfig | None](directory / "config.yaml", lambda _: load_config(directory), None)
        self._summary = CachedFile[dict[str, Any]](
            directory / "summary.json", lambda path: read_json(path, {"steps": int}), {}
        )
        self._diverged = CachedFile(directory / DIVERGED, lambda path: read_json(path, {"step": int}), None)
        self._log = CachedFile[list[str]](directory / "log.txt", _last_lines, [])
        self.phases: list[Phase] = []
        self.layers: list[int] = []
        """Indices of the MoE layers in the model; empty: unknown."""
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._begin()

    def _begin(self) -> None:
        """Forget the metrics."""
        self.curves = {key: MetricCurve() for key in METRICS}
        self.held_out = MetricCurve()
        self.loads: deque[LoggedLoad] = deque(maxlen=KEPT_LOADS)
        self.last: dict[str, Any] = {}
        """The newest line of a step."""
        self.jump = ""
        """A sentence about the newest jump of the loss."""
        self._losses: deque[float] = deque(maxlen=10)
        self._usual = math.inf
        """Median of the losses before the newest jump; infinite: the loss has come back."""
        self._intervals: deque[tuple[float, int]] = deque(maxlen=20)
        """Seconds and steps between two logged steps."""

    def poll(self) -> None:
        """Read what is new. Repeat while `behind` is positive."""
        config = self._config.poll()
        if config is not None:
            self.phases = phases(config)
            blocks = enumerate(config.model.blocks)
            self.layers = [index for index, block in blocks if block.feed_forward is FeedForward.moe]
        for cached in (self._summary, self._diverged, self._log):
            cached.poll()
        lines = self.metrics.poll()
        if self.metrics.restarted:
            self._begin()
        for line in lines:
            self._add(line)
        events = self.ledger.poll()
        if self.ledger.restarted:
            self.events.clear()
        self.events.extend(events)

    def _add(self, line: dict[str, Any]) -> None:
        step = line.get("step")
        if not isinstance(step, int) or not is_number(step) or step < 0:
            self.metrics.damaged += 1
        elif "loss" in line:
            self._add_step(step, line)
        elif "heldout_loss" in line:
            self.held_out.add(step, number(line["heldout_loss"]))

    def _add_step(self, step: int, line: dict[str, Any]) -> None:
        if step <= self.step:  # a resume or a rewind
            self._losses.clear()
            self.jump, self._usual = "", math.inf
            while self.loads and self.loads[-1].step >= step:
                self.loads.pop()
            while self.held_out.points and self.held_out.points[-1].first >= step:
                self.held_out.points.pop()
        loss, tokens = number(line["loss"]), number(line.get("tokens"))
        self._note_jump(step, loss)
        if math.isfinite(loss):
            self._losses.append(loss)
        steps, trained = step - self.step, tokens - number(self.last.get("tokens", 0))
        rate = number(line.get("tokens_per_second"))
        if steps > 0 and trained > 0 and rate > 0:
            self._intervals.append((trained / rate, steps))
        for key in METRICS:
            self.curves[key].add(step, number(line.get(key)))
        if loads := _loads(line.get("expert_load")):
            self.loads.append(LoggedLoad(step, *loads))
        self.last = line

    def _note_jump(self, step: int, loss: float) -> None:
        if math.isfinite(self._usual) and loss <= self._usual + SPIKE:
            self.jump, self._usual = f"{self.jump}, and was back at step {step:,}", math.inf
        elif len(self._losses) == 10 and loss > (usual := statistics.median(self._losses)) + SPIKE:
            self._usual = min(self._usual, usual)
            self.jump = f"the loss jumped from about {self._usual:.2f} to {loss:.2f} at step {step:,}"

    @property
    def step(self) -> int:
        """Number of the newest logged step, counted from 1."""
        return self.last.get("step", 0)

    @property
    def steps(self) -> int | None:
        """Number of steps of the whole run. None if its configuration cannot be read."""
        return self.phases[-1].stop if self.phases else None

    @property
    def behind(self) -> int:
        """Bytes that are written and not read yet."""
        return self.metrics.behind + self.ledger.behind

    @property
    def left_s(self) -> float | None:
        """Seconds left at the speed of the last logged steps, without evaluations and saving. None if unknown."""
        current = next((phase for phase in self.phases if phase.stop > self.step), None)
        if current is None or not self._intervals or self.state is RunState.diverged:
            return None
        size = current.global_batch_size * current.seq_len
        left = sum(
            (phase.stop - max(self.step, phase.start)) * phase.global_batch_size * phase.seq_len / size
            for phase in self.phases
            if phase.stop > self.step
        )
        seconds, steps = map(sum, zip(*self._intervals, strict=True))
        return left * seconds / steps

    @property
    def quiet_s(self) -> float:
        """Seconds since the run wrote a line of metrics or of its log; 0 if it has written none."""
        written = []
        for path in (self.metrics.path, self._log.path):
            try:
                written.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(0.0, time.time() - max(written)) if written else 0.0

    @property
    def state(self) -> RunState:
        if not self.directory.is_dir():
            return RunState.missing
        diverged, summary = self._diverged.content, self._summary.content
        if diverged is not None and diverged["step"] >= self.step - 1:
            return RunState.diverged
        if self.step and summary.get("steps") == (self.step if self.steps is None else self.steps):
            return RunState.finished
        interval = max((seconds for seconds, _ in self._intervals), default=0.0)
        if self.quiet_s > max(SILENT_S, SILENT_INTERVALS * interval):
            return RunState.silent
        return RunState.running if self.step else RunState.starting

    @property
    def log(self) -> list[str]:
        """The last lines of log.txt."""
        return self._log.content

    @property
    def slow_ranks(self) -> list[str]:
        found = self.last.get("slow_ranks")
        parts = [one for one in found[:KEPT_EVENTS] if isinstance(one, dict)] if isinstance(found, list) else []
        return [
            f"rank {one.get('rank')} on {one.get('host')} is slow: {one.get('kind')} take "
            f"{one.get('times_the_median')} times the ranks' median"
            for one in parts
        ]

    def alarms(self) -> list[str]:
        """Return a sentence for each thing that needs attention now."""
        found = []
        if self.state is RunState.diverged:
            reason = (self._diverged.content or {}).get("reason", "the loss or gradient norm is NaN or infinite")
            found.append(f"diverged: {reason}")
        elif self.step and not math.isfinite(self.curves["loss"].value):
            found.append(f"the loss at step {self.step:,} is NaN or infinite")
        found += self.slow_ranks
        if self.jump:
            found.append(self.jump)
        found += self._uneven()
        for tail in (self.metrics, self.ledger):
            if tail.problem:
                found.append(f"{tail.path.name} cannot be read: {tail.problem}")
            elif tail.damaged:
                found.append(f"{tail.path.name}: damaged lines ignored: {tail.damaged:,}")
        cached = (self._config, self._summary, self._diverged, self._log)
        return found + [f"{one.path.name} cannot be read: {one.problem}" for one in cached if one.problem]

    def _uneven(self) -> list[str]:
        if not self.loads:
            return []
        newest = self.loads[-1]
        dead = {self.layer(place): count for place, count in enumerate(newest.dead) if count}
        found = []
        if dead:
            layer, count = max(dead.items(), key=lambda item: item[1])
            where = f"layer {layer}" if len(dead) == 1 else f"{len(dead)} layers, most in layer {layer}"
            found.append(f"experts without a token: {count} in {where}")
        worst = max(range(len(newest.max_over_mean)), key=lambda place: newest.max_over_mean[place])
        if (load := newest.max_over_mean[worst]) > UNEVEN:
            found.append(f"layer {self.layer(worst)}: the busiest expert gets {load:.1f} times the mean")
        return found

    def layer(self, place: int) -> int:
        """Return the index in the model of the MoE layer at a place in the metrics."""
        return self.layers[place] if place < len(self.layers) else place


def check_run_directory(directory: Path) -> None:
    """Raise `ConfigError` if a path exists and is not a run's directory, or if the folder around it does not exist."""
    key, shown = "runs", str(directory)
    if directory.is_dir():
        try:
            files = os.listdir(directory)
        except OSError as error:
            raise ConfigError(key, shown, f"cannot be read: {error.strerror}") from None
        visible = [name for name in files if not name.startswith(".")]
        if visible and not {"config.yaml", "metrics.jsonl", "checkpoints", "logs"} & set(visible):
            inside = sorted(path.parent for path in directory.glob("*/config.yaml"))[-3:]
            raise ConfigError(
                key, shown, "is not a run's directory: it has no config.yaml and no metrics.jsonl", inside
            )
    elif os.path.lexists(directory):
        raise ConfigError(key, shown, "is a file, but must be a run's directory")
    elif not directory.parent.is_dir():
        raise ConfigError(key, shown, f"no such directory, and {directory.parent} does not exist either")


def number(value: Any) -> float:
    """Return a number of a metric, NaN for anything else."""
    return float(value) if is_number(value) else math.nan


def _loads(value: Any) -> tuple[list[float], list[int]] | None:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS:
        return None
    if not all(isinstance(one, dict) and is_number(one.get("max_over_mean")) for one in value):
        return None
    dead = [one.get("dead") for one in value]
    return [float(one["max_over_mean"]) for one in value], [int(x) if is_number(x) else 0 for x in dead]


def _last_lines(path: Path) -> list[str]:
    check_regular(path)
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
        return file.read(LOG_BYTES).decode(errors="replace").splitlines()[-50:]
