"""The processes of a run: rank, device, and the few collectives that are not part of a technique."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core.errors import ConfigError, first_line
from core.exit_codes import ATTEMPT
from core.process import told_after
from parallel.comm.groups import START_LIMIT, ProcessGroups, set_limit
from parallel.comm.heartbeat import Heartbeat, marks
from parallel.comm.watchdog import Watchdog, keep_flight_record

T = TypeVar("T")
BACKSTOP_S = 10.0
"""Seconds after `parallel.timeout_s` at which torch ends a rank whose watchdog has not."""
PATIENCE_S = 5.0
"""Seconds of waiting for another process after which a line says for whom."""


class WrongEnvironmentError(ConfigError):
    """A variable that torchrun sets has an impossible value."""

    everywhere = False


@dataclass(frozen=True)
class World:
    """This process's rank and device. With one rank there is no process group and every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)
    groups: ProcessGroups = field(default_factory=ProcessGroups, compare=False, repr=False)
    limits: list[timedelta] = field(default_factory=list, compare=False, repr=False)
    """Time limits that `limit` has set, the last of which holds."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and return its result on every rank. Its exception is raised on every rank."""
        if self.size == 1:
            return function()
        self.heartbeat.begin("world", "wait for rank 0")
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                with self.heartbeat.excuse():
                    box[0] = function()
            except Exception as error:
                vars(error)["everywhere"] = True
                box[1] = error
        with self._patient():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def agree(self, claims: Mapping[str, str]) -> None:
        """Raise `ConfigError` on every rank if a value in `claims` differs between ranks. It names the minority."""
        if self.size == 1 or not self._differs(claims):
            return
        gathered = self.gather(dict(claims), "agreement")
        for what in claims:
            values = [one.get(what) for one in gathered]
            usual = max(values, key=values.count)
            others = [str(rank) for rank, value in enumerate(values) if value != usual]
            if others:
                have = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
                odd = values[int(others[0])]
                raise ConfigError(what, None, f"{have} {odd}, the other ranks {usual}: start all ranks alike")

    def _differs(self, claims: Mapping[str, str]) -> bool:
        """Return whether any rank has other claims, on every rank. Compares hashes: all texts would be megabytes."""
        text = json.dumps(dict(claims), sort_keys=True).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
        bounds = torch.tensor([digest, -digest], device=self.device)
        self.heartbeat.begin("world", "agreement")
        with self._patient():
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        highest, lowest = bounds.tolist()
        return highest != -lowest

    def gather(self, value: T, purpose: str) -> list[T]:
        """Return the values of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        self.heartbeat.begin("world", purpose)
        gathered: list[Any] = [None] * self.size
        with self._patient():
            dist.all_gather_object(gathered, value)
        return gathered

    def to_main(self, value: T, purpose: str) -> list[T]:
        """Return the values of all ranks, by rank, on rank 0. Other ranks get an empty list."""
        if self.size == 1:
            return [value]
        self.heartbeat.begin("world", purpose)
        gathered: list[Any] = [None] * self.size
        with self._patient():
            dist.gather_object(value, gathered if self.is_main else None, dst=0)
        return gathered if self.is_main else []

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. Waits for all ranks."""
        if self.size == 1:
            return flag
        self.heartbeat.begin("world", "agreement")
        votes = torch.tensor(int(flag), device=self.device)
        with self._patient():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    @contextmanager
    def watch(self, limit_s: float, logs: Path) -> Iterator[None]:
        """Run the watchdog: if a collective waits longer than `limit_s`, report it in `logs` and end this rank. Does
        nothing with one rank, or without `MASTER_ADDR`: then other code made the process group, and the ranks have no
        store through which to report.
        """
        if self.size == 1 or "MASTER_ADDR" not in os.environ:
            yield
            return
        watchdog = Watchdog(self.heartbeat, _store(self.size, client=True), self.rank, self.size, limit_s, logs)
        try:
            yield
        finally:
            watchdog.stop()

    def limit(self, timeout_s: float) -> None:
        """Set the time limit of every collective from now on, except those of this class, in which ranks wait for long
        work of another. The watchdog ends a run first: its report comes `BACKSTOP_S` earlier.
        """
        if self.size > 1:
            self.limits.append(timedelta(seconds=timeout_s + BACKSTOP_S))
            self.groups.limit(self.limits[-1])

    @contextmanager
    def _patient(self) -> Iterator[None]:
        """Wait in the world's group as long as before the first step: rank 0 may work alone for hours."""
        if not self.limits:
            yield
            return
        set_limit(START_LIMIT, dist.group.WORLD)
        try:
            yield
        finally:
            set_limit(self.limits[-1], dist.group.WORLD)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def connect(timeout: timedelta = START_LIMIT) -> World:
    """Join the run that torchrun's environment variables describe. Without them, return a world of one process.

    An existing process group is used as it is. On GPUs the process group has NCCL alone, with a communicator that is
    bound to this rank's device, so that other groups are split from it. The timeout is long because rank 0 may tokenise
    for hours; `World.watch` finds hangs.
    """
    rank, size, _ = numbers_of_rank()
    device = device_of_rank()
    if not dist.is_initialized():
        if size == 1:
            return World(rank, size, device)
        store = _store(size)
        if device.type == "cuda":
            keep_flight_record()
            join = partial(dist.init_process_group, "nccl", device_id=device)
        else:
            join = partial(dist.init_process_group, "gloo")
        join(store=store, rank=rank, world_size=size, timeout=timeout)
    heartbeat = Heartbeat(marks(device.type))
    return World(dist.get_rank(), dist.get_world_size(), device, heartbeat, ProcessGroups(splits_world(device)))


