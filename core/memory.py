"""The host's memory: what this process may still allocate, and copies of it to a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_VERSION_2 = ("memory.max", "memory.current")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that can be allocated without swapping, within the limits of control groups (cgroup v1, v2)."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: use the installed memory
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *_allowances(root)]))


def upload(x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Copy a tensor to a device without waiting for it: to a GPU, through pinned memory. Returns `x` itself if it is on
    the device already, or if there is none.
    """
    if device is None or x.device == device:
        return x
    return (pinned(x, device) if x.device.type == "cpu" else x).to(device, non_blocking=True)


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy in memory that a GPU reads on its own; for other devices, `x` itself."""
    return x.pin_memory() if device.type == "cuda" else x


def _allowances(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group that contains this process; all of these limits apply."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (mount / "memory", _VERSION_1) if controllers else (mount, _VERSION_2)
        group = top / path.lstrip("/")
        for place in (group, *group.parents):  # in a container, the path may be the host's: only the top exists
            files = [place / name for name in names]
            if all(file.is_file() for file in files):
                limit, used = (file.read_text().strip() for file in files)
                if limit != "max":
                    yield int(limit) - int(used) + _reclaimable(place / "memory.stat")
            if place == top:
                break


def _reclaimable(statistics: Path) -> int:
    """Return the bytes of cached files, which count as used but are freed when memory is needed."""
    try:
        lines = [line.split() for line in statistics.read_text().splitlines()]
        return next((int(value) for name, value in lines if name == "inactive_file"), 0)
    except OSError:
        return 0
