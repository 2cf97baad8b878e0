"""A model of CUDA's streams, events and caching allocator that finds races without a GPU.

Each stream has a vector clock: for every stream, the number of its operations that are ordered before the next one of
this stream. An event is a copy of a clock, and a wait merges it. Two accesses to the same memory, one of them a write,
race if neither is ordered before the other.

The allocator returns freed memory at once to the stream that allocated it (torch, c10/cuda/CUDACachingAllocator.cpp).
The model assumes the worst: an allocation may get any memory that its stream has freed, whatever the sizes. Accesses to
it must be ordered after all uses of what was freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Clock = dict["Stream", int]


@dataclass(frozen=True)
class Use:
    """An operation that used memory: its number on its stream, and its name."""

    time: int
    name: str


@dataclass(frozen=True)
class Race:
    """Two operations on different streams that use the same memory, one of them writing, without an order.

    `reused`: the memory was freed and allocated again between the two.
    """

    first: str
    first_stream: str
    second: str
    second_stream: str
    reused: bool = False

    def __str__(self) -> str:
        link = "its memory is reused by" if self.reused else "does not wait for it:"
        return f"{self.first} on {self.first_stream}; {link} {self.second} on {self.second_stream}"


class Stream:
    """Stands in for `torch.cuda.Stream`. Streams are equal only to themselves."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name, self.time = machine, name, 0
        self.clock: Clock = {}

    def covers(self, stream: Stream, time: int) -> bool:
        """Return whether operation `time` of `stream` is ordered before the next operation of this stream."""
        return stream is self or self.clock.get(stream, 0) >= time

    def snapshot(self) -> Clock:
        return {**self.clock, self: self.time}

    def merge(self, clock: Clock) -> None:
        _merge(self.clock, clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.machine)
        event.clock = self.snapshot()
        return event

    def wait_event(self, event: Event | None) -> None:
        if event is not None:  # FSDP2 waits for an event that it may not have recorded
            self.merge(event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.merge(stream.snapshot())

    def synchronize(self) -> None:
        self.machine.synchronize(self)


class Event:
    """Stands in for `torch.cuda.Event`. Waiting for an event that was never recorded orders nothing, as on CUDA."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or self.machine.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.current).wait_event(self)

    def synchronize(self) -> None:
        _merge(self.machine.host, self.clock)

    def query(self) -> bool:
        return False


@dataclass(eq=False)
class Block:
    """Memory between an allocation and a release.

    `before`: the last uses, by stream, of the memory that the allocation may have got. `shared`: the streams that
    `Tensor.record_stream` named: the allocator waits for them. `on_device`: whether a GPU would hold it.
    """

    owner: Stream
    before: dict[Stream, Use] = field(default_factory=dict)
    write: tuple[Stream, Use] | None = None
    reads: dict[Stream, Use] = field(default_factory=dict)
    shared: set[Stream] = field(default_factory=set)
    on_device: bool = False


class Machine:
    """One device: its streams and its memory. `races`: what was found, in order, each pair of operations once."""

    def __init__(self) -> None:
        self.host: Clock = {}
        self.default = Stream(self, "the default stream")
        self.current = self.default
        self.races: list[Race] = []
        self._freed: dict[Stream, dict[Stream, Use]] = {}

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Issue operations on `stream`; None changes nothing."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, stream: Stream) -> None:
        """Make the host wait for a stream, so that all later operations follow it."""
        _merge(self.host, stream.snapshot())

    def launch(self) -> None:
        """Begin an operation on the current stream; `read` and `write` say what it uses."""
        self.current.merge(self.host)
        self.current.time += 1

    def allocate(self) -> Block:
        """Return memory that belongs to the current stream."""
        return Block(self.current, dict(self._freed.get(self.current, {})))

    def free(self, block: Block) -> None:
        """Return memory to its stream."""
        pool = self._freed.setdefault(block.owner, {})
        uses = [*block.before.items(), *block.reads.items(), *([block.write] if block.write is not None else [])]
        for stream, use in uses:
            if stream not in block.shared and (stream not in pool or pool[stream].time < use.time):
                pool[stream] = use

    def read(self, block: Block, name: str) -> None:
        self._follow(block, name, reads=False)
        block.reads[self.current] = Use(self.current.time, name)

    def write(self, block: Block, name: str) -> None:
        self._follow(block, name, reads=True)
        block.write, block.reads = (self.current, Use(self.current.time, name)), {}

    def _follow(self, block: Block, name: str, reads: bool) -> None:
        """Check that the current operation follows the last write of a block, its `reads`, and the uses before."""
        if block.write is not None:
            self._check(*block.write, name)
        for stream, use in block.reads.items() if reads else ():
            self._check(stream, use, name)
        for stream, use in block.before.items():
            self._check(stream, use, name, reused=True)

    def _check(self, stream: Stream, use: Use, name: str, reused: bool = False) -> None:
        if not self.current.covers(stream, use.time):
            race = Race(use.name, stream.name, name, self.current.name, reused)
            if race not in self.races:
                self.races.append(race)


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time
