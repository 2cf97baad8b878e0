"""Several ranks verify the plan of a save once, write the index in parts, and commit nothing that does not fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from parallel.comm.world import connect
from train.checkpoint.index import problem
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import TensorShard


def saves(folder, planted: bool) -> tuple[list[str], int, list[bool]]:
    """Save twice from each rank. Return what was reported, the last progress, and whether a plan was new each time."""
    world, said, new = connect(), list[str](), list[bool]()
    checkpointer = Checkpointer(folder, world, 2, True, said.append)
    whole = torch.arange(12.0).view(4, 3)
    size = 4 // world.size
    offset = 0 if planted else size * world.rank
    state = [TensorShard("model.w", whole[offset : offset + size].clone(), (4, 3), (offset, 0))]
    commits = checkpointer._commit
    seen = lambda path, outcomes, progress: (  # noqa: E731
        new.append(any(one.report is not None for one in outcomes)) or commits(path, outcomes, progress)
    )
    checkpointer._commit = seen
    for step in (1, 2):
        checkpointer.save(step, state, {"tokens": step})
        checkpointer.wait()
    restored = [replace(state[0], tensor=torch.zeros(size, 3))]
    progress = checkpointer.restore(restored)
    equal = progress is None or torch.equal(restored[0].tensor, state[0].tensor)
    return said, (progress or {"step": 0})["step"] if equal else -1, new


def test_ranks_verify_a_plan_once_and_write_the_index_in_parts(ranks, tmp_path):
    found = ranks(2, saves, tmp_path, False)
    assert [(said, step) for said, step, _ in found] == [([], 2)] * 2 and found[0][2] == [True, False]
    names = sorted(path.name for path in (tmp_path / "step-00000002").iterdir())
    assert names == ["COMMITTED", "progress.json", "rank_0.bin", "rank_0.json", "rank_1.bin", "rank_1.json"]
    (tmp_path / "step-00000002" / "rank_1.json").write_text("{}")
    assert problem(tmp_path / "step-00000002") == "is damaged: rank_1.json has 2 bytes instead of 184"


def test_a_save_whose_shards_do_not_fit_is_not_committed(ranks, tmp_path):
    for said, step, _ in ranks(2, saves, tmp_path, True):
        assert step == 0 and len(said) == 2
        assert all("the shards of model.w do not make up its shape" in line for line in said)
