"""Make the process groups of this rank: few communicators, by calls that all ranks make in the same order.

A split lists groups of ranks such that each rank of the world is in one of them. There are two ways to make a rank's
group of a split:

- If the world's communicator is NCCL's and bound to a device, the groups are split off it (`ncclCommSplit`), which is
  one call that every rank of the world must make. `new_group` on some ranks would hang: it splits too, and waits for
  the ranks that do not call it (torch 2.13, distributed_c10d.py).
- Otherwise each rank creates only its own group, and only the members take part.

Both are free of deadlocks because each split covers the whole world and all ranks ask for the same splits in the same
order. Equal splits share a group.

NCCL tells the groups of one call of `ncclCommSplit` apart by a colour, for which torch hashes the ranks of a group to
31 bits. The hash is weak: of the pairs (0, 96), (1, 97), ... of 128 ranks two have the same colour, and NCCL would join
them. Groups of equal colour are therefore split off in different calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

Split = tuple[tuple[int, ...], ...]
"""Groups of ranks, each ascending, that together are all ranks of the world."""

START_LIMIT = timedelta(days=1)
"""Time limit of a collective before the first step, and of a wait for rank 0: it may tokenise for hours."""
LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"


def split(sizes: Sequence[int], *along: int) -> Split:
    """Arrange the ranks as a grid, the last axis varying fastest. Return the groups that extend along some axes."""
    grid, others = torch.arange(torch.Size(sizes).numel()).view(*sizes), set(range(len(sizes))) - set(along)
    rows = grid.permute(*sorted(others), *along).flatten(len(others))
    return tuple(map(tuple, rows.reshape(-1, rows.shape[-1]).tolist()))


def split_calls(split: Split) -> list[list[list[int]]]:
    """Divide the groups of several ranks so that those of one call have different colours."""
    calls: list[dict[int, list[int]]] = []
    for row in split:
        if len(row) > 1:
            colour = _colour(row)
            call = next((one for one in calls if colour not in one), None)
            if call is None:
                calls.append(call := {})
            call[colour] = list(row)
    return [list(call.values()) for call in calls]


def _colour(ranks: Sequence[int]) -> int:
    """Hash ranks as torch does (`genNcclSplitColor` in NCCLUtils.cpp)."""
    found = 0
    for rank in ranks:
        found = (found ^ (rank + 0x9E3779B9 + (found << 6) + (found >> 2))) & 0xFFFFFFFFFFFFFFFF
    return min(found, (1 << 64) - found) % 0x7FFFFFFF


@dataclass
class ProcessGroups:
    """The process groups of this rank. `from_split`: whether they are split from the world's communicator."""

    from_split: bool = False
    made: dict[tuple[str, Split], dist.ProcessGroup] = field(default_factory=dict, repr=False)
    _host: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def communicators(self) -> int:
        """Number of communicators of this rank, the world's included. A group of one rank has none."""
        large = [group for group in self.made.values() if dist.get_world_size(group) > 1]
        return 1 + len(large) + (self._host is not None)

    def of(self, split: Split, lane: str = "") -> dist.ProcessGroup:
        """Return this rank's group of a split. Every rank must call this with the same arguments in the same order.

        Collectives of one communicator run one after another. `lane`: groups of different lanes share none, so that
        their collectives can overlap.
        """
        size, world = dist.get_world_size(), dist.group.WORLD
        if len(split) == 1 and not lane and world is not None:
            return world
        if (lane, split) not in self.made:
            if sorted(rank for row in split for rank in row) != list(range(size)):
                raise ValueError(f"a split of {size} ranks must contain each of them once")
            self.made[lane, split] = self._make(split, lane)
        return self.made[lane, split]

    def _make(self, split: Split, lane: str) -> dist.ProcessGroup:
        rank, group = dist.get_rank(), None
        [own] = [row for row in split if rank in row]
        for rows in split_calls(split) if self.from_split else ():
            group = dist.split_group(None, rows, START_LIMIT, group_desc=lane or None) or group
        if len(own) == 1:
            # it sends nothing, and NCCL would hash 16,384 such groups to 31 bits, where two of them may be confused
            group = dist.new_group([rank], START_LIMIT, "gloo" if self.from_split else None, None, True)
        elif not self.from_split:
            group = dist.new_group(list(own), START_LIMIT, use_local_synchronization=True)
        assert group is not None, f"rank {rank} got no group of {own}"
        return group

    def host(self) -> dist.ProcessGroup:
        """Return a gloo group of all ranks, for CPU tensors and for use beside the training step. Every rank must call
        this at the same point. It opens connections when they are first used: a full mesh would be thousands a rank.
        """
        if self._host is None:
            with _lazy_gloo():
                self._host = dist.new_group(timeout=START_LIMIT, backend="gloo", group_desc="host")
        return self._host

    def limit(self, timeout: timedelta) -> None:
        """Set the time limit of collectives begun from now on, in every group but `host`."""
        for group in (dist.group.WORLD, *self.made.values()):
            set_limit(timeout, group)


def set_limit(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Set the time limit of collectives begun from now on in a group. Other backends than NCCL and gloo have none."""
    if group is not None and dist.get_backend(group) in ("nccl", "gloo"):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextmanager
def _lazy_gloo() -> Iterator[None]:
    before = os.environ.get(LAZY_GLOO)
    os.environ[LAZY_GLOO] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LAZY_GLOO]
        else:
            os.environ[LAZY_GLOO] = before
