"""How OpenMP's threads wait for each other. Must be said before torch is imported."""

from __future__ import annotations

import os

SPIN_COUNT = "1000"
"""Rounds a waiting thread spins before it sleeps. The default spins for milliseconds and keeps the core from whoever
else needs it. The smoke run on two cores, tokens per second: default 7,900 alone and 1,900 beside a second such run;
with this 7,900 and 3,100.
"""


def share_cores() -> None:
    """Let waiting threads sleep soon, unless the environment says otherwise."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
