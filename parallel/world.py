"""The ranks of this run: who we are, where we compute, and the few collectives that are not part of a technique."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core.errors import ConfigError, LeviathanError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's place. With one rank there is no process group and every collective is the identity."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; an exception there is raised on every rank."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                if isinstance(error, LeviathanError):
                    error.everywhere = True
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def agree(self, claims: Mapping[str, str]) -> None:
        """Raise `ConfigError` on every rank where ranks do not say the same; the fewest are named."""
        if self.size == 1:
            return
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, dict(claims))
        for what in claims:
            values = [one.get(what) for one in said]
            usual = max(values, key=values.count)
            others = [str(rank) for rank, value in enumerate(values) if value != usual]
            if others:
                have = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
                raise ConfigError(what, None, f"{have} another than the other ranks: start all with the same")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; waits for all of them."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def connect(timeout_s: float = 600.0) -> World:
    """Join the run that torchrun's environment describes; without one, a world of one process.

    A process group that exists already is used as it is.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=_store(size), rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _store(size: int) -> dist.Store:
    """torchrun's store under a prefix of this attempt: a restart must not meet the addresses of ranks that died."""
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys():
        raise ConfigError("WORLD_SIZE", size, "is set, but not by torchrun: unset it, or start the ranks with torchrun")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"
    store = dist.TCPStore(host, port, size, is_master=own, wait_for_workers=False)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
