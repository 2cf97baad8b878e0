"""Find out properties of this machine, for the doctor and to start ranks."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.memory import available_memory

PER_CORE, PROCESS_BYTES = 4, 400 * 2**20
"""Most processes per core, and the memory of a process that has imported torch."""
FEW_FILES = 1024
"""Linux's usual limit of open files. With a lower limit, data loaders and many connections fail."""
DRIVER = Path("/proc/driver/nvidia/version")
NUMA_NODES = Path("/sys/devices/system/node")
NUMACTL = "numactl is not installed"


def cores() -> int:
    """Return the number of CPU cores that this process may use; a container or `taskset` may restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(key: str, count: int, oversubscribe: bool) -> None:
    """Raise `ConfigError` for more processes than this machine can run, unless the user insists (`oversubscribe`).

    The limit is `PER_CORE` processes a core, and `PROCESS_BYTES` of memory for each.
    """
    most = max(1, min(PER_CORE * cores(), available_memory() // PROCESS_BYTES))
    if count > most and not oversubscribe:
        gib = available_memory() / 2**30
        reason = f"this machine has {cores()} cores and {gib:.0f} GiB of free memory: use at most {most}"
        owner = key.rpartition(".")[0]
        insist = f"{owner}.oversubscribe" if owner else "oversubscribe"
        raise ConfigError(key, count, f"{reason}, or set {insist}=true as well")


def not_bound() -> str:
    """Return why ranks are not bound to the NUMA nodes of their GPUs, or an empty text if they are."""
    import torch

    if len(list(NUMA_NODES.glob("node[0-9]*"))) < 2:
        return "this machine has one NUMA node"
    if not torch.cuda.is_available():
        return "it has no GPU"
    return "" if shutil.which("numactl") else NUMACTL  # torch needs it


def driver(path: Path = DRIVER) -> str | None:
    """Return the version of NVIDIA's kernel module, or None if it is not loaded."""
    found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def free_space(folder: Path) -> dict[str, Any]:
    """Return `free_bytes` of a folder, and whether it is `writable`. For a missing folder, use its nearest parent."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return {"free_bytes": shutil.disk_usage(existing).free, "writable": os.access(existing, os.W_OK)}
