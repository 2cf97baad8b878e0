"""Time functions on a device with CUDA events: warm up, overwrite the L2 cache, run the sides in turn, take medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Side = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """`each`: milliseconds of each repetition. `spread`: half the interquartile range over the median."""

    each: list[float]

    @property
    def ms(self) -> float:
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        if len(self.each) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.each, n=4)
        return (high - low) / 2 / self.ms

    def over(self, other: Timing) -> float:
        """Return the median over repetitions of this side's time divided by the other's."""
        return statistics.median(a / b for a, b in zip(self.each, other.each, strict=True))


class Clock:
    """`budget_s`: approximate seconds per side. A side is repeated 5 to 50 times, or twice in a dry run."""

    def __init__(self, device: torch.device, dry: bool, budget_s: float = 0.2) -> None:
        self.device, self.dry, self.budget_s = device, dry, budget_s
        # five times the L2 cache of an H200; zeroing it also keeps the device busy while the host launches the kernels
        self.flushed = torch.empty(0 if dry else 256 << 20, dtype=torch.int8, device=device)

    def time(self, side: Side) -> Timing:
        return self.turns([side])[0]

    def turns(self, sides: Sequence[Side]) -> list[Timing]:
        """Time the sides in turn, A B B A A B ..., so that a drift of the clock rate affects all alike."""
        for _ in range(1 if self.dry else 3):
            for side in sides:
                side()
        once_s = sum(self._once(side) for side in sides) / 1e3
        rounds = 2 if self.dry else min(max(int(self.budget_s * len(sides) / max(once_s, 1e-6)), 5), 50)
        times: list[list[float]] = [[] for _ in sides]
        for round_ in range(rounds):
            order = range(len(sides)) if round_ % 2 else reversed(range(len(sides)))
            for i in order:
                times[i].append(self._once(sides[i]))
        return [Timing(each) for each in times]

    def _once(self, side: Side) -> float:
        self.flushed.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            side()
            return (time.perf_counter() - begin) * 1e3
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        side()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of `wanted`, or inf if a value is not finite."""
    if not wanted.numel():
        return 0.0
    found, wanted = found.float(), wanted.float()
    return float(((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).nan_to_num(nan=torch.inf))
