"""Checkpoints are whole or absent: the marker, digests, fallback, pruning, a full disk, half-written saves."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from core.errors import ConfigError
from core.files import locate, remove_tree
from parallel.comm.world import World, connect
from train.checkpoint import manager
from train.checkpoint.index import problem
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER, committed


def state(value: float) -> list[TensorShard]:
    """Return a parameter, a moment and a step count."""
    values_OI = value + torch.arange(90_000.0).view(300, 300)
    square = [TensorShard(name, values_OI.clone(), (300, 300), (0, 0)) for name in ("model.w", "optimizer.w.m")]
    return [*square, TensorShard("optimizer.w.step", torch.tensor(value), (), ())]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=["local-sync", "local-async", "memory-sync", "memory-async"])
def checkpointer(request, tmp_path, said) -> Iterator[Checkpointer]:
    where, _, how = request.param.partition("-")
    place = tmp_path if where == "local" else locate(f"memory://checkpoints/{tmp_path.name}")
    place.mkdir(parents=True, exist_ok=True)
    yield Checkpointer(place, World(0, 1, torch.device("cpu")), keep=2, asynchronous=how == "async", report=said.append)
    remove_tree(place)


def save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, state(float(step)), {"tokens": step * 10})
    checkpointer.wait()


def loaded(checkpointer: Checkpointer, value: float) -> dict[str, Any]:
    """Restore the newest checkpoint, check that its tensors are those of `state(value)`, and return the progress."""
    target = state(0.0)
    progress = checkpointer.restore(target)
    assert progress is not None
    assert all(torch.equal(one.tensor, wanted.tensor) for one, wanted in zip(target, state(value), strict=True))
    return progress


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_what_is_loaded(checkpointer):
    """An asynchronous `save` copies the state before it returns. The marker names every file."""
    changing = state(3.0)
    checkpointer.save(3, changing, {"tokens": 30})
    for one in changing:
        one.tensor.fill_(99.0)
    checkpointer.wait()
    assert loaded(checkpointer, 3.0) == {"step": 3, "tokens": 30}
    path = checkpointer.directory / "step-00000003"
    listed = set(json.loads((path / MARKER).read_text())["files"])
    assert listed == {p.name for p in path.iterdir()} - {MARKER}


def test_a_checkpoint_that_is_partly_removed_is_none(checkpointer, monkeypatch, said):
    """A kill while an old checkpoint is removed must not leave one that looks whole."""

    def killed(path):
        if (path / "index.json").exists():
            raise OSError(errno.EIO, "killed")

    monkeypatch.setattr(manager, "remove_tree", killed)
    for step in (1, 2, 3):
        save(checkpointer, step)
    assert (checkpointer.directory / "step-00000001" / "index.json").exists(), "control"
    assert [found.step for found in committed(checkpointer.directory)] == [2, 3]


@pytest.mark.parametrize("keep", [1, 2])
def test_an_older_one_stays_until_the_next_is_whole(checkpointer, monkeypatch, keep):
    checkpointer.keep, commit, there = keep, manager.commit, []

    def watched(*arguments):
        there.append([found.step for found in committed(checkpointer.directory)])
        commit(*arguments)

    monkeypatch.setattr(manager, "commit", watched)
    for step in (1, 2, 3):
        save(checkpointer, step)
    assert there == [[], [1], [1, 2][-keep:]]
    assert [found.step for found in committed(checkpointer.directory)] == [2, 3][-keep:]


DAMAGE = {
    "flip": flip_a_byte,
    "truncate": lambda data: data.write_bytes(data.read_bytes()[:-10]),
    "remove": lambda data: data.unlink(),
    "marker": lambda data: (data.parent / MARKER).write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_and_says_so(checkpointer, said, damage):
    save(checkpointer, 1)
    save(checkpointer, 2)
    newest = committed(checkpointer.directory)[-1].path
    assert not problem(newest)
    damage(newest / "rank_0.bin")
    assert loaded(checkpointer, 1.0)["step"] == 1
    assert len(said) == 1 and "step-00000002 is damaged" in said[0]


def test_a_checkpoint_without_marker_does_not_exist(checkpointer):
    save(checkpointer, 1)
    save(checkpointer, 2)
    (checkpointer.directory / "step-00000002" / MARKER).unlink()
    assert loaded(checkpointer, 1.0)["step"] == 1
    save(checkpointer, 2)
    assert loaded(checkpointer, 2.0)["step"] == 2, "files of a killed save are overwritten"


@pytest.mark.parametrize("checkpointer", ["local-sync", "local-async"], indirect=True)
def test_a_full_disk_leaves_the_old_checkpoint(checkpointer, said):
    save(checkpointer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        save(checkpointer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "could not save step-00000002, continuing without it: File too large" in said[0]
    assert [p.name for p in checkpointer.directory.iterdir()] == ["step-00000001"], "nothing half-written is left"
    assert loaded(checkpointer, 1.0)["step"] == 1
    save(checkpointer, 3)
    assert loaded(checkpointer, 3.0)["step"] == 3


def test_a_missing_driver_says_what_to_install():
    with pytest.raises(ConfigError, match="Install s3fs to access S3"):
        locate("s3://bucket/folder")


def save_on_a_full_rank(directory: Path, asynchronous: bool) -> list[str]:
    """Save steps 1 and 2, but fail to write the shards of step 2 on rank 1. Return the messages."""
    world, said = connect(), []
    checkpointer = Checkpointer(directory, world, 2, asynchronous, said.append)
    halves = [TensorShard("model.weight", torch.ones(3), (6,), (3 * world.rank,))]
    checkpointer.save(1, halves, {})
    checkpointer.wait()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(manager, "write_shards", Mock(side_effect=OSError(errno.ENOSPC, "")))
        checkpointer.save(2, halves, {})
        checkpointer.wait()
    return said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_fails_the_save(ranks, tmp_path, asynchronous):
    said = ranks(2, save_on_a_full_rank, tmp_path, asynchronous)
    assert said == [["could not save step-00000002, continuing without it: No space left on device"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
