"""Gather values from thousands of ranks on rank 0, and send one back, along a tree.

The ranks of a node, which are consecutive, send to the first of them, and these send to one another in a tree. So each
rank connects to at most 16 others, however many ranks there are, and rank 0 receives few messages.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
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
    found: dict[int, Any] = {rank: value}
    for child in children(rank, size):
        found |= pickle.loads(_receive(child, group))
    if rank:
        _send(pickle.dumps(found), parent(rank), group)
        return []
    return [found[one] for one in range(size)]


def spread(value: T, group: dist.ProcessGroup) -> T:
    """Return the value of rank 0 on every rank of a gloo group of all ranks."""
    rank = dist.get_rank()
    content = pickle.dumps(value) if rank == 0 else _receive(parent(rank), group)
    for child in children(rank, dist.get_world_size()):
        _send(content, child, group)
    return pickle.loads(content)


def _send(content: bytes, rank: int, group: dist.ProcessGroup) -> None:
    dist.send(torch.tensor([len(content)]), rank, group)
    dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), rank, group)


def _receive(rank: int, group: dist.ProcessGroup) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, rank, group)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(content, rank, group)
    return content.numpy().tobytes()
