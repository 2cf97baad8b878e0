"""A metric by step in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

LIMIT = 2048
"""Number of points that a curve keeps. At this number neighbours are merged in pairs."""


class CurvePoint(NamedTuple):
    """The lowest and highest value that was logged in the steps from `first` to `last`."""

    first: int
    last: int
    low: float
    high: float


class MetricCurve:
    """The values of one metric. `value`: the newest, which may be NaN; NaN is not drawn.

    A step that is added again, as after a resume or a rewind, removes the points from there on.
    """

    def __init__(self) -> None:
        self.points: list[CurvePoint] = []
        self.value = math.nan
        self._per_point, self._in_last = 1, 0

    def add(self, step: int, value: float) -> None:
        while self.points and self.points[-1].first >= step:
            self.points.pop()
            self._in_last = self._per_point
        self.value = value
        if not math.isfinite(value):
            return
        if self.points and self._in_last < self._per_point:
            first, _, low, high = self.points[-1]
            self.points[-1] = CurvePoint(first, step, min(low, value), max(high, value))
            self._in_last += 1
            return
        if len(self.points) == LIMIT:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [CurvePoint(a.first, b.last, min(a.low, b.low), max(a.high, b.high)) for a, b in pairs]
            self._per_point *= 2
        self.points.append(CurvePoint(step, step, value, value))
        self._in_last = 1

    def since(self, step: float) -> Iterator[CurvePoint]:
        """Yield the points that end at `step` or later."""
        return (point for point in self.points if point.last >= step)
