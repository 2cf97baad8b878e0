"""Compare saving and loading half a gigabyte of state with writing and reading one plain file.

A save hashes the state, writes it and syncs it to disk; a load verifies every byte. The plain file is synced too, but
not hashed. The disk is synced before each measurement, and files are dropped from the page cache before they are read.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.measure import Result, median_ratio
from parallel.comm.world import World
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import run_state
from train.optim.optimizer import prime

PARAMETERS, ROUNDS = 40_000_000, 7


class State(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(1000, 2500)) for _ in range(16))


def timed(action: Callable[[], object]) -> float:
    os.sync()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def write_raw(path: Path, content: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        written = 0
        while written < len(content):
            written += file.write(content[written : written + (1 << 24)])
        os.fsync(file.fileno())


def read_raw(path: Path, into: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        read = 0
        while read < len(into):
            read += file.readinto(into[read : read + (1 << 24)])


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run() -> list[Result]:
    model = State()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prime(optimizer)
    state = run_state(model, optimizer)
    size = sum(part.tensor.nbytes for part in state)
    content, target = memoryview(bytearray(os.urandom(1 << 20) * (size >> 20))), memoryview(bytearray(size >> 20 << 20))
    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": [], "stall": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        world = World(0, 1, torch.device("cpu"))
        saver = Checkpointer(Path(root) / "sync", world, 1, False, print)
        background = Checkpointer(Path(root) / "async", world, 1, True, print)
        for number in range(ROUNDS + 1):
            for folder in ("sync", "async"):
                shutil.rmtree(Path(root) / folder, ignore_errors=True)
            (Path(root) / "raw").unlink(missing_ok=True)
            seen = {"save": timed(partial(saver.save, number, state, {}))}
            seen["write"] = timed(lambda: write_raw(Path(root) / "raw", content))
            forget(Path(root))
            seen["load"] = timed(partial(saver.restore, state))
            forget(Path(root))
            seen["read"] = timed(lambda: read_raw(Path(root) / "raw", target))
            seen["stall"] = timed(partial(background.save, number, state, {}))
            background.wait()
            for key, value in seen.items():
                if number:
                    times[key].append(value)
    note = f"{size / 1e6:.0f} MB, median of {ROUNDS}"
    found = []
    for ours, raw in (("save", "write"), ("load", "read")):
        share = 1 / median_ratio(times[ours], times[raw])
        medians = statistics.median(times[ours]), statistics.median(times[raw])
        name = f"checkpoint {ours} vs raw {raw} (s; ratio of speeds)"
        found.append(Result(name, *medians, share, ">= 0.7", share >= 0.7, note))
    stall, save = statistics.median(times["stall"]), statistics.median(times["save"])
    found.append(Result("asynchronous save: stall vs whole save (s)", stall, save, stall / save, "-", True, note))
    return found
