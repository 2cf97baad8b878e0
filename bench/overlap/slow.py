"""A network and work that take a fixed time, so that a measurement of overlap does not depend on the machine's load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor


class Delayed(dist.Work):
    """A collective that completes at `due`. The process that waits for it is free until then."""

    def __init__(self, work: Any, due: float) -> None:
        super().__init__()
        self.work, self.due = work, due

    def wait(self, timeout: Any = None) -> bool:
        if self.work is not None:
            self.work.wait()
        time.sleep(max(0.0, self.due - time.monotonic()))
        return True


@contextmanager
def network(delay_s: float, at_least: int, *collectives: str) -> Iterator[None]:
    """Make each call of `collectives`, names in torch.distributed, complete `delay_s` after it began, or after the one
    before it completed. Tensors of fewer than `at_least` elements, such as counts, are not delayed.
    """
    free = [0.0]

    def delayed(honest: Callable[..., Any], *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        work = honest(*arguments, async_op=async_op, **options)
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        if max(tensor.numel() for tensor in tensors) < at_least:
            return work
        free[0] = max(time.monotonic(), free[0]) + delay_s
        found = Delayed(work, free[0])
        return found if async_op else found.wait() and None

    replaced: dict[str, Any] = {name: _bound(delayed, getattr(dist, name)) for name in collectives}
    with patch.multiple(dist, **replaced):
        yield


def _bound(function: Callable[..., Any], honest: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: function(honest, *arguments, **options)


def taking(function: Callable[..., Tensor], forward_s: float) -> Callable[..., Tensor]:
    """Make a function take `forward_s` longer, and its backward pass twice as much, as those of a matmul."""
    return lambda *arguments: _Taking.apply(function(*arguments), forward_s)


class _Taking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grads[0], None