def splits_world(device: torch.device) -> bool:
    """Return whether groups must be split from the world's communicator: it is NCCL's and bound to a device."""
    world: Any = dist.group.WORLD
    return device.type == "cuda" and world.bound_device_id is not None and "nccl" in dist.get_backend()


def numbers_of_rank() -> tuple[int, int, int]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; 0, 1 and 0 without them. Raises `ConfigError`."""
    rank, size, local = (_whole(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if rank >= size:
        reason = f"must be below WORLD_SIZE={size}: unset both, or start the ranks with torchrun"
        raise WrongEnvironmentError("RANK", rank, reason)
    return rank, size, local


def ranks_on_machine() -> int:
    """Return LOCAL_WORLD_SIZE as torchrun sets it, or 1 without it. Raises `ConfigError`."""
    return _whole("LOCAL_WORLD_SIZE", 1)


def _whole(name: str, default: int) -> int:
    """Return an environment variable as a whole number. Only numbers of ranks must not be 0."""
    text, least = os.environ.get(name, str(default)), int(name.endswith("WORLD_SIZE"))
    if not text.isascii() or not text.isdecimal() or not least <= int(text) < 2**31:
        reason = "must be a whole number, as torchrun sets it: unset it, or start the ranks with torchrun"
        raise WrongEnvironmentError(name, repr(text), reason)
    return int(text)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its queued work. Does nothing on a CPU, which queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of_rank() -> torch.device:
    """Return this rank's GPU, which becomes the current one, or the CPU on a machine without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _, _, local = numbers_of_rank()
    if local >= torch.cuda.device_count():
        reason = f"this machine has {torch.cuda.device_count()} GPUs: start one rank for each"
        raise WrongEnvironmentError("LOCAL_RANK", local, reason)
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _store(size: int, client: bool = False) -> dist.Store:
    """Connect to torchrun's store. A prefix per attempt keeps a restart from reading the addresses of dead ranks."""
    environment = os.environ
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= environment.keys():
        raise ConfigError("WORLD_SIZE", size, "is set, but not by torchrun: unset it, or start the ranks with torchrun")
    agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts, most = (environment.get(f"TORCHELASTIC_{what}", "0") for what in ("RESTART_COUNT", "MAX_RESTARTS"))
    nodes = _whole("GROUP_WORLD_SIZE", 1)
    if ATTEMPT not in environment and agents and nodes > 1 and most != "0":
        # each node's agent counts its own restarts, so ranks of different nodes would wait under different prefixes
        reason = "ranks of several nodes cannot reconnect after a restart: use leviathan train launch=torchrun"
        raise ConfigError("--max-restarts", most, reason, [0])
    own = not agents and environment["RANK"] == "0" and not client
    host, port = environment["MASTER_ADDR"], _whole("MASTER_PORT", 0)
    patience = timedelta(minutes=1) if client else timedelta(minutes=5)
    line = f"leviathan: rank {environment['RANK']} waits for rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:  # wait all the same: some clusters name a node only once it is ready
        line += f"; the name does not resolve yet ({error.strerror})"
    with told_after(PATIENCE_S, line):
        try:
            store = dist.TCPStore(host, port, size, is_master=own, wait_for_workers=False, timeout=patience)
        except (dist.DistError, RuntimeError, OSError) as error:
            reason = f"no answer within {patience.seconds // 60} min: start rank 0 there, or correct MASTER_ADDR"
            if own:
                reason = f"cannot listen there ({first_line(error)[:100]}): choose another MASTER_PORT"
            raise WrongEnvironmentError("MASTER_ADDR", f"{host}:{port}", reason) from None
    return dist.PrefixStore(f"attempt_{environment.get(ATTEMPT, restarts)}", store)
