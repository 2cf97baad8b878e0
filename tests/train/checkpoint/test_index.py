"""A forged, foreign or damaged checkpoint is refused in one line, and resuming falls back to the one before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from core.errors import CheckpointError
from launch.cli import main
from model.config import ModelConfig
from parallel.comm.world import World
from tests.support.tiny import TINY
from train.checkpoint.index import INDEX, PROGRESS, IndexedShard, _tile
from train.checkpoint.manager import Checkpointer
from train.checkpoint.reader import CheckpointedModel
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER

WEIGHT = "model.weight"


def state(value: float) -> list[TensorShard]:
    """Return a matrix in two shards, and a scalar."""
    halves = [TensorShard(WEIGHT, torch.full((2, 3), value), (4, 3), (2 * i, 0)) for i in range(2)]
    return [*halves, TensorShard("optimizer.weight.step", torch.tensor(value), (), ())]


def checkpointer(directory: Path, said: list[str]) -> Checkpointer:
    return Checkpointer(directory, World(0, 1, torch.device("cpu")), keep=3, asynchronous=False, report=said.append)


def sign(checkpoint: Path) -> None:
    """Replace the digests in the marker by those of the forged files."""
    marker = json.loads((checkpoint / MARKER).read_text())
    for name in (INDEX, PROGRESS):
        content = (checkpoint / name).read_bytes()
        marker["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    (checkpoint / MARKER).write_text(json.dumps(marker))


def in_json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def forge(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))
        if name != MARKER:
            sign(checkpoint)

    return forge


def shard(**changes: Any) -> Callable[[Path], None]:
    return in_json(INDEX, lambda content: content["tensors"][WEIGHT]["shards"][1].update(changes))


def tensor(**changes: Any) -> Callable[[Path], None]:
    return in_json(INDEX, lambda content: content["tensors"][WEIGHT].update(changes))


def text(name: str, content: bytes) -> Callable[[Path], None]:
    def forge(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        if name != MARKER:
            sign(checkpoint)

    return forge


def in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def forge(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return forge


def marker(files: dict[str, object]) -> Callable[[Path], None]:
    return in_json(MARKER, lambda content: content["files"].update(files))


FORGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no JSON": (text(INDEX, b"\x80\x04\x95"), f"{INDEX}: is not UTF-8 text"),
    "cut JSON": (text(INDEX, b"{"), f"{INDEX}: is not JSON"),
    "deep JSON": (text(INDEX, b"[" * 200_000), f"{INDEX}: is nested too deeply"),
    "tensors are a list": (text(INDEX, b'{"tensors": []}'), f"{INDEX} is unreadable (AttributeError"),
    "unknown dtype": (tensor(dtype="object"), f"{INDEX} is unreadable (KeyError: 'object')"),
    "negative shape": (tensor(shape=[-4, 3]), f"{INDEX} is unreadable (ValueError"),
    "huge shape": (tensor(shape=[10**30, 3]), f"{INDEX} is unreadable (ValueError"),
    "fewer dimensions": (tensor(shape=[12]), "do not make up its shape [12]"),
    "overlap": (shard(offset=[1, 0]), "do not make up its shape [4, 3]"),
    "true as offset": (shard(offset=[True, 0]), f"{INDEX} is unreadable (ValueError"),
    "file elsewhere": (shard(file="../../step-00000001/rank_0.bin"), "which is not a file of a checkpoint"),
    "another file": (shard(file="rank_7.bin"), f"{INDEX}: shards"),
    "start": (shard(start=0), "shards in rank_0.bin overlap or leave a gap at byte 0"),
    "negative start": (shard(start=-24), "a shard of model.weight needs 24 bytes"),
    "bytes": (shard(bytes=8), "a shard of model.weight needs 24 bytes and has 8"),
    "text as bytes": (shard(bytes="24"), "a shard of model.weight needs 24 bytes"),
    "digest": (shard(digest="0" * 32), "rank_0.bin does not match its digest at byte 24"),
    "digest is a number": (shard(digest=7), "a shard of model.weight has no digest"),
    "odd key": (shard(code="import os"), f"{INDEX} is unreadable (TypeError"),
    "unsigned index": (in_place(INDEX, lambda p: p.write_text("{}")), f"{INDEX} has 2 bytes instead of"),
    "data is a pipe": (in_place("rank_0.bin", os.mkfifo), "rank_0.bin is not a file"),
    "marker is a folder": (in_place(MARKER, Path.mkdir), f"{MARKER} is not a file"),
    "marker of a file elsewhere": (marker({"../x": {"bytes": 1}}), f"{MARKER} names '../x', which is not a file"),
    "marker is no text": (text(MARKER, b"\xff\xfe"), f"{MARKER}: is not UTF-8 text"),
    "marker without files": (in_json(MARKER, lambda c: c.update(files=None)), "not that of a checkpoint of format"),
    "marker without sizes": (marker({"rank_0.bin": 3}), "does not say how long"),
    "other format": (in_json(MARKER, lambda c: c.update(format=99)), f"{MARKER} is not that of a checkpoint of format"),
    "other step": (in_json(PROGRESS, lambda content: content.update(step=7)), f"{PROGRESS} is of step 7"),
    "step is no integer": (in_json(PROGRESS, lambda content: content.update(step=2.0)), "step is not a whole number"),
    "tokens are text": (in_json(PROGRESS, lambda content: content.update(tokens="9")), "tokens is not a whole number"),
    "settings are a list": (in_json(PROGRESS, lambda c: c.update(settings=[1])), "settings is not an object with keys"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save two checkpoints, with a foreign folder next to them."""
    directory = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        checkpointer(directory, []).save(step, state(float(step)), {"tokens": step})
    shutil.copytree(directory / "step-00000002", directory / "step-00000009.bak")
    return directory


