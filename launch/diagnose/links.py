"""Time the links of a parallel axis one by one: neighbours in the ring of its ranks exchange a message.

An all-reduce is only as fast as its slowest link, so all ranks of a group measure the same rate. Here each rank times
its exchange with the next rank only. A slow node makes both of its links slow, a slow cable only one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from parallel.comm.world import World, wait_for
from parallel.mesh import MeshAxis

MESSAGE_BYTES = 8 << 20
SLOW = 0.5
"""Fraction of the usual rate below which a rate counts as slow."""


@dataclass(frozen=True)
class Link:
    """A link between neighbours of an axis. `bytes_per_second` is per direction, while both send."""

    axis: str
    rank: int
    node: str
    peer: int
    peer_node: str
    bytes_per_second: float

    @property
    def nodes(self) -> tuple[str, str]:
        return self.node, self.peer_node

    @property
    def kind(self) -> tuple[str, bool]:
        """The axis, and whether both ends are on one node. Only links of one kind are compared."""
        return self.axis, self.node == self.peer_node


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """Return every link (position, next position) of a ring once, in rounds in which each position has at most one
    partner.
    """
    if size < 3:
        return [[(0, 1)]] if size == 2 else []
    even, odd = ([(place, place + 1) for place in range(first, size - 1, 2)] for first in (0, 1))
    last = (size - 1, 0)
    return [even, [*odd, last]] if size % 2 == 0 else [even, odd, [last]]


def measure(axis: MeshAxis, world: World, tries: int = 3) -> tuple[int, float] | None:
    """Return the next rank in the ring and the best rate of an exchange with it, in bytes per second per direction.

    Return None if the axis has one rank, and on the second of two ranks, since the first reports their only link. Every
    rank of the axis takes part in every round.
    """
    found, meeting = None, torch.zeros(1, device=world.device)
    sent = torch.zeros(MESSAGE_BYTES // 4, device=world.device)
    received = torch.empty_like(sent)
    for pairs in rounds(axis.size):
        pair, times = next((pair for pair in pairs if axis.rank in pair), None), []
        for _ in range(tries + 1):  # the first try sets up the connection
            axis.sum(meeting, "meet")
            if pair is not None:
                peer = _rank_of(axis, pair[1] if axis.rank == pair[0] else pair[0])
                times.append(seconds_of(partial(_exchange, axis, peer, sent, received), world.device))
        if pair is not None and axis.rank == pair[0]:
            found = peer, MESSAGE_BYTES / min(times)
    return found


def slow_links(links: Sequence[Link]) -> list[tuple[str, int, str]]:
    """Return node, rank and description for every slow link.

    Report the end whose node has the larger fraction of slow links among its links of the same kind, or both ends if
    the fractions are equal.
    """
    found = []
    for kind in dict.fromkeys(link.kind for link in links):
        alike = [link for link in links if link.kind == kind]
        rates = sorted(link.bytes_per_second for link in alike)
        usual = rates[3 * len(alike) // 4]  # not the median: one slow node slows two of the three links of three nodes
        slow = [link for link in alike if link.bytes_per_second < SLOW * usual]
        counts, slow_counts = (Counter(node for link in some for node in link.nodes) for some in (alike, slow))
        share = {node: count / counts[node] for node, count in slow_counts.items()}
        for link in slow:
            what = f"(axis {link.axis}) at {link.bytes_per_second / usual:.0%} of the others'"
            worst = max(share[node] for node in link.nodes)
            if share[link.node] == worst:
                found.append((link.node, link.rank, f"its link to rank {link.peer} on {link.peer_node} {what}"))
            if share[link.peer_node] == worst and link.node != link.peer_node:
                found.append((link.peer_node, link.peer, f"its link to rank {link.rank} on {link.node} {what}"))
    return found


def distinct(axes: Sequence[MeshAxis]) -> list[MeshAxis]:
    """Drop axes that join the same ranks as an earlier axis."""
    members = {axis.name: tuple(_rank_of(axis, place) for place in range(axis.size)) for axis in axes}
    first = {ranks: name for name, ranks in reversed(members.items())}
    return [axis for axis in axes if first[members[axis.name]] == axis.name]


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `action` takes on the device."""
    wait_for(device)
    begin = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - begin


def _exchange(axis: MeshAxis, peer: int, sent: torch.Tensor, received: torch.Tensor) -> None:
    """Send and receive concurrently."""
    sending = dist.P2POp(dist.isend, sent, peer, group=axis.group)
    for work in dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, peer, group=axis.group)]):
        work.wait()


def _rank_of(axis: MeshAxis, place: int) -> int:
    return place if axis.group is None else dist.get_global_rank(axis.group, place)
