"""Check the nodes of a job: `python -m launch.diagnose.nodes CONFIG FOLDER` on every rank.

Each rank measures its own machine. All ranks time a small all-reduce over each axis of the layout, and neighbours along
an axis time their link. FOLDER/findings.json lists slow and faulty nodes. launch/slurm/job_step.py reads the exit code.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.exit_codes import has_agent, host_name
from core.files import is_local, open_raw, write_json
from core.process import ending_with_parent
from launch.diagnose.links import MESSAGE_BYTES, SLOW, Link, distinct, measure, seconds_of, slow_links
from launch.diagnose.machine import FEW_FILES, driver, free_space
from launch.slurm.job_step import FAILED_NODE
from parallel.comm.world import World, connect
from parallel.mesh import MeshAxis, make_meshes
from train.config import TrainConfig
from train.run_directory import RunDirectory, read_config

DISK_BYTES = 32 << 20
MAX_SKEW_S = 1.0
TIMEOUT_S = 60.0
VERSIONS = ("python", "torch", "device", "driver")
"""Fields that must be equal on all nodes."""
usual_rate = statistics.median_high  # the larger of two rates, so that one slow node of two is noticed


@dataclass(frozen=True)
class NodeReading:
    """Measurements by one rank. Rates are per second. `bandwidth`: all-reduce rate by axis, in bytes of a rank's own
    tensor. `links`: by axis, the next rank and the rate of an exchange with it, per direction.
    """

    rank: int
    node: str
    python: str
    torch: str
    device: str
    driver: str
    """Version of NVIDIA's kernel module, or "none"."""
    products_flops: float
    bandwidth: dict[str, float]
    links: dict[str, tuple[int, float]]
    disk_bytes_per_second: float | None
    """None if the checkpoint directory cannot be written."""
    disk_free_bytes: int | None
    shared_memory_free_bytes: int | None
    open_files: int
    clock_s: float
    """The time by this machine's clock, right after a barrier."""


def read(config: TrainConfig, world: World) -> NodeReading:
    """Measure this machine and time each axis of the configured layout."""
    axes = make_meshes(config.parallel.resolve(world.size), world).joined
    bandwidth = {axis.name: _bandwidth(axis, world.device) for axis in axes}
    links = {axis.name: link for axis in distinct(axes) if (link := measure(axis, world)) is not None}
    folder = RunDirectory.of(config).checkpoints
    shared = Path("/dev/shm")
    if world.size > 1:
        dist.barrier()
    clock = time.time()
    return NodeReading(
        rank=world.rank,
        node=host_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        driver=driver() or "none",
        products_flops=_products(world.device),
        bandwidth=bandwidth,
        links=links,
        disk_bytes_per_second=_disk(folder, world.rank),
        disk_free_bytes=free_space(folder)["free_bytes"] if is_local(folder) else None,
        shared_memory_free_bytes=shutil.disk_usage(shared).free if shared.exists() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock_s=clock,
    )


def judge(readings: list[NodeReading]) -> dict[str, list[str]]:
    """Return the faults of each faulty node."""
    found: dict[str, list[str]] = {}

    def blame(reading: NodeReading, what: str) -> None:
        found.setdefault(reading.node, []).append(f"rank {reading.rank}: {what}")

    flops = usual_rate(reading.products_flops for reading in readings)
    clock = statistics.median(reading.clock_s for reading in readings)
    disks = [reading.disk_bytes_per_second for reading in readings if reading.disk_bytes_per_second]
    disk = usual_rate(disks) if disks else 0.0
    usual = {key: statistics.mode(getattr(reading, key) for reading in readings) for key in VERSIONS}
    for reading in readings:
        if reading.products_flops < SLOW * flops:
            blame(reading, f"matmuls at {reading.products_flops / flops:.0%} of the others' rate")
        if reading.disk_bytes_per_second is None:
            blame(reading, "cannot write the checkpoint directory")
        elif reading.disk_bytes_per_second < SLOW / 5 * disk:
            blame(reading, f"disk at {reading.disk_bytes_per_second / disk:.0%} of the others' rate")
        if abs(reading.clock_s - clock) > MAX_SKEW_S:
            blame(reading, f"clock is off by {reading.clock_s - clock:+.1f} s")
        if reading.open_files < FEW_FILES:
            blame(reading, f"limit of only {reading.open_files} open files")
        for key, value in usual.items():
            if getattr(reading, key) != value:
                blame(reading, f"has {key} {getattr(reading, key)}, the others {value}")
    for axis in sorted({axis for reading in readings for axis in reading.bandwidth}):
        rates = [reading.bandwidth[axis] for reading in readings if axis in reading.bandwidth]
        for reading in readings:
            if reading.bandwidth.get(axis, float("inf")) < SLOW * usual_rate(rates):
                share = reading.bandwidth[axis] / usual_rate(rates)
                blame(reading, f"its group of axis {axis} at {share:.0%} of the others' bandwidth")
    for node, rank, what in slow_links(links(readings)):
        found.setdefault(node, []).append(f"rank {rank}: {what}")
    return found


