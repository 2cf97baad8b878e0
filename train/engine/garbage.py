"""Collect cyclic garbage at set steps, so that all ranks pause at the same time.

By itself Python collects once it has made enough objects, which is at a different step on each rank; the others wait.
Of a thousand ranks nearly always one would be collecting. A step leaves some hundred objects in cycles, and no tensor,
so nothing is lost by collecting rarely.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY = 100
"""Steps between two collections."""


@contextmanager
def collected_at_set_steps() -> Iterator[Callable[[int], None]]:
    """Disable automatic collection in the block. Yield a function to call after each step with the number of steps
    done: it collects objects that were made since the last collection.
    """

    def after_step(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect(1)  # not those of generation 2: modules and weights, half a second's work

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield after_step
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def collected_automatically() -> Iterator[None]:
    """Let Python collect in the block, as in evaluations, which may take long and keep their own data."""
    was_enabled = gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if not was_enabled:
            gc.disable()
