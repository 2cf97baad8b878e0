"""A rank reads the parts of an index that it needs, and a damaged part is noticed whichever rank needs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from parallel.comm.world import connect
from train.checkpoint import parts
from train.checkpoint.index import IndexedShard, IndexedTensor
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER

ROWS, RANKS = 12, 4


def state(rank: int, count: int, value: float, shift: int = 0) -> list[TensorShard]:
    """Return a rank's rows of a matrix and of a vector, and a scalar that all have."""
    size = ROWS // count
    begin = (size * rank + shift) % ROWS
    matrix, vector = torch.full((size, 3), value + begin), torch.full((size,), value - begin)
    blocks = [TensorShard("m", matrix, (ROWS, 3), (begin, 0)), TensorShard("v", vector, (ROWS,), (begin,))]
    return [*blocks, TensorShard("s", torch.tensor(value), (), (), rank == 0)]


def save(folder: Path) -> None:
    world = connect()
    checkpointer = Checkpointer(folder, world, 3, False, _fail)
    for step in (1, 2):
        checkpointer.save(step, state(world.rank, world.size, float(step)), {})


def _fail(line: str) -> None:
    raise RuntimeError(line)


def restored(folder: Path, shift: int, everything: bool) -> tuple[int, list[str], list[str]]:
    """Return the step that this rank restores, the parts that it reads, and what is reported."""
    world, read, said = connect(), list[str](), list[str]()
    honest = parts.read_part
    blocks = state(world.rank, world.size, 0.0, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "read_part", lambda path, name: (read.append(name), honest(path, name))[1])
        if everything:
            patch.setattr(parts, "overlapping", lambda table, _: sorted({int(row["part"]) for row in table}))
        progress = Checkpointer(folder, world, 3, False, said.append).restore(blocks)
    assert progress is not None
    for one in blocks:
        if one.shape:
            size = ROWS // RANKS  # of the blocks that were saved
            rows = torch.arange(one.offset[0], one.offset[0] + len(one.tensor)) // size * size
            wanted = progress["step"] + rows * (1 if one.name == "m" else -1)
            assert torch.equal(one.tensor.view(len(rows), -1)[:, 0], wanted.float())
        else:
            assert one.tensor == progress["step"]
    return progress["step"], read, said


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    ranks(RANKS, save, path)
    return path


def test_a_rank_reads_the_parts_that_it_needs(ranks, folder):
    same = ranks(RANKS, restored, folder, 0, False)
    own = [f"rank_{rank}.json" for rank in range(RANKS)]
    assert [found[1] for found in same] == [["rank_0.json"], *([name, "rank_0.json"] for name in own[1:])]
    shifted = ranks(RANKS, restored, folder, 3, False)
    assert sorted(shifted[2][1]) == ["rank_0.json", "rank_2.json", "rank_3.json"]
    for _, read, _ in ranks(RANKS, restored, folder, 0, True):
        assert sorted(read) == own, "the control"
    assert sorted(ranks(2, restored, folder, 0, False)[1][1]) == [
        "rank_0.json",
        "rank_1.json",
        "rank_2.json",
        "rank_3.json",
    ]


def edited(folder: Path, to: Path, sign: bool, **changes: object) -> Path:
    """Copy the checkpoints. Change the first shard of the last rank's part in the newest, and sign it if so asked."""
    shutil.copytree(folder, to)
    newest = to / "step-00000002"
    name = f"rank_{RANKS - 1}.json"
    content = json.loads((newest / name).read_text())
    content["tensors"]["m"]["shards"][0].update(changes)
    text = json.dumps(content, separators=(",", ":")).encode()
    (newest / name).write_bytes(text)
    if sign:
        marker = json.loads((newest / MARKER).read_text())
        marker["files"][name] = {"bytes": len(text), "xxh3_128": xxhash.xxh3_128_hexdigest(text)}
        (newest / MARKER).write_text(json.dumps(marker))
    return to


@pytest.mark.parametrize(
    "sign, changes, reason",
    [
        (False, {"digest": "0" * 32}, "rank_3.json does not match its digest"),
        (True, {"file": "rank_1.bin"}, "rank_3.json: a shard is in rank_1.bin, which another part describes"),
        (True, {"start": 7}, "rank_3.json: shards in rank_3.bin overlap or leave a gap at byte 0"),
        (True, {"offset": [8, 0]}, "the shards of m do not make up its block at"),
    ],
)
def test_a_damaged_part_is_noticed_on_all_ranks(ranks, folder, tmp_path, sign, changes, reason):
    found = ranks(RANKS, restored, edited(folder, tmp_path / "copy", sign, **changes), 0, False)
    assert [step for step, _, _ in found] == [1] * RANKS, "the checkpoint before"
    assert all(reason in found[rank][2][0] for rank in range(RANKS))


def test_parts_are_chosen_by_blocks():
    def part(name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> dict[str, IndexedTensor]:
        shard = IndexedShard(offset, (2,) * len(offset), "", 0, 0, "")
        return {name: IndexedTensor(torch.float32, shape, [shard])}

    held = [("a", (4, 4), (0, 0)), ("a", (4, 4), (0, 2)), ("a", (4, 4), (2, 0)), ("b", (6,), (4,)), ("c", (), ())]
    table = np.concatenate([parts._rows(number, part(*one)) for number, one in enumerate(held)])

    def chosen(name: str, *offset: int) -> list[int]:
        shape = (1,) * len(offset)
        return parts.overlapping(table, [TensorShard(name, torch.empty(shape), shape, offset)])

    assert [chosen("a", 0, 0), chosen("a", 1, 3), chosen("a", 3, 1), chosen("c")] == [[0], [1], [2], [4]]
    assert chosen("b", 0) == [3], "nothing overlaps, and the reader reports the shape"
    assert chosen("d", 0) == [] == parts.overlapping(table, []) == parts.overlapping(table[:0], [])
