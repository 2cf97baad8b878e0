"""Save the checkpoints of a run, restore the newest intact one and remove old ones.

Tensors are named `model.NAME` and `optimizer.NAME.MOMENT`, so any layout loads what any other saved. The files are
described in `train/checkpoint/index.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.errors import CheckpointError, first_line
from core.files import remove_tree
from parallel.comm.world import World
from train.checkpoint.files import read_state, write_shards
from train.checkpoint.index import UNREADABLE, Damaged, IndexedTensor, commit, problem, read_progress
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER, committed


class Checkpointer:
    """Saves and restores the checkpoints of one run."""

    def __init__(
        self, directory: Path, world: World, keep: int, asynchronous: bool, report: Callable[[str], None]
    ) -> None:
        self.directory, self.world, self.keep = directory, world, keep
        self.asynchronous, self.report = asynchronous, report
        self.failure = ""
        """Why the last save that failed did."""
        self._pending: tuple[Path, Future[None]] | None = None
        self._damaged: list[Path] = []
        # a save in the background must not use the communicator of the training step
        self._group = world.groups.host() if world.size > 1 else None

    def save(self, step: int, state: Sequence[TensorShard], progress: dict[str, Any]) -> None:
        """Write `state` as the checkpoint after `step` steps, and `progress` (plain JSON values) to progress.json. An
        asynchronous save returns as soon as the state has been copied.

        If writing fails (on a full disk), the failure is reported and the run continues with its older checkpoints.
        """
        self.wait()
        path = self.directory / f"step-{step:08d}"
        progress = {"step": step, **progress}
        shards = [shard for shard in state if shard.writes and shard.tensor.numel()]
        try:
            self.world.from_main(lambda: self._clear(path))
            if self.asynchronous:
                copies = [replace(one, tensor=one.tensor.detach().to("cpu", copy=True)) for one in shards]
                background = ThreadPoolExecutor(1)
                self._pending = path, background.submit(self._write, path, copies, progress)
                background.shutdown(wait=False)  # the thread ends with the save
                return
            self._write(path, shards, progress)
        except Exception as error:  # stores raise their own errors
            self._failed(path, error)
        else:
            self._prune()

    def _write(self, path: Path, shards: Sequence[TensorShard], progress: dict[str, Any]) -> None:
        """Write this rank's shards. Once all ranks are done, rank 0 commits the checkpoint.

        Raises `CheckpointError` on every rank if one of them fails.
        """
        written, failure = dict[str, IndexedTensor](), ""
        try:
            if shards:  # a rank may hold only replicas that other ranks write
                path.mkdir(parents=True, exist_ok=True)  # rank 0 made it, but perhaps on another disk
                written = write_shards(path / f"rank_{self.world.rank}.bin", shards)
        except Exception as error:
            failure = _root_cause(error)
        outcomes = [(written, failure)] * self.world.size
        if self._group is not None:
            dist.gather_object((written, failure), outcomes if self.world.is_main else None, group=self._group)
        box = [next((text for _, text in outcomes if text), "")]
        if self.world.is_main and not box[0]:
            try:
                commit(path, [part for part, _ in outcomes], progress)
            except Exception as error:
                box = [_root_cause(error)]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        if box[0]:
            raise CheckpointError(box[0])

    def wait(self) -> None:
        """Block until the pending save, if any, is committed or has failed."""
        if self._pending is None:
            return
        (path, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            self._failed(path, error)
        else:
            self._prune()

    def has(self, step: int) -> bool:
        """Return whether a checkpoint of this step is committed or being written."""
        path = self.directory / f"step-{step:08d}"
        if self._pending is not None and self._pending[0] == path:
            return True
        return self.world.from_main((path / MARKER).exists) and path not in self._damaged

    def restore(self, state: Sequence[TensorShard]) -> dict[str, Any] | None:
        """Read the newest intact checkpoint into `state`, in place, and return its progress.

        A checkpoint that cannot be used is reported, and the next older one is tried. Returns None if no checkpoint is
        committed. Raises `CheckpointError` if some are committed but none is intact.
        """
        present, reason = self.world.from_main(lambda: committed(self.directory)), ""
        for found in reversed(present):
            wrong = self.world.from_main(partial(problem, found.path)) or self._read(found.path, state)
            if not wrong:
                return read_progress(found.path)
            reason = reason or f"{found.path.name} {wrong}"
            if found != present[0]:
                self.report(f"checkpoint {found.path.name} {wrong}; trying the one before")
            if not wrong.startswith(UNREADABLE):  # permissions or a disk may be mended: keep the files
                self._damaged.append(found.path)
        if present:
            raise CheckpointError(f"no checkpoint in {self.directory} is intact ({reason}); remove all to start over")
        return None

    def _read(self, checkpoint: Path, state: Sequence[TensorShard]) -> str:
        """Read a checkpoint into `state`. Returns a description of the damage that any rank found, the same text on all
        ranks, or an empty text. After damage the content of the tensors is undefined.
        """
        outcome: CheckpointError | str = ""
        try:
            read_state(checkpoint, state)
        except CheckpointError as error:
            outcome = error
        except Damaged as error:
            outcome = f"is damaged: {error}"
        except OSError as error:
            outcome = f"{UNREADABLE}: {error.strerror or error}"
        outcomes: list[CheckpointError | str] = [outcome] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(outcomes, outcome, group=self._group)
        for one in outcomes:
            if isinstance(one, CheckpointError):
                raise one
        return next((str(one) for one in outcomes if one), "")

    def _clear(self, path: Path) -> None:
        """Make an empty directory. Remove what an interrupted save left in it, and all checkpoints found damaged."""
        for stale in (path, *self._damaged):
            (stale / MARKER).unlink(missing_ok=True)
            remove_tree(stale)
        self._damaged.clear()
        path.mkdir(parents=True, exist_ok=True)

    def _failed(self, path: Path, error: BaseException) -> None:
        if self.world.is_main:
            try:
                remove_tree(path)
            except Exception as second:
                self.report(f"could not remove what is left of {path.name}: {_root_cause(second)}")
        self.failure = _root_cause(error)
        self.report(f"could not save {path.name}, continuing without it: {self.failure}")

    def _prune(self) -> None:
        if not self.world.is_main:
            return
        try:
            for found in committed(self.directory)[: -self.keep]:
                (found.path / MARKER).unlink()  # first, so that a partly removed checkpoint is never read
                remove_tree(found.path)
        except Exception as error:
            self.report(f"could not remove an old checkpoint: {_root_cause(error)}")


def _root_cause(error: BaseException) -> str:
    """Return the message of the operating system, or else of the innermost exception, from a store's error."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    cause = error.__cause__ or error.__context__
    return _root_cause(cause) if cause is not None else first_line(error)
