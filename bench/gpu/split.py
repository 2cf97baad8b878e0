"""Divide the time of a piece of work into classes of kernels, by the names that torch.profiler reports.

    python -m bench.gpu.split runs/NAME/profile/*.trace.json

prints the milliseconds of each class in traces that `profile.steps` of a run on a GPU wrote.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class KernelClass(Enum):
    """Classes of kernels. `elementwise`: everything that moves memory, such as norms, sorting and copies. `host`: the
    time in which the GPU runs nothing, because it waits for the host.
    """

    attention = "attention"
    communication = "communication"
    products = "products"
    elementwise = "elementwise"
    host = "host"


PATTERNS = {
    KernelClass.communication: r"nccl|c10d|deep_?ep|allreduce|all_?gather|reduce_scatter|all_?to_?all",
    KernelClass.attention: r"flash|fmha|attention|attn|sdpa|_mha_|softmax_lse|flex",
    KernelClass.products: r"gemm|nvjet|xmma|cutlass|cublas|matmul|splitk|gemv|\b(add)?mm\b|\bbmm\b|_mm\b",
}
"""What the names of kernels contain, tried in this order; the others are elementwise. The order matters: names of flash
attention contain types of CUTLASS. On a CPU, names are those of operators.
"""
Span = tuple[str, float, float]
"""Name, begin and end in milliseconds."""


@cache
def class_of(name: str) -> KernelClass:
    lowered = name.lower()
    found = (kind for kind, pattern in PATTERNS.items() if re.search(pattern, lowered))
    return next(found, KernelClass.elementwise)


def divided(spans: Iterable[Span], wall_ms: float) -> dict[KernelClass, float]:
    """Return milliseconds by class. `host` is the part of the wall time in which no kernel ran. Kernels that overlap
    count in full, so with communication on a stream of its own the sum may exceed the wall time.
    """
    found = dict.fromkeys(KernelClass, 0.0)
    busy = reached = 0.0
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        found[class_of(name)] += end - begin
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    found[KernelClass.host] = max(wall_ms - busy, 0.0)
    return found


def observed(work: Callable[[], object], device: torch.device) -> tuple[list[Span], float]:
    """Run `work` once under the profiler. Return its kernels, and the wall time in milliseconds. On a CPU, operators
    take the place of kernels, each without those that it calls.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall_ms = (time.perf_counter() - begin) * 1e3
    kind, spans = DeviceType.CUDA if on_gpu else DeviceType.CPU, list[Span]()
    for event in profiler.events():
        if event.device_type == kind and not event.is_user_annotation and (on_gpu or event.name.startswith("aten::")):
            start = event.time_range.start / 1e3
            spans.append(
                (event.name, start, event.time_range.end / 1e3 if on_gpu else start + event.self_cpu_time_total / 1e3)
            )
    return spans, wall_ms


def launched(spans: Sequence[Span]) -> int:
    """Return the number of kernels, copies and fills that the GPU ran. Copies from and to the host are not counted."""
    return sum("HtoD" not in name and "DtoH" not in name for name, _, _ in spans)


def of_trace(path: Path) -> tuple[list[Span], float]:
    """Return the kernels of a trace in Chrome's format, and the milliseconds from its first event to its last."""
    events = [one for one in json.loads(path.read_text())["traceEvents"] if one.get("ph") == "X" and one.get("dur")]
    spans = [(one["name"], one["ts"] / 1e3, (one["ts"] + one["dur"]) / 1e3) for one in events if _on_gpu(one)]
    ends = [one["ts"] + one["dur"] for one in events]
    return spans, (max(ends) - min(one["ts"] for one in events)) / 1e3 if events else 0.0


def _on_gpu(event: dict[str, Any]) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        spans, wall_ms = of_trace(path)
        print(f"{path}: {wall_ms:.1f} ms, {launched(spans)} launches")
        for kind, ms in divided(spans, wall_ms).items():
            print(f"  {kind.value:<14} {ms:10.2f} ms  {ms / max(wall_ms, 1e-9):6.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
