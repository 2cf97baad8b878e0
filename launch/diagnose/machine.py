"""What one machine has: asked by `leviathan doctor`, alone or as a node of a job, and where ranks are started."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

FEW_FILES = 1024
"""Linux's usual limit of open files. Where it is lower, loaders and many connections run into it."""
DRIVER = Path("/proc/driver/nvidia/version")


def cores() -> int:
    """Those that this process may use, which a container or `taskset` makes fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver(path: Path = DRIVER) -> str | None:
    """Version of NVIDIA's kernel module, None where there is none."""
    found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def room(folder: Path) -> tuple[int, bool]:
    """Free bytes where the folder is or would be made, and whether we may write there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
