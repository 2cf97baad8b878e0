"""Measure what start-up, a hang and a checkpoint's plan cost with up to 16,384 ranks, in one process.

    python -m bench.scale [--json FILE]

Process groups are made as on GPUs, but on the fake backend, and the store counts requests to it. Values are
by world size:

- `setup_s`: seconds to join, make the meshes of pp16 x tp8 x ep64 (without tp8 in the small world), and agree.
- `communicators`: those of a rank; the world's and the one on the host are among them.
- `store_requests_start`: requests of a rank until its first step. To those counted on the fake group, the bench adds
  two for each rank that this rank talks to in the lazy gloo group (measured in `tests/parallel/comm`).
- `store_requests_hang`: requests of the busiest rank, the judge, from the first suspicion of a hang to its report.
- `checkpoint_plan_s`: seconds to verify new plans of 2,300 tensors a rank: the work of one rank and of rank 0.
- `checkpoint_replan_s`: the same at the next save, with the files of all ranks committed by rank 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg

from core.files import write_json
from parallel.comm import tree
from parallel.comm.groups import ProcessGroups
from parallel.comm.heartbeat import Heartbeat
from parallel.comm.watchdog import CHUNK, Watchdog
from parallel.comm.world import World
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from train.checkpoint.index import commit_parts
from train.checkpoint.plan import PlanReport, plan_of, verify
from train.checkpoint.state import TensorShard

WORLDS = {
    128: ParallelConfig(pp=2, ep=64),
    1024: ParallelConfig(pp=16, tp=8, ep=64),
    8192: ParallelConfig(pp=16, tp=8, ep=64),
    16384: ParallelConfig(pp=16, tp=8, ep=64),
}
PLANS = (128, 1024)
TENSORS, SHARDS = 2300, 64
"""Tensors of a rank in a checkpoint, and the number of ranks that share one."""
LIMIT_S = 2.0


class CountingStore(dist.Store):
    """A store in memory that counts requests. Those that torch makes of a prefixed store arrive here too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.requests = dist.HashStore(), Counter[str]()

    def _forward(self, name: str, *arguments: Any) -> Any:
        answer = getattr(self.inner, name)(*arguments)
        self.requests[name] += 1
        return answer

    def set(self, key: str, value: Any) -> None:
        self._forward("set", key, value)

    def get(self, key: str) -> bytes:
        return self._forward("get", key)

    def add(self, key: str, amount: int) -> int:
        return self._forward("add", key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._forward("check", keys)

    def wait(self, *arguments: Any) -> None:
        self._forward("wait", *arguments)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._forward("multi_get", keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._forward("compare_set", key, expected, desired)


class Ending(Watchdog):
    """A watchdog that leaves the process alive."""

    def _end(self, line: str) -> None:
        self.line = line
        self._stopped.set()


def start(size: int, config: ParallelConfig) -> tuple[float, int, int]:
    """Return the seconds, the communicators and the store's requests of rank 0 until its first step."""
    store = CountingStore()
    begin = time.perf_counter()
    dist.init_process_group("fake", rank=0, world_size=size, store=store)
    try:
        world = World(0, size, torch.device("cpu"), groups=ProcessGroups(from_split=True))
        with patch.object(dist, "split_group", _split):
            make_meshes(config.resolve(size), world)
        world.groups.host()
        world.agree({"configuration": "equal"})
        world.limit(300.0)
        seconds = time.perf_counter() - begin
        peers = len(tree.children(0, size))
        return seconds, world.groups.communicators, store.requests.total() + 2 * peers
    finally:
        dist.destroy_process_group()


def _split(
    parent: object, rows: list[list[int]], timeout: timedelta, group_desc: str | None
) -> dist.ProcessGroup | None:
    """Stand in for the split of NCCL's communicator, which sends nothing through the store."""
    own = next((row for row in rows if 0 in row), None)
    return dist.new_group(own, timeout, use_local_synchronization=True, group_desc=group_desc) if own else None


def hang(size: int, folder: Path) -> int:
    """Return the requests of the judge if all ranks have begun the same collective and it completes on none."""
    store, heartbeat = CountingStore(), Heartbeat(step=7)
    heartbeat.begin("world", "norm")
    waits = [json.dumps({**heartbeat.status(beat), "waits_s": 2 * LIMIT_S}) for beat in (1, 2)]
    keys = [f"heartbeat/{rank}" for rank in range(1, size)]
    for key in keys:
        store.inner.set(key, waits[0])
    one = Ending(heartbeat, store, 0, size, LIMIT_S, folder)
    while store.requests["multi_get"] < -(-size // CHUNK):
        time.sleep(0.001)
    for key in keys:
        store.inner.set(key, waits[1])
    while not one._stopped.is_set():
        time.sleep(0.01)
    one.stop()
    assert f"all {size} ranks wait" in one.line, one.line
    return store.requests.total()


def checkpoint(ranks: int, folder: Path) -> tuple[float, float]:
    """Return the seconds that the plans of a first save cost one rank and rank 0 together, and those of the second."""
    folder.mkdir()
    shards, begin = _shards(0), time.perf_counter()
    plan = plan_of(shards)
    own = plan.report
    of_rank_s = time.perf_counter() - begin
    reports = [own, *(plan_of(_shards(rank)).report for rank in range(1, ranks))]
    first_s = of_rank_s + _timed(lambda: _verified(reports))
    assert not verify(reports[:-1]), "control: a rank's shards are missing"
    entry = {"bytes": 1 << 30, "xxh3_128": "0" * 32}
    parts = [{f"rank_{rank}.bin": {"bytes": 1 << 30}, f"rank_{rank}.json": entry} for rank in range(ranks)]
    again_s = _timed(lambda: plan_of(shards, plan)) + _timed(lambda: commit_parts(folder, parts, {"step": 1}))
    return first_s, again_s


def _verified(reports: list[PlanReport]) -> None:
    assert verify(reports)


def _shards(rank: int) -> list[TensorShard]:
    """Return the shards of a rank that shares each of its tensors with the next ranks, as FSDP2 does."""
    stage, place = divmod(rank, SHARDS)
    part = torch.empty(64, 4096, device="meta")
    whole, offset = (64 * SHARDS, 4096), (64 * place, 0)
    return [TensorShard(f"model.layers.{stage}.{number}.weight", part, whole, offset) for number in range(TENSORS)]


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(worlds: dict[int, ParallelConfig], plans: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Return each value by world size."""
    starts = {size: start(size, config) for size, config in worlds.items()}
    with tempfile.TemporaryDirectory() as name:
        hangs = {size: hang(size, Path(name)) for size in worlds}
        saves = {ranks: checkpoint(ranks, Path(name) / str(ranks)) for ranks in plans}
    return {
        "setup_s": {size: round(one[0], 3) for size, one in starts.items()},
        "communicators": {size: one[1] for size, one in starts.items()},
        "store_requests_start": {size: one[2] for size, one in starts.items()},
        "store_requests_hang": dict(hangs),
        "checkpoint_plan_s": {ranks: round(one[0], 4) for ranks, one in saves.items()},
        "checkpoint_replan_s": {ranks: round(one[1], 4) for ranks, one in saves.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description="Measure costs of thousands of ranks.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the values to a file")
    chosen = parser.parse_args()
    found = measure(WORLDS, PLANS)
    for key, values in found.items():
        print(f"{key:<22}" + "".join(f"{size:>8}: {value:<8}" for size, value in values.items()))
    if chosen.json is not None:
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()
