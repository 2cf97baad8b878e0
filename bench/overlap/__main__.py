"""Measure how much of a slow network hides behind other work: `python -m bench.overlap [--json FILE]`.

Two gloo ranks run an MoE layer whose exchanges of tokens each complete a fixed time after they began. Its shared expert
takes a fixed time too, so that the load of the machine does not matter. A step should take no longer than the longer of
both in each pass. (Half of the exchange is in the forward pass, but a third of the work. So a step is longer than both
if they take equally long.) `waiting` is the same step with synchronous exchanges. The last rows are dense layers under
FSDP2, whose gathers take a fixed time; they are only reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.overlap.steps import GATHERS, Times, gather_seconds, moe_seconds
from core.files import write_json
from launch.rank_pool import Pool
from parallel.layout import Recompute

LIMIT = 1.1
RANKS = 2
CASES: dict[str, tuple[float, float, int, Recompute]] = {
    "exchange twice the shared expert": (2.0, 1.0, 1, Recompute.none),
    "shared expert twice the exchange": (1.0, 2.0, 1, Recompute.none),
    "equal": (1.0, 1.0, 1, Recompute.none),
    "top-2, exchange twice the shared expert": (2.0, 1.0, 2, Recompute.none),
    "recomputed, exchange twice the shared expert": (2.0, 1.0, 1, Recompute.full),
}
"""Exchange and shared expert in units of `SECONDS`, top-k, and recomputation."""
SECONDS = 1.0


def measure(ranks: Any, name: str, unit_s: float = SECONDS) -> Times:
    """Measure one of `CASES`. `ranks`: a pool of ranks."""
    exchange, shared, top_k, recompute = CASES[name]
    # exchanges and part of the work of each pass; a recomputed layer does not send results back
    passes = [(2, 1 / 3), (2, 2 / 3)] if recompute is Recompute.none else [(2, 1 / 4), (1, 1 / 4), (2, 1 / 2)]
    network_s, work_s = unit_s * exchange, unit_s * shared
    delay_s = network_s / sum(count for count, _ in passes)
    run = partial(_fastest, ranks, moe_seconds, delay_s, work_s, top_k, recompute)
    least_s = sum(max(delay_s * count, work_s * part) for count, part in passes)
    return Times(network_s, work_s, least_s, step_s=run(False), waiting_s=run(True))


def _fastest(ranks: Any, function: Callable[..., list[float]], *arguments: Any) -> float:
    """Return the seconds of the fastest step, each on its slowest rank."""
    return min(map(max, zip(*ranks(RANKS, function, *arguments), strict=True)))


def gathers(ranks: Any, unit_s: float = 4 * SECONDS) -> dict[str, float]:
    """Measure FSDP2's gathers, which take half as long as the layers. The ratio is the step over the layers."""
    delay_s = unit_s / 2 / GATHERS
    found = {"network_s": unit_s / 2, "work_s": unit_s}
    for name, ahead in (("step_s", True), ("waiting_s", False)):
        found[name] = _fastest(ranks, gather_seconds, delay_s, unit_s, ahead)
    return found | {"ratio": found["step_s"] / unit_s, "waiting_ratio": found["waiting_s"] / unit_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the times to")
    arguments = parser.parse_args()
    ranks, found = Pool(), {}
    try:
        for name in CASES:
            times = measure(ranks, name)
            found[name] = asdict(times) | {"ratio": times.ratio, "waiting_ratio": times.waiting_ratio}
            print(
                f"{name}: {times.ratio:.2f} of the longer part of each pass, {times.waiting_ratio:.2f} if waiting",
                flush=True,
            )
        found["gathers"] = gathers(ranks)
        ratio, waiting = (found["gathers"][name] for name in ("ratio", "waiting_ratio"))
        print(f"FSDP2's gathers, half as long as dense layers: {ratio:.2f} of the layers, {waiting:.2f} if waiting")
    finally:
        ranks.close()
    if arguments.json:
        write_json(arguments.json, found)
    return 0 if all(found[name]["ratio"] <= LIMIT for name in CASES) else 1


if __name__ == "__main__":
    raise SystemExit(main())
