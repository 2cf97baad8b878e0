"""Detect ranks that are consistently slower than the others.

In every step all ranks wait for the slowest one, so step times are the same on every rank. Therefore compare the times
of two things that a rank does alone: a few matmuls on its device, and waiting for its part of the batch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.exit_codes import host_name
from core.files import append_json_line
from parallel.comm.world import World, wait_for

SLOW = 1.5
"""A rank is slow if its time exceeds the median of all ranks by more than this factor."""
STEADY = 3
"""Number of consecutive slow readings after which a rank is reported."""
LEAST_S = 2e-3
"""Time in seconds up to which a reading counts as noise, not as slow."""
SLOW_HOSTS = "slow.jsonl"
"""Name of the file that `Stragglers.note` writes into a run's logs."""
KINDS = ("matmuls", "batches")


@dataclass(frozen=True)
class SlowRank:
    rank: int
    kind: str
    times_the_median: float
    host: str = ""


class Stragglers:
    """Compares the ranks' times and counts each rank's consecutive slow readings."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._slow: dict[tuple[int, int], int] = {}
        self._hosts: list[Any] = []
        self._noted: list[str] | None = None
        size = 2048 if world.device.type == "cuda" else 192
        self._a, self._b = (torch.ones(size, size, device=world.device) for _ in range(2))

    def read(self, loading_s: float) -> list[SlowRank]:
        """Return the ranks that were slow in the last `STEADY` readings, this one included. All ranks return the same.

        `loading_s`: seconds that this rank has waited for its batches since the last reading.
        """
        if self.world.size == 1:
            return []
        own = torch.tensor([self.probe(), loading_s], dtype=torch.float64, device=self.world.device)
        all_ranks = [torch.empty_like(own) for _ in range(self.world.size)]
        self.world.heartbeat.begin("world", "slow ranks")
        dist.all_gather(all_ranks, own)
        found = self.judge(torch.stack(all_ranks).tolist())
        if found and not self._hosts:  # true on all ranks or on none
            self._hosts = [None] * self.world.size
            dist.all_gather_object(self._hosts, host_name())
        return [replace(one, host=self._hosts[one.rank]) for one in found]

    def note(self, slow: list[SlowRank], step: int, path: Path) -> None:
        """Append a line to `path` if the slow hosts differ from those of the last call. The launcher may exclude these
        hosts at a restart. The line of the first call supersedes the hosts of an earlier attempt.
        """
        hosts = sorted({one.host for one in slow})
        if hosts != self._noted and (hosts or path.exists()):
            self._noted = hosts
            path.parent.mkdir(parents=True, exist_ok=True)
            append_json_line(path, {"time": time.time(), "step": step, "hosts": hosts})

    def probe(self) -> float:
        """Time a few matmuls, in seconds. Return the shortest of four times, because the system may interrupt a try."""
        best = float("inf")
        for _ in range(4):
            begin = time.perf_counter()
            for _ in range(4):
                torch.mm(self._a, self._b)
            wait_for(self.world.device)
            best = min(best, time.perf_counter() - begin)
        return best

    def judge(self, seconds: list[list[float]]) -> list[SlowRank]:
        """Update the counts and return the ranks to report. `seconds`: a list per rank, with an entry per kind."""
        found = []
        for kind, name in enumerate(KINDS):
            values = [rank[kind] for rank in seconds]
            median = sorted(values)[(len(values) - 1) // 2]
            for rank, value in enumerate(values):
                slow = value > max(SLOW * median, LEAST_S)
                self._slow[rank, kind] = self._slow.get((rank, kind), 0) + 1 if slow else 0
                if self._slow[rank, kind] >= STEADY:
                    found.append(SlowRank(rank, name, round(value / max(median, 1e-9), 2)))
        return found
