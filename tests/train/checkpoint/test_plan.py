"""Plans that make up every tensor once are verified by sums of hashes; a missing, doubled or moved shard is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CheckpointError
from train.checkpoint.files import read_state, write_shards
from train.checkpoint.index import commit, commit_parts, problem, read_index, write_part
from train.checkpoint.plan import Plan, faulty, plan_of, verify
from train.checkpoint.staging import Staging
from train.checkpoint.state import TensorShard

Entry = tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def tiled(name: str, shape: tuple[int, ...], cuts: list[int]) -> list[Entry]:
    """Return the shards of a tensor that is cut along each dimension into parts of at most `cuts` elements."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length, most in zip(shape, cuts, strict=True):
        ends = [(start, min(most, length - start)) for start in range(0, length, most)]
        boxes = [((*offset, start), (*size, part)) for offset, size in boxes for start, part in ends]
    return [(name, "float32", shape, offset, size) for offset, size in boxes]


@st.composite
def plans(draw) -> list[list[Entry]]:
    """Draw the shards of a few tensors, dealt to four ranks."""
    ranks: list[list[Entry]] = [[] for _ in range(4)]
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        for shard in tiled(f"t{number}", shape, [draw(st.integers(1, 6)) for _ in shape]):
            ranks[draw(st.integers(0, 3))].append(shard)
    return ranks


def verified(ranks: list[list[Entry]]) -> bool:
    return verify([Plan(tuple(rank)).report for rank in ranks])


@given(plans(), st.data())
def test_a_plan_is_verified_only_if_each_element_is_written_once(ranks, data):
    assert verified(ranks) and faulty([Plan(tuple(rank)) for rank in ranks]) == []
    rank = data.draw(st.sampled_from([rank for rank in ranks if rank]))
    place = data.draw(st.integers(0, len(rank) - 1))
    name, dtype, shape, offset, size = rank[place]
    changed = {
        "missing": [],
        "doubled": [rank[place]] * 2,
        "another dtype": [(name, "bfloat16", shape, offset, size)],
        "another shape": [(name, dtype, (*shape, 1), (*offset, 0), (*size, 1))],
        "moved": [(name, dtype, shape, tuple(one + 1 for one in offset), size)] if shape else [],
    }
    rank[place : place + 1] = changed[data.draw(st.sampled_from(sorted(changed)))]
    whole = len(tiled(name, shape, list(size))) == 1 and offset == (0,) * len(shape)
    assert not verified(ranks) or whole, "a tensor that nobody writes, or that is whole in another dtype, is not seen"
    assert verified(ranks) or faulty([Plan(tuple(one)) for one in ranks]) == [name]


def test_two_ranks_that_write_everything_are_found():
    shards = tiled("t", (4, 4), [2, 4])
    assert not verified([shards, shards]) and not verified([shards, []][:1] * 3)


def test_a_plan_is_kept_while_the_shards_stay():
    shards = [TensorShard("w", torch.zeros(2, 3), (4, 3), (2, 0))]
    plan = plan_of(shards)
    assert plan_of([replace(shards[0], tensor=torch.ones(2, 3))], plan) is plan
    assert plan_of([replace(shards[0], offset=(0, 0))], plan) is not plan, "control"


def test_the_formats_of_many_ranks_hold_the_same(tmp_path):
    """Before, rank 0 wrote one index for all ranks (format 2)."""
    whole = torch.arange(12.0).view(4, 3)
    halves = [TensorShard("model.w", whole[start : start + 2], (4, 3), (start, 0)) for start in (0, 2)]
    found = []
    for kind in ("old", "new"):
        path = tmp_path / kind / "step-00000001"
        path.mkdir(parents=True)
        parts = [write_shards(path / f"rank_{rank}.bin", [half]) for rank, half in enumerate(halves)]
        if kind == "old":
            commit(path, parts, {"step": 1})
        else:
            commit_parts(path, [write_part(path, rank, part) for rank, part in enumerate(parts)], {"step": 1})
        target = torch.zeros(3, 3)
        read_state(path, [TensorShard("model.w", target, (4, 3), (1, 0))])
        assert problem(path) == "" and torch.equal(target, whole[1:])
        found.append(read_index(path))
    assert found[0] == found[1]
    (path / "rank_1.json").unlink()
    assert problem(path) == "is damaged: rank_1.json is missing"
    with pytest.raises(CheckpointError, match="do not make up its shape"):
        commit(path, [write_shards(path / "rank_0.bin", halves[:1])], {"step": 1})


def test_staging_memory_is_reused():
    staging, source = Staging(torch.device("cpu")), torch.arange(6.0).view(2, 3)
    state = [TensorShard("a", source.t(), (3, 2), (0, 0)), TensorShard("b", torch.tensor(3), (), ())]
    first = staging.copy(state)
    source += 1
    assert torch.equal(first[0].tensor, source.t() - 1) and first[1].tensor.dtype is torch.int64
    again = staging.copy(state)
    assert [one.tensor.data_ptr() for one in again] == [one.tensor.data_ptr() for one in first]
    assert torch.equal(again[0].tensor, source.t()) and torch.equal(first[0].tensor, source.t()), "the same memory"
    larger = staging.copy([*state, *state])
    assert len({one.tensor.data_ptr() for one in larger}) == 4
