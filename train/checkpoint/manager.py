"""Save the checkpoints of a run, restore the newest intact one and remove old ones.

Tensors are named `model.NAME` and `optimizer.NAME.MOMENT`, so any layout loads what any other saved. The files are
described in `train/checkpoint/index.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, first_line
from core.files import remove_tree
from parallel.comm import tree
from parallel.comm.world import World
from train.checkpoint.files import read_state, write_shards
from train.checkpoint.index import UNREADABLE, Damaged, commit, commit_parts, problem, read_progress, write_part
from train.checkpoint.parts import needed_index
from train.checkpoint.plan import Plan, PlanReport, faulty, plan_of, verify
from train.checkpoint.staging import Staging
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER, CommittedCheckpoint, committed


@dataclass(frozen=True)
class _Outcome:
    """What a rank has done for a save. `report`: that of its plan, or None if it has not changed."""

    files: dict[str, Any]
    failure: str
    report: PlanReport | None


class Checkpointer:
    """Saves and restores the checkpoints of one run."""

    def __init__(
        self, directory: Path, world: World, keep: int, asynchronous: bool, report: Callable[[str], None]
    ) -> None:
        self.directory, self.world, self.keep = directory, world, keep
        self.asynchronous, self.report = asynchronous, report
        self.keep_good = self.doubt = 0
        """Number of older checkpoints to keep besides, and their least distance in steps: see `superfluous`."""
        self.failure = ""
        """Why the last save that failed did."""
        self._pending: tuple[Path, Future[None]] | None = None
        self._damaged: list[Path] = []
        self._staging = Staging(world.device)
        self._plan: Plan | None = None
        self._reports: dict[int, PlanReport] = {}
        self._tiles = False
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
                copies = self._staging.copy(shards)
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
        file = path / f"rank_{self.world.rank}.bin"
        if self._group is None:
            commit(path, [write_shards(file, shards)] if shards else [], progress)
            return
        files, failure, plan = dict[str, Any](), "", plan_of(shards, self._plan)
        try:
            if shards:  # a rank may hold only replicas that other ranks write
                path.mkdir(parents=True, exist_ok=True)  # rank 0 made it, but perhaps on another disk
                files = write_part(path, self.world.rank, write_shards(file, shards))
        except Exception as error:
            failure = _root_cause(error)
        outcome = _Outcome(files, failure, None if plan is self._plan else plan.report)
        outcomes, self._plan = tree.gather(outcome, self._group), plan
        failure, tiles = tree.spread(self._commit(path, outcomes, progress), self._group)
        if not tiles:
            plans = tree.gather(plan, self._group)
            wrong = tree.spread(faulty(plans)[:1], self._group)
            failure = f"the shards of {''.join(wrong)} do not make up its shape"
        if failure:
            raise CheckpointError(failure)

    def _commit(self, path: Path, outcomes: Sequence[_Outcome], progress: dict[str, Any]) -> tuple[str, bool]:
        """Commit a checkpoint on rank 0. Returns why it cannot, and whether the shards make up every tensor."""
        if not outcomes:
            return "", True  # another rank
        new = {rank: one.report for rank, one in enumerate(outcomes) if one.report is not None}
        if new:
            self._reports |= new
            self._tiles = verify(self._reports.values())
        if failure := next((one.failure for one in outcomes if one.failure), ""):
            return failure, True
        if not self._tiles:
            return "", False
        try:
            commit_parts(path, [one.files for one in outcomes], progress)
        except Exception as error:
            return _root_cause(error), True
        return "", True

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

    def restore(self, state: Sequence[TensorShard], newest: int | None = None) -> dict[str, Any] | None:
        """Read the newest intact checkpoint into `state`, in place, and return its progress. `newest`: the step of the
        newest to read; None: any.

        A checkpoint that cannot be used is reported, and the next older one is tried. Returns None if no checkpoint is
        committed. Raises `CheckpointError` if some are committed but none is intact.
        """
        present, reason = self.world.from_main(lambda: committed(self.directory)), ""
        present = [found for found in present if newest is None or found.step <= newest]
        for found in reversed(present):
            check = partial(problem, found.path, digests=self._group is None)
            wrong = self.world.from_main(check) or self._read(found.path, state)
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

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, ascending, on every rank."""
        self.wait()
        return self.world.from_main(lambda: [found.step for found in committed(self.directory)])

    def discard(self, step: int) -> None:
        """Remove the checkpoints after step `step`."""
        self.wait()
        self.world.from_main(
            lambda: remove_checkpoints(found for found in committed(self.directory) if found.step > step)
        )

    def _read(self, checkpoint: Path, state: Sequence[TensorShard]) -> str:
        """Read a checkpoint into `state`. Returns a description of the damage that any rank found, the same text on all
        ranks, or an empty text. After damage the content of the tensors is undefined.
        """
        outcome: CheckpointError | str = ""
        try:
            index = None if self._group is None else needed_index(checkpoint, state, self._group)
            read_state(checkpoint, state, index)
        except CheckpointError as error:
            outcome = error
        except Damaged as error:
            outcome = f"is damaged: {error}"
        except OSError as error:
            outcome = f"{UNREADABLE}: {error.strerror or error}"
        outcomes: list[CheckpointError | str] = [outcome]
        if self._group is not None:
            outcomes = tree.gather(outcome, self._group)
        worst: CheckpointError | str = next((one for one in outcomes if isinstance(one, CheckpointError)), "")
        worst = worst or next((one for one in outcomes if one), "")
        if self._group is not None:
            worst = tree.spread(worst, self._group)
        if isinstance(worst, CheckpointError):
            raise worst
        return str(worst)

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
            remove_checkpoints(superfluous(committed(self.directory), self.keep, self.keep_good, self.doubt))
        except Exception as error:
            self.report(f"could not remove an old checkpoint: {_root_cause(error)}")


def superfluous(
    present: Sequence[CommittedCheckpoint], keep: int, keep_good: int, doubt: int
) -> list[CommittedCheckpoint]:
    """Return the checkpoints to remove: all but the `keep` newest, and the `keep_good` newest of those that are at
    least `doubt` steps older than the newest, after which no trouble was found.
    """
    good = [found for found in present if found.step <= present[-1].step - doubt]
    kept = {*present[-keep:], *good[len(good) - min(keep_good, len(good)) :]}
    return [found for found in present if found not in kept]


def remove_checkpoints(found: Iterable[CommittedCheckpoint]) -> None:
    """Remove checkpoints. Each loses its marker first, so that a partly removed one is never read."""
    for one in found:
        (one.path / MARKER).unlink()
        remove_tree(one.path)


def _root_cause(error: BaseException) -> str:
    """Return the message of the operating system, or else of the innermost exception, from a store's error."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    cause = error.__cause__ or error.__context__
    return _root_cause(cause) if cause is not None else first_line(error)
