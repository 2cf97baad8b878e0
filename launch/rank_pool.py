"""Run cases on a pool of gloo ranks on this machine. A rank takes seconds to start, a case milliseconds to run.

A case is a top-level function with arguments. It runs on ranks 0..n-1 with its own process group and store prefix.
Results are returned by rank. If ranks raise, the pool raises the first cause, not the lost connections that other ranks
report. If a case hangs, the pool kills all ranks and starts new ones for the next case.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from core.exit_codes import RankFailure, is_consequence
from core.process import ending_with_parent

MOST_RANKS = 8
GRACE_S = 5.0
CASES = 12
"""Number of cases after which ranks are replaced. Gloo keeps the threads of destroyed process groups, and they use up
the cores.
"""
PRELOAD = ("torch.distributed", "train.trainer")
"""Modules that the process from which ranks are forked imports once, for all of them."""


class RankError(RankFailure):
    """A rank died or raised an exception. The message names the rank and contains the traceback, if any."""


class Hang(RankFailure):
    """A case did not end in time."""


class Pool:
    """Rank processes, started on demand and kept until `close`. `preload`: more modules to import once for all ranks.
    They are not preloaded if a rank of any pool has started before.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = [*PRELOAD, *preload]
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None
        self._cases = 0

    def __call__(
        self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
    ) -> list[Any]:
        """Run `function(*arguments)` on `ranks` ranks; return the results by rank."""
        if not 1 <= ranks <= MOST_RANKS:
            raise ValueError(f"1 to {MOST_RANKS} ranks, not {ranks}")
        if self._cases % CASES == 0:
            self.close()
        self._start(ranks)
        self._cases += 1
        case = pickle.dumps((function, arguments))
        for rank in range(ranks):
            self._workers[rank][1].send((self._cases, rank, ranks, self._store.port, timeout_s, case))
        replies = self._collect(ranks, timeout_s)
        failures = {rank: reply[1:] for rank, reply in replies.items() if reply[0] == "raised"}
        if failures:
            rank, (name, text) = min(failures.items(), key=lambda item: (is_consequence(item[1][1]), item[0]))
            raise RankError(f"rank {rank} of {ranks} raised {name}:\n{text}")
        return [pickle.loads(replies[rank][1]) for rank in range(ranks)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers, self._store = [], None

    def _start(self, ranks: int) -> None:
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._preload)
        while len(self._workers) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, ranks: int, timeout_s: float) -> dict[int, tuple[Any, ...]]:
        replies: dict[int, tuple[Any, ...]] = {}
        deadline = time.monotonic() + timeout_s + 30.0  # ranks may have to start first
        while len(replies) < ranks:
            waiting = {self._workers[rank][1]: rank for rank in range(ranks) if rank not in replies}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                if any(reply[0] == "raised" and not is_consequence(reply[2]) for reply in replies.values()):
                    return replies  # the silent ranks wait for the rank that raised
                raise Hang(f"ranks {sorted(waiting.values())} of {ranks} did not answer within {timeout_s:.0f} s")
            for connection in typing.cast(list[Connection], ready):
                rank = waiting[connection]
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    self.close()
                    raise RankError(f"rank {rank} of {ranks} died") from None
                if replies[rank][0] == "raised":
                    deadline = min(deadline, time.monotonic() + GRACE_S)  # other ranks may wait for it forever
        return replies


def _serve(connection: Connection) -> None:
    """Run cases until the pool closes."""
    import torch

    gc.freeze()  # a collection would visit all preloaded modules, and copy the pages that ranks share
    torch.set_num_threads(1)
    with ending_with_parent():
        while True:
            try:
                number, rank, ranks, port, timeout_s, case = connection.recv()
            except EOFError:
                return
            try:
                result = _run_case(number, rank, ranks, port, timeout_s, case)
                connection.send(("returned", pickle.dumps(result)))
            except BaseException as error:
                connection.send(("raised", type(error).__name__, traceback.format_exc()))


def _run_case(number: int, rank: int, ranks: int, port: int, timeout_s: float, case: bytes) -> Any:
    import torch.distributed as dist

    shared = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    store = dist.PrefixStore(f"case_{number}", shared)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    if ranks > 1:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))
    try:
        function, arguments = pickle.loads(case)
        return function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