@pytest.mark.parametrize("forge, reason", FORGED.values(), ids=FORGED.keys())
def test_a_forged_checkpoint_falls_back_in_one_line(saved, tmp_path, forge, reason):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    forge(tmp_path / "step-00000002")
    said: list[str] = []
    target = state(0.0)
    assert checkpointer(tmp_path, said).restore(target) == {"step": 1, "tokens": 1}
    assert all(bool((part.tensor == 1).all()) for part in target)
    (line,) = said
    assert line.startswith("checkpoint step-00000002 is damaged: ") and line.endswith("; trying the one before")
    assert reason in line and "\n" not in line and len(line) < 400
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact") as caught:
        checkpointer(tmp_path, said).restore(target)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"is damaged|does not match its configuration"):
        CheckpointedModel(tmp_path / "step-00000002", ModelConfig())


@pytest.mark.parametrize("shards", [[1], [0, 0, 1]], ids=["a gap", "a shard twice"])
def test_shards_that_make_up_no_tensor_are_not_committed(tmp_path, shards):
    said: list[str] = []
    checkpointer(tmp_path, said).save(1, [state(1.0)[number] for number in shards], {})
    assert "continuing without it: the shards of model.weight do not make up its shape [4, 3]" in said[0]


def test_tiles_are_told_from_overlaps_and_gaps():
    def tile(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        return _tile(shape, [IndexedShard(*box, "", 0, 0, "") for box in boxes])

    assert tile((), ((), ())) and not tile((), ((), ()), ((), ()))
    wheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert tile((3, 3), *wheel) and not tile((3, 3), *wheel[:4]) and not tile((3, 3), *wheel, wheel[4])
    assert not tile((2, 2), ((0, 0), (1, 2)), ((0, 0), (1, 2))), "the right volume, but an overlap"
    assert not tile((4,), ((0,), (5,))) and not tile((4,), ((1,), (4,)))


def test_a_run_without_a_good_checkpoint_is_one_error(small_corpus, tmp_path, capsys):
    """Each verb exits with code 1 and one line, and removes nothing."""
    line = ["train", *TINY, *small_corpus, "training.steps=1", f"run.root={tmp_path}", "run.name=run"]
    assert main(line) == 0
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    (path / MARKER).write_text('{"format": 1}')
    capsys.readouterr()
    run = str(tmp_path / "run")
    for verb in (line, ["evaluate", run], ["generate", run], ["export", run, str(tmp_path / "out")]):
        assert main(verb) == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert "an older version of Leviathan, whose checkpoints could run code: train again, or export" in said
    assert (path / "rank_0.bin").exists()
