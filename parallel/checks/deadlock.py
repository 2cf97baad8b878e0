"""Find deadlocks in what the ranks of a world issued.

NCCL runs the collectives of a process group in the order in which each rank issued them, and a collective ends when all
ranks of the group have reached it. Three rules follow. All ranks of a group issue the same sequence of (operation,
shape, dtype). Each send has its receive. A replay of all ranks comes to its end: no rank waits for another in a circle.
The replay is strict: a synchronous collective holds up all that its rank issues later, on other groups and streams too.
An order that passes cannot deadlock however few channels NCCL has.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from parallel.checks.recorder import Issued


def deadlocks(ranks: Sequence[Sequence[Issued]]) -> list[str]:
    """Return the faults in what the ranks of a world issued, by rank; empty if they can all come to their ends."""
    found = [*_unequal_sequences(ranks), *_unpaired(ranks)]
    return found or _Replay(ranks).stuck()


def deadlocks_among(records: Mapping[int, Sequence[Issued]]) -> list[str]:
    """Return the faults among some ranks of a large world, by the rank's number. Groups count without their other
    members, and messages to or from other ranks are omitted.
    """
    numbers = sorted(records)
    places = {rank: place for place, rank in enumerate(numbers)}

    def here(one: Issued) -> Issued | None:
        if not one.group:
            return one
        if one.peer >= 0 and one.peer not in places:
            return None
        members = tuple(places[rank] for rank in sorted(places.keys() & set(one.ranks)))
        return replace(one, ranks=members, peer=places.get(one.peer, -1))

    kept = [[own for one in records[rank] if (own := here(one)) is not None] for rank in numbers]
    return [_renumbered(fault, numbers) for fault in deadlocks(kept)]


def _renumbered(fault: str, numbers: Sequence[int]) -> str:
    """Return a fault with the numbers of ranks in place of their places among those that were replayed."""
    number = lambda found: str(numbers[int(found[0])])  # noqa: E731
    return re.sub(r"\branks? \d+(, \d+)*", lambda found: re.sub(r"\d+", number, found[0]), fault)


def _unequal_sequences(ranks: Sequence[Sequence[Issued]]) -> list[str]:
    """Return, for each process group, the first collective in which two of its ranks differ."""
    sequences: dict[str, dict[int, list[Issued]]] = {}
    for rank, issued in enumerate(ranks):
        for one in issued:
            if one.is_collective:
                by_rank = sequences.setdefault(one.group, {member: [] for member in one.ranks})
                by_rank.setdefault(rank, []).append(one)
    return [fault for by_rank in sequences.values() if (fault := _first_difference(by_rank))]


def _first_difference(by_rank: Mapping[int, list[Issued]]) -> str | None:
    first, *others = sorted(by_rank)
    for other in others:
        pairs = zip_longest(by_rank[first], by_rank[other])
        for number, (one, two) in enumerate(pairs, 1):
            if one is None or two is None or _signature(one) != _signature(two):
                has, lacks = (f"issues {x}" if x else "issues no more" for x in (one, two))
                return f"collective {number} of a group: rank {first} {has}, rank {other} {lacks}"
    return None


def _signature(one: Issued) -> tuple[object, ...]:
    return one.operation, one.shapes, one.dtypes


def _unpaired(ranks: Sequence[Sequence[Issued]]) -> list[str]:
    """Return, for each pair of ranks, the first send that differs from its receive, or has none."""
    sent: dict[tuple[str, int, int], list[Issued]] = {}
    received: dict[tuple[str, int, int], list[Issued]] = {}
    for rank, issued in enumerate(ranks):
        for one in issued:
            if one.operation == "send":
                sent.setdefault((one.group, rank, one.peer), []).append(one)
            elif one.operation == "receive":
                received.setdefault((one.group, one.peer, rank), []).append(one)
    found = []
    for key in sorted(sent.keys() | received.keys()):
        _, source, target = key
        for number, (there, here) in enumerate(zip_longest(sent.get(key, []), received.get(key, [])), 1):
            if there is None or here is None or _signature(there)[1:] != _signature(here)[1:]:
                has, lacks = (f"issues {x}" if x else "issues no more" for x in (there, here))
                found.append(f"message {number}: rank {source} {has}, rank {target} {lacks}")
                break
    return found


@dataclass
class _Unit:
    """Operations that one rank starts as one: a collective, or a batch of sends and receives, of which `open` wait."""

    operations: list[Issued]
    open: list[Issued] = field(default_factory=list)
    is_done: bool = False


class _Replay:
    """Replays all ranks until they have ended, or none can go on.

    `_queues`: by rank and group, what was issued and has not ended. A send or receive that is in no batch has a queue
    for its pair of ranks, as NCCL has a communicator for it.
    """

    def __init__(self, ranks: Sequence[Sequence[Issued]]) -> None:
        self._units = [_units(issued) for issued in ranks]
        self._places = [0] * len(ranks)
        self._queues: list[dict[tuple[str, int], deque[_Unit]]] = [{} for _ in ranks]
        self._works: list[dict[int, _Unit]] = [{} for _ in ranks]
        self._issued: list[int] = [-1] * len(ranks)

    def stuck(self) -> list[str]:
        """Return what each rank waits for where the replay stops, or nothing if all ranks come to their ends."""
        while any([self._advance(rank) for rank in range(len(self._units))] + [self._match()]):
            pass
        waiting = {r: self._units[r][p] for r, p in enumerate(self._places) if p < len(self._units[r])}
        waiting = {r: self._works[r][u.operations[0].work] if _is_wait(u) else u for r, u in waiting.items()}
        return [f"rank {rank} waits in {unit.operations[0]}" for rank, unit in waiting.items()]

    def _advance(self, rank: int) -> bool:
        """Issue what the rank can. Return whether it issued anything."""
        begin = self._places[rank], self._issued[rank]
        while self._places[rank] < len(self._units[rank]):
            unit = self._units[rank][self._places[rank]]
            first = unit.operations[0]
            if _is_wait(unit):
                awaited = self._works[rank].get(first.work)
                if awaited is not None and not awaited.is_done:
                    break
            elif self._issued[rank] < self._places[rank]:
                self._issued[rank] = self._places[rank]
                self._queues[rank].setdefault(_queue(unit, rank), deque()).append(unit)
                self._works[rank].update({one.work: unit for one in unit.operations if one.work >= 0})
            if not _is_wait(unit) and first.work < 0 and not unit.is_done:
                break
            self._places[rank] += 1
        return begin != (self._places[rank], self._issued[rank])

    def _match(self) -> bool:
        """End the collectives that all their ranks have reached, and the sends whose receives are reached."""
        progress = False
        for rank, queues in enumerate(self._queues):
            for key in list(queues):
                while queues[key] and self._ends(rank, key, queues[key][0]):
                    progress = True
        return progress

    def _ends(self, rank: int, key: tuple[str, int], unit: _Unit) -> bool:
        """Return whether anything of the unit at the head of a queue could end, after ending it."""
        first = unit.operations[0]
        if first.is_collective:
            heads = [self._head(member, key) for member in first.ranks]
            if any(head is None or not head.operations[0].is_collective for head in heads):
                return False
            for member in first.ranks:
                self._pop(member, key)
            return True
        before = len(unit.open)
        for one in [*unit.open]:
            other = self._head(one.peer, key)
            wanted = "receive" if one.operation == "send" else "send"
            match = next((o for o in other.open if o.operation == wanted and o.peer == rank), None) if other else None
            if other is not None and match is not None:
                unit.open.remove(one)
                other.open.remove(match)
                if not other.open and other is not unit:
                    self._pop(one.peer, key)
        if not unit.open:
            self._pop(rank, key)
        return len(unit.open) < before

    def _head(self, rank: int, key: tuple[str, int]) -> _Unit | None:
        queue = self._queues[rank].get(key)
        return queue[0] if queue else None

    def _pop(self, rank: int, key: tuple[str, int]) -> None:
        self._queues[rank][key].popleft().is_done = True


def _is_wait(unit: _Unit) -> bool:
    return unit.operations[0].operation == "wait"


def _queue(unit: _Unit, rank: int) -> tuple[str, int]:
    first = unit.operations[0]
    alone = first.peer >= 0 and first.batch < 0
    return first.group, (min(rank, first.peer) << 32 | max(rank, first.peer)) if alone else -1


def _units(issued: Sequence[Issued]) -> list[_Unit]:
    """Join batches of sends and receives, and drop what waits for no other rank."""
    units: list[_Unit] = []
    for one in issued:
        if not one.group and one.operation != "wait":
            continue
        if units and one.batch >= 0 and units[-1].operations[0].batch == one.batch:
            units[-1].operations.append(one)
        else:
            units.append(_Unit([one]))
    for unit in units:
        unit.open = [one for one in unit.operations if one.peer >= 0]
    return units