def links(readings: list[NodeReading]) -> list[Link]:
    """Return every timed link, with the nodes at its ends."""
    nodes = {reading.rank: reading.node for reading in readings}
    return [
        Link(axis, reading.rank, reading.node, peer, nodes[peer], rate)
        for reading in readings
        for axis, (peer, rate) in reading.links.items()
    ]


def table(readings: list[NodeReading], faults: dict[str, list[str]]) -> str:
    """Return a line per node, the bandwidth of each axis and link, and the faults."""
    lines = [f"{'node':<16} {'ranks':>5} {'TFLOP/s':>9} {'disk MB/s':>10} {'free GiB':>9}  torch, device, driver"]
    for node in sorted({reading.node for reading in readings}):
        own = [reading for reading in readings if reading.node == node]
        flops, disk = min(r.products_flops for r in own) / 1e12, min((r.disk_bytes_per_second or 0) for r in own) / 1e6
        free = own[0].disk_free_bytes
        size = "" if free is None else f"{free / 2**30:.1f}"
        versions = f"{own[0].torch}, {own[0].device}, {own[0].driver}"
        lines.append(f"{node:<16} {len(own):>5} {flops:>9.3f} {disk:>10.0f} {size:>9}  {versions}")
    for axis in dict.fromkeys(axis for reading in readings for axis in reading.bandwidth):
        rates = [reading.bandwidth[axis] / 1e9 for reading in readings if axis in reading.bandwidth]
        lines.append(f"axis {axis:<11} {min(rates):.2f} to {max(rates):.2f} GB/s all-reduce")
    timed = links(readings)
    for axis, within in dict.fromkeys(link.kind for link in timed):
        rates = [link.bytes_per_second / 1e9 for link in timed if link.kind == (axis, within)]
        where = "within nodes" if within else "between nodes"
        lines.append(f"links {axis:<10} {min(rates):.2f} to {max(rates):.2f} GB/s {where}")
    lines += [f"FAULTY {node}: {fault}" for node, found in sorted(faults.items()) for fault in found[:4]]
    return "\n".join(lines if faults else [*lines, "no faulty node"])


def main(arguments: list[str]) -> int:
    """Measure all nodes, judge them, and print and write the findings. Every rank returns the same exit code."""
    config, folder = read_config(Path(arguments[0])), Path(arguments[1])
    with ending_with_parent(has_agent()), closing(connect()) as world:
        with world.watch(TIMEOUT_S, folder):
            own = read(config, world)
            readings: list[Any] = [own]
            if world.size > 1:
                readings = [None] * world.size
                dist.all_gather_object(readings, own)
        faults = judge(readings)
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            content = {"time": time.time(), "bad_nodes": sorted(faults), "faults": faults}
            write_json(folder / "findings.json", {**content, "readings": [asdict(reading) for reading in readings]})
            print(table(readings, faults), flush=True)
        return FAILED_NODE if faults else 0


def _bandwidth(axis: MeshAxis, device: torch.device, tries: int = 3) -> float:
    """Return the best rate of an all-reduce over the axis, in bytes of one rank's tensor per second."""
    tensor, times = torch.zeros(MESSAGE_BYTES // 4, device=device), []
    for _ in range(tries + 1):  # the first try sets up the connections
        axis.sum(tensor[:1], "meet")
        times.append(seconds_of(lambda: axis.sum(tensor, "bandwidth"), device))
    return MESSAGE_BYTES / min(times)


def _products(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 384
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, a), device) for _ in range(8))


def _disk(folder: Path, rank: int) -> float | None:
    content = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    path = folder / f".doctor-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        with open_raw(path, "wb") as file:
            file.write(content)
            if is_local(path):
                os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        path.unlink()
    except Exception:  # object stores raise errors of many types; `judge` reports the node
        return None
    return DISK_BYTES / seconds


if __name__ == "__main__":
    from core.process import end_process, run_process

    end_process(run_process(main))
