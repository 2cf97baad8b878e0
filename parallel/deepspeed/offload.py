"""Optimizer state off the device: in host memory, or in memory-mapped files that are updated a chunk at a time.

Files are unlinked as soon as they are mapped, so nothing is left behind however the process ends. Their space is
reserved first, so a full disk is an error at the start and not a signal in the middle of a step. Updated chunks are
written, and then dropped from the memory of the process and from the page cache. (DeepSpeed's own file interface
reports success on a full disk, and writes nothing if a size is not a multiple of its block.)
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from core.errors import ConfigError

CHUNK = 1 << 22
"""Number of elements that are updated at a time."""


def on_host(buffer: Tensor) -> Tensor:
    """Return a copy in host memory, which is pinned if there is a GPU."""
    return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=torch.cuda.is_available()).copy_(buffer)


class MappedFile:
    """A flat fp32 tensor backed by a file in `folder`. Raises `ConfigError` if the disk is full or not writable."""

    def __init__(self, folder: Path, elements: int) -> None:
        self.size = max(4 * elements, mmap.PAGESIZE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix="leviathan-", suffix=".state")
        except OSError as error:
            raise ConfigError("parallel.zero.nvme", str(folder), f"cannot be written: {error.strerror}") from None
        try:
            os.posix_fallocate(handle, 0, self.size)
            self._map = mmap.mmap(handle, self.size)
        except OSError as error:
            os.close(handle)
            reason = f"has no space for {self.size:,} bytes of optimizer state: {error.strerror}"
            raise ConfigError("parallel.zero.nvme", str(folder), reason) from None
        finally:
            os.unlink(name)
        self._handle = handle
        weakref.finalize(self, os.close, handle)
        self.tensor = torch.frombuffer(self._map, dtype=torch.float32, count=elements)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read elements [start, stop)."""
        if start < stop:
            begin, length = self._pages(start, stop)
            self._map.madvise(mmap.MADV_WILLNEED, begin, length)

    def release(self, start: int, stop: int) -> None:
        """Write elements [start, stop) to disk and free their memory."""
        if start < stop:
            begin, length = self._pages(start, stop)
            self._map.flush(begin, length)
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)
            os.posix_fadvise(self._handle, begin, length, os.POSIX_FADV_DONTNEED)

    def _pages(self, start: int, stop: int) -> tuple[int, int]:
        begin = 4 * start // mmap.PAGESIZE * mmap.PAGESIZE
        return begin, min(-(-4 * stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.size) - begin


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2). `page` moves its flat parameters and moments to mapped files.
    Gradients must be in host memory.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.files: dict[Tensor, tuple[MappedFile, ...]] = {}

    @torch.no_grad()
    def page(self, folder: Path) -> None:
        """Move the parameters to files and create their moments there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                files = tuple(MappedFile(folder, parameter.numel()) for _ in range(3))
                files[0].tensor.copy_(parameter)
                parameter.data = files[0].tensor
                self.files[parameter] = files
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": files[1].tensor,
                    "exp_avg_sq": files[2].tensor,
                }
                for file in files:
                    file.release(0, parameter.numel())

    def release(self) -> None:
        """Write all parameters and moments to disk and free their memory."""
        for parameter, files in self.files.items():
            for file in files:
                file.release(0, parameter.numel())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        files, state, size = self.files[parameter], self.state[parameter], parameter.numel()
        for file in files:
            file.prefetch(0, min(CHUNK, size))
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            for file in files:
                file.prefetch(stop, min(stop + CHUNK, size))
            weight, first, second = (file.tensor[start:stop] for file in files)
            beta1, beta2 = group["betas"]
            adamw(
                [weight],
                [gradient[start:stop]],
                [first],
                [second],
                [],
                [state["step"].clone()],  # a copy: `adamw` must not count chunks as steps
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for file in files:
                file.release(start, stop)
        state["step"] += 1
