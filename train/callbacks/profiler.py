"""Write a profiler trace, and optionally a memory snapshot, of each step in `profile.steps`."""

from __future__ import annotations

from pathlib import Path

import torch

from core.errors import ConfigError
from parallel.comm.world import wait_for
from train.callbacks.base import Callback, TrainingRun
from train.metrics import StepMetrics


class ProfilerCallback(Callback):
    """For each step in `profile.steps`, rank 0 writes a trace for chrome://tracing or Perfetto and a table of operators
    sorted by memory. With `profile.memory` on a GPU, it also writes a snapshot for pytorch.org/memory_viz.
    """

    only_reports = True

    def __init__(self, trainer: TrainingRun) -> None:
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
