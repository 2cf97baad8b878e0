"""Gather values from thousands of ranks on rank 0, and send one back, along a tree.

The ranks of a node, which are consecutive, send to the first of them, and these send to one another in a tree. So each
rank connects to at most 16 others, however many ranks there are, and rank 0 receives few messages.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
CPU = torch.device("cpu")
NODE = 8
"""Number of consecutive ranks that send to the first of them: the GPUs of most nodes."""
FAN_OUT = 8
"""Number of nodes that send to one node."""


def parent(rank: int) -> int:
    """Return the rank to which `rank` sends. Rank 0 has none and gets itself."""
    node, local = divmod(rank, NODE)
    return rank - local if local else max(0, (node - 1) // FAN_OUT) * NODE


def children(rank: int, size: int) -> list[int]:
    """Return the ranks that send to `rank`."""
    if rank % NODE:
        return []
    first = rank // NODE * FAN_OUT + 1
    nodes = [NODE * node for node in range(first, first + FAN_OUT)]
    return [child for child in (*range(rank + 1, rank + NODE), *nodes) if child < size]


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the values of all ranks, by rank, on rank 0 of a gloo group of all. Other ranks get an empty list."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[int, T] = {rank: value}
    for child in children(rank, size):
        found |= _receive(child, group)
    if rank:
        dist.send_object_list([found], parent(rank), group, device=CPU)
        return []
    return [found[one] for one in range(size)]


def spread(value: T, group: dist.ProcessGroup) -> T:
    """Return the value of rank 0 on every rank of a gloo group of all ranks."""
    rank = dist.get_rank()
    value = _receive(parent(rank), group) if rank else value
    for child in children(rank, dist.get_world_size()):
        dist.send_object_list([value], child, group, device=CPU)
    return value


def _receive(rank: int, group: dist.ProcessGroup) -> Any:
    box: list[Any] = [None]
    dist.recv_object_list(box, rank, group, device=CPU)
    return box[0]
