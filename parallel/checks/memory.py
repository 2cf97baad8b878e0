"""Follow the storages of a device from allocation to release: bytes that are live, by kind, and their peak.

A storage has one kind for its whole life. It may be named after the allocation (`label`), so that peaks are computed
at the end, from the log of allocations and releases. What the caching allocator rounds up or keeps is not counted.
"""

from __future__ import annotations

import weakref
from array import array
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

OTHER = "activations"
"""The kind of a storage that nothing labels: what the forward pass keeps, and temporary tensors."""


@dataclass(eq=False)
class Storage:
    """A storage of the device: its kind and its bytes now."""

    kind: str
    bytes: int = 0
    number: int = 0


@dataclass(frozen=True)
class Peak:
    """The most bytes that were live at once: their split by kind, and the last of `Memory.mark` before."""

    bytes: int
    by_kind: dict[str, int]
    during: str


class Memory:
    """Logs the allocations and releases of a device's storages. `kind`: returns the kind of a new storage."""

    def __init__(self, device: str = "meta", kind: Callable[[], str] = lambda: OTHER) -> None:
        self.device, self.kind = device, kind
        self.live = self.peak = 0
        self._open: dict[int, tuple[Storage, Any]] = {}
        self._storages: list[Storage] = []
        self._log = array("q"), array("q")  # numbers of storages, and the bytes that were added or removed
        self._marks: list[tuple[int, str]] = []

    def note(self, tensors: Iterable[Tensor], given: Iterable[Tensor] = ()) -> None:
        """Note the results of an operation. What is `given` to it existed before, and is not its allocation."""
        old: set[int] | None = None
        for x in tensors:
            if x.device.type != self.device or (storage := x.untyped_storage())._cdata in self._open:
                continue
            old = {one.untyped_storage()._cdata for one in given} if old is None else old
            if storage._cdata not in old:
                self._allocate(storage, self.kind())

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Set the kind of some tensors' storages. Those that are older than this object count from now on."""
        for x in tensors:
            storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
            if storage._cdata in self._open:
                self._open[storage._cdata][0].kind = kind
            elif storage.device.type == self.device:
                self._allocate(storage, kind)

    def forget(self, tensor: Tensor) -> None:
        """Count the memory of a tensor no longer."""
        if (known := self._open.pop(tensor.untyped_storage()._cdata, None)) is not None:
            self._change(known[0], 0)

    def mark(self, name: str) -> None:
        """Begin a part of the run, for `Peak.during`."""
        self._marks.append((len(self._log[0]), name))

    def highest(self, *kinds: str) -> Peak:
        """Return the peak of all storages, or of those of some kinds together."""
        live, best, at, split = Counts[str](), 0, 0, dict[str, int]()
        total = 0
        for place, (number, size) in enumerate(zip(*self._log, strict=True)):
            kind = self._storages[number].kind
            live[kind] += size
            if not kinds or kind in kinds:
                total += size
                if total > best:
                    best, at, split = total, place, dict(live)
        during = next((name for begin, name in reversed(self._marks) if begin <= at), "")
        return Peak(best, {kind: size for kind, size in split.items() if size}, during)

    @contextmanager
    def following(self) -> Iterator[Memory]:
        """Follow storages that change their size, too: FSDP2 frees and allocates gathered parameters so."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if (known := self._open.get(storage._cdata)) is not None:
                if known[0].kind == OTHER:
                    known[0].kind = self.kind()
                self._change(known[0], size)
            elif storage.device.type == self.device:
                self._allocate(storage, self.kind())

        with patch.object(torch.UntypedStorage, "resize_", resized):
            yield self

    def _allocate(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, one = storage._cdata, Storage(kind, number=len(self._storages))
        self._storages.append(one)

        def freed(_: Any) -> None:
            if (known := self._open.get(key)) is not None and known[0] is one:
                del self._open[key]
                self._change(one, 0)

        self._open[key] = one, weakref.ref(storage, freed)
        self._change(one, storage.nbytes())

    def _change(self, one: Storage, size: int) -> None:
        if size == one.bytes:
            return
        numbers, sizes = self._log
        numbers.append(one.number)
        sizes.append(size - one.bytes)
        self.live += size - one.bytes
        self.peak = max(self.peak, self.live)
        one.bytes = size
