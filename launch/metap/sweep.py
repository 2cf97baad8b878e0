"""Train the runs of a sweep: a grid of learning rates for each setting."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from core.config import build
from core.errors import ConfigError
from core.exit_codes import INTERRUPTED
from core.process import ending_with_parent
from launch.config import LaunchConfig, LaunchKind
from launch.diagnose.machine import check_processes
from launch.local import train
from launch.metap.config import SweepConfig
from launch.metap.runs import RUNS, is_done, loss_of, member, one_run, settings
from launch.metap.search import search
from train.config import TrainConfig


def sweep(config: SweepConfig, runs: Mapping[str, TrainConfig], out: Path) -> int:
    """Train the unfinished runs; return the exit code. A diverged run is a result, not a failure."""
    launch = build(LaunchConfig, next(iter(runs.values())).launch, "launch")
    if config.processes > 1 and launch.kind is not LaunchKind.inline:
        raise ConfigError("sweep.processes", config.processes, "applies to launch=inline only", [1])
    if config.trials is not None:
        if launch.kind is LaunchKind.slurm:
            reason = "a search waits for each run: start it inside a job, with launch=inline or launch=torchrun"
            raise ConfigError("sweep.trials", config.trials, reason)
        return search(config, settings(config, runs), out)
    wanted = [
        member(config, one, log2_lr, seed, out)
        for one in settings(config, runs)
        for log2_lr in config.log2_rates
        for seed in range(config.seeds)
    ]
    waiting = [run for run in wanted if not is_done(run)]
    print(f"sweep: {len(wanted)} runs, {len(wanted) - len(waiting)} done before", flush=True)
    if launch.kind is LaunchKind.slurm:
        return train(waiting) if waiting else 0
    began, code = time.monotonic(), 0
    for number, (name, one) in enumerate(_results(waiting, config.processes, config.oversubscribe), 1):
        if one == INTERRUPTED:
            return one
        code = code or one
        loss = loss_of(out / RUNS / name)
        result = "failed" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
        left = (time.monotonic() - began) / number * (len(waiting) - number)
        print(f"sweep: {number} of {len(waiting)}  {name}  {result}  {left:.0f} s left", flush=True)
    return code


def _results(waiting: Sequence[TrainConfig], processes: int, oversubscribe: bool) -> Iterator[tuple[str, int]]:
    """Yield the name and exit code of each run as it ends."""
    if processes == 1:
        yield from ((str(run.run.name), one_run(run)) for run in waiting)
        return
    check_processes("sweep.processes", processes, oversubscribe)
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(_quiet_run, run): str(run.run.name) for run in waiting}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _quiet_run(run: TrainConfig) -> int:
    """Train without output on the terminal, where concurrent runs would mix; each run has its own log.txt."""
    with ending_with_parent(), contextlib.redirect_stdout(io.StringIO()):
        return one_run(run)
