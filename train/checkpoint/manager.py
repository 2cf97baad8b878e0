"""Checkpoints: torch.distributed.checkpoint under global names, committed by a marker that is written last.

A checkpoint is a directory `step-00000100`: a data file per rank, DCP's `.metadata` with the digest of every piece in
them, `progress.json` and, once everything is on the disk, `COMMITTED` with the size of every other file and the digests
of the small ones. A directory without the marker is half-written and never read. Tensors are keyed `model.NAME` and
`optimizer.NAME.MOMENT`, so any layout loads any other's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from core.errors import CheckpointError
from core.files import read_json, remove_tree, write_json
from parallel.comm.world import World
from train.checkpoint.files import METADATA, Damaged, PlainReader, PlainWriter
from train.checkpoint.state import ShardLoadPlanner, ShardSavePlanner, TensorShard, written
from train.run_directory import MARKER, CommittedCheckpoint, committed

PROGRESS = "progress.json"
FAILURES = (Exception, dcp.CheckpointException)  # every store has errors of its own; DCP's is no `Exception`


class CommittedWriter(PlainWriter):
    """The coordinator, which DCP tells when all ranks have finished, writes the marker last."""

    def __init__(self, path: Path, progress: dict[str, Any]) -> None:
        super().__init__(path)
        self.progress = progress

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_json(self.directory / PROGRESS, self.progress)
        files: dict[str, Any] = {name: _described(self.directory / name) for name in (METADATA, PROGRESS)}
        for result in (result for rank in results for result in rank):
            entry = files.setdefault(result.storage_data.file, {"bytes": 0})
            entry["bytes"] += result.storage_data.size
        write_json(self.directory / MARKER, {"format": 1, "files": files})


class Checkpointer:
    """Saves and finds the checkpoints of one run."""

    def __init__(
        self, directory: Path, world: World, keep: int, asynchronous: bool, report: Callable[[str], None]
    ) -> None:
        self.directory, self.world, self.keep = directory, world, keep
        self.asynchronous, self.report = asynchronous, report
        # one process is a choice, not an accident; a background thread would escape a narrower filter
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._pending: tuple[Path, Any] | None = None
        self._damaged: list[Path] = []
        # saving in the background must not share a communicator with the step
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def save(self, step: int, state: Sequence[TensorShard], progress: dict[str, Any]) -> None:
        """Write `state` after `step` steps; returns as soon as it has been copied where saving is asynchronous.

        A failure to write (a full disk) is reported and the run goes on with its older checkpoints.
        """
        self.wait()
        path = self.directory / f"step-{step:08d}"
        writer = CommittedWriter(path, {"step": step, **progress})
        options: dict[str, Any] = {
            "storage_writer": writer,
            "planner": ShardSavePlanner(state),
            "process_group": self._group,
        }
        try:
            self.world.from_main(lambda: self._make_room(path))
            if self.asynchronous:
                self._pending = (path, dcp.async_save(written(state), **options))
                return
            dcp.save(written(state), **options)
        except FAILURES as error:
            self._failed(path, error)
        else:
            self._prune()

    def wait(self) -> None:
        """Block until the save under way, if any, is committed or has failed."""
        if self._pending is None:
            return
        (path, future), self._pending = self._pending, None
        try:
            future.result()
        except FAILURES as error:
            self._failed(path, error)
        else:
            self._prune()

    def has(self, step: int) -> bool:
        """Whether a checkpoint of this step is committed or being written."""
        path = self.directory / f"step-{step:08d}"
        if self._pending is not None and self._pending[0] == path:
            return True
        return self.world.from_main((path / MARKER).exists) and path not in self._damaged

    def restore(self, state: Sequence[TensorShard]) -> dict[str, Any] | None:
        """Read the newest whole checkpoint into `state`, in place; returns its progress.

        One that is damaged is reported and the next older one is tried. None where there is no committed one; raises
        `CheckpointError` where there are some but none is whole.
        """
        present = self.world.from_main(lambda: committed(self.directory))
        for found in reversed(present):
            wrong = self.world.from_main(partial(problems, found.path)) or load(found, state)
            if not wrong:
                return progress_of(found.path)
            self.report(f"checkpoint {found.path.name} is damaged: {wrong[0]}; trying the one before")
            self._damaged.append(found.path)
        if present:
            raise CheckpointError(f"no checkpoint in {self.directory} is whole: remove the directory to start anew")
        return None

    def _make_room(self, path: Path) -> None:
        """Remove what a killed save left, and what could not be read."""
        for stale in (path, *self._damaged):
            (stale / MARKER).unlink(missing_ok=True)
            remove_tree(stale)
        self._damaged.clear()
        path.mkdir(parents=True, exist_ok=True)

    def _failed(self, path: Path, error: BaseException) -> None:
        if self.world.is_main:
            try:
                remove_tree(path)
            except FAILURES as second:
                self.report(f"could not remove what is left of {path.name}: {_root_cause(second)}")
        self.report(f"could not save {path.name}, going on without it: {_root_cause(error)}")

    def _prune(self) -> None:
        if not self.world.is_main:
            return
        try:
            for found in committed(self.directory)[: -self.keep]:
                (found.path / MARKER).unlink()  # first, so that a half-removed one is never taken for whole
                remove_tree(found.path)
        except FAILURES as error:
            self.report(f"could not remove an old checkpoint: {_root_cause(error)}")


def problems(checkpoint: Path) -> list[str]:
    """What can be seen to be wrong with a committed checkpoint without reading its data; empty where all is well."""
    wrong = []
    try:
        for name, wanted in sorted(read_json(checkpoint / MARKER)["files"].items()):
            path = checkpoint / name
            if not path.exists():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != wanted["bytes"]:
                wrong.append(f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}")
            elif "xxh3_128" in wanted and _described(path) != wanted:
                wrong.append(f"{name} does not match its digest")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{MARKER} is unreadable ({error!r})"]
    return wrong


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """Where the run stood, as `Checkpointer.save` was told."""
    return read_json(checkpoint / PROGRESS)


def load(found: CommittedCheckpoint, state: Sequence[TensorShard]) -> list[str]:
    """Read a checkpoint into `state`, in place, verifying every byte read.

    Returns what was found damaged on any rank, the same on every rank; tensors are undefined unless it is empty.
    """
    try:
        dcp.load(
            {part.key: part.tensor for part in state},
            storage_reader=PlainReader(found.path),
            planner=ShardLoadPlanner(state),
        )
    except dcp.CheckpointException as error:
        for inner, _ in error.failures.values():
            if isinstance(inner, CheckpointError):
                raise CheckpointError(f"{found.path}: {inner}") from None
        damage = [str(inner) for inner, _ in error.failures.values() if isinstance(inner, Damaged)]
        if not damage:
            raise
        return damage
    return []


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _root_cause(error: BaseException) -> str:
    """The operating system's own words, from below DCP's wrapping."""
    if isinstance(error, dcp.CheckpointException):
        inner = next(iter(error.failures.values()))[0]
        return _root_cause(inner)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    cause = error.__cause__ or error.__context__
    return _root_cause(cause) if cause is not None else str(error).strip().splitlines()[0]
