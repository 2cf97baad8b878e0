"""What keeps the ranks of a run in step, with reasons: a step is as slow as its slowest rank."""

from __future__ import annotations

from core.library_settings import SETTINGS, shown
from launch.diagnose.machine import NUMACTL, not_bound
from train.engine.garbage import COLLECT_EVERY

_FAR = "a core reaches memory and GPUs of another NUMA node more slowly"


def settings() -> dict[str, dict[str, str]]:
    """Return the value of each setting on this machine and its reason."""
    why_not = not_bound()
    every, bound = f"collected on all ranks after every {COLLECT_EVERY} steps", "ranks run on the cores near their GPU"
    found = {
        "Python's garbage": {"value": every, "reason": "else each rank pauses at another step, and all others wait"},
        "NUMA": {"value": f"ranks are not bound to cores: {why_not}" if why_not else bound, "reason": _FAR},
    }
    for name, one in zip(("OpenMP", "CUDA allocator", "NCCL"), SETTINGS, strict=True):
        found[name] = {"value": shown(one), "reason": one.reason}
    return found


def advice() -> list[str]:
    """Return what would bind ranks to NUMA nodes, if anything is missing."""
    return [f"{NUMACTL}, so ranks are not bound to NUMA nodes: {_FAR}"] if not_bound() == NUMACTL else []
