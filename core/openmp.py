"""Set how OpenMP threads wait for each other. Must run before torch is imported."""

from __future__ import annotations

import os

SPIN_COUNT = "1000"
"""Rounds a waiting thread spins before it sleeps. The default spins for milliseconds and blocks the core for other
processes. Smoke run on two cores, tokens per second: 7,900 alone with either; beside a second smoke run 1,900 by
default, 3,100 with this.
"""


def share_cores() -> None:
    """Shorten the spinning, unless the environment sets a policy."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
