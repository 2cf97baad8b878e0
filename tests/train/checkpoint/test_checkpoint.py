"""Checkpoints are whole or absent: the marker, digests, fallback, pruning, a full disk, half-written saves."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from core.errors import CheckpointError, ConfigError
from core.files import locate, remove_tree
from parallel.comm.world import World, connect
from train.checkpoint import manager
from train.checkpoint.index import problem
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import TensorShard, run_state
from train.optim.optimizer import prime
from train.run_directory import MARKER, committed

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((300, 300), value))
        self.register_buffer("bias", torch.full((3,), value))


def stepped(value: float) -> tuple[Net, torch.optim.Optimizer]:
    model = Net(value)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.full_like(model.weight, value)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=["local-sync", "local-async", "memory-sync", "memory-async"])
def checkpointer(request, tmp_path, said) -> Iterator[Checkpointer]:
    where, _, how = request.param.partition("-")
    place = tmp_path if where == "local" else locate(f"memory://checkpoints/{tmp_path.name}")
    place.mkdir(parents=True, exist_ok=True)
    yield Checkpointer(place, World(0, 1, CPU), keep=2, asynchronous=how == "async", report=said.append)
    remove_tree(place)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def local_checkpointer(request, tmp_path, said) -> Checkpointer:
    return Checkpointer(tmp_path, World(0, 1, CPU), keep=2, asynchronous=request.param, report=said.append)


def tensors(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {part.name: part.tensor for part in run_state(model, optimizer)}


def save(checkpointer: Checkpointer, step: int) -> None:
    model, optimizer = stepped(float(step))
    checkpointer.save(step, run_state(model, optimizer), {"tokens": step * 10})
    checkpointer.wait()


def loaded(checkpointer: Checkpointer) -> tuple[dict, dict[str, torch.Tensor]]:
    model = Net(0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    prime(optimizer)
    progress = checkpointer.restore(run_state(model, optimizer))
    assert progress is not None
    return progress, tensors(model, optimizer)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_what_is_loaded(checkpointer):
    save(checkpointer, 3)
    progress, state = loaded(checkpointer)
    assert progress == {"step": 3, "tokens": 30}
    model, optimizer = stepped(3.0)
    wanted = tensors(model, optimizer)
    assert set(state) == set(wanted) and "optimizer.weight.exp_avg" in wanted and "model.bias" in wanted
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_saving_does_not_see_later_updates(checkpointer):
    """An asynchronous save has copied the state by the time it returns."""
    model, optimizer = stepped(1.0)
    before = model.weight.detach().clone()
    checkpointer.save(1, run_state(model, optimizer), {})
    with torch.no_grad():
        model.weight.fill_(99.0)
    checkpointer.wait()
    assert torch.equal(loaded(checkpointer)[1]["model.weight"], before)


def test_the_last_ones_are_kept(checkpointer):
    for step in (1, 2, 3, 4):
        save(checkpointer, step)
    assert [found.step for found in committed(checkpointer.directory)] == [3, 4]


def test_the_one_before_stays_until_the_next_is_whole(checkpointer, monkeypatch):
    """Even where only one is kept."""
    checkpointer.keep, commit, there = 1, manager.commit, []

    def watched(*arguments):
        there.append([found.step for found in committed(checkpointer.directory)])
        commit(*arguments)

    monkeypatch.setattr(manager, "commit", watched)
    save(checkpointer, 1)
    save(checkpointer, 2)
    assert there == [[], [1]]
    assert [found.step for found in committed(checkpointer.directory)] == [2]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "marker"])
def test_a_damaged_checkpoint_falls_back_and_says_so(checkpointer, said, damage):
    save(checkpointer, 1)
    save(checkpointer, 2)
    newest = committed(checkpointer.directory)[-1].path
    assert not problem(newest)
    data = next(newest.glob("*.bin"))
    if damage == "flip":
        flip_a_byte(data)
    elif damage == "truncate":
        data.write_bytes(data.read_bytes()[:-10])
    elif damage == "remove":
        data.unlink()
    else:
        (newest / MARKER).write_text("{")
    progress, state = loaded(checkpointer)
    assert progress["step"] == 1 and bool((state["optimizer.weight.exp_avg"] == 0.1).all()), "nothing stays of step 2"
    assert len(said) == 1 and "step-00000002 is damaged" in said[0]


def test_nothing_whole_is_an_error_and_not_a_fresh_start(checkpointer):
    save(checkpointer, 1)
    flip_a_byte(next(checkpointer.directory.glob("*/*.bin")))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        loaded(checkpointer)


def test_a_checkpoint_without_marker_does_not_exist(checkpointer):
    save(checkpointer, 1)
    save(checkpointer, 2)
    (checkpointer.directory / "step-00000002" / MARKER).unlink()
    assert loaded(checkpointer)[0]["step"] == 1
    save(checkpointer, 2)
    assert loaded(checkpointer)[0]["step"] == 2, "what a killed save left is written over"


def test_the_marker_names_every_file(checkpointer):
    save(checkpointer, 1)
    path = committed(checkpointer.directory)[-1].path
    listed = set(json.loads((path / MARKER).read_text())["files"])
    assert listed == {p.name for p in path.iterdir()} - {MARKER}


def test_a_full_disk_leaves_the_old_checkpoint(local_checkpointer, said):
    checkpointer = local_checkpointer
    save(checkpointer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        save(checkpointer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "could not save step-00000002, going on without it: File too large" in said[0]
    assert [p.name for p in checkpointer.directory.iterdir()] == ["step-00000001"], "nothing half-written is left"
    assert loaded(checkpointer)[0]["step"] == 1
    save(checkpointer, 3)
    assert loaded(checkpointer)[0]["step"] == 3


def test_a_missing_driver_says_what_to_install():
    with pytest.raises(ConfigError, match="Install s3fs to access S3"):
        locate("s3://bucket/folder")
    with pytest.raises(ConfigError, match="no filesystem is called 'nowhere'"):
        locate("nowhere://bucket/folder")


def save_on_a_full_rank(directory: Path, asynchronous: bool) -> list[str]:
    """Rank 1 cannot write its shards of step 2."""
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
    assert said == [["could not save step-00000002, going on without it: No space left on device"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
