"""Context parallelism: how sequences are divided, each method compared with whole sequences, and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.layouts import tiny
from model.attention.layer import attend
from model.attention.plan import ForwardContext
from parallel import context_parallel as module
from parallel.comm.world import connect
from parallel.context_parallel import ContextShard
from parallel.layout import ContextMethod, ParallelConfig
from parallel.mesh import MeshAxis
from precision.config import Compute, PrecisionConfig
from tests.model.attention.test_segments import figures, inputs, largest, positions
from tests.support.models import meshes_here, placed_here
from train.eval.generate import placed_logits

CHUNK = 8


def division(size: int, chunks: int) -> list[ContextShard]:
    return [
        ContextShard(MeshAxis("cp", size, rank), chunks * CHUNK, CHUNK, ContextMethod.gather) for rank in range(size)
    ]


def test_heads_are_in_order_and_tails_in_reverse():
    found = [[(run.start // 8, run.stop // 8, run.at) for run in one.runs(one.axis.rank)] for one in division(2, 6)]
    assert found == [[(0, 2, 0), (5, 6, 16)], [(2, 4, 0), (4, 5, 16)]]
    assert [shard.columns.tolist() for shard in division(2, 2)] == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_every_position_is_on_one_rank(size, each):
    shards = division(size, size * each)
    assert torch.cat([shard.columns for shard in shards]).sort().values.tolist() == list(range(size * each * CHUNK))
    x_BT = torch.arange(2 * size * each * CHUNK).view(2, -1)
    parts = [shard.take(x_BT) for shard in shards]
    assert all(part.shape[1] == each * CHUNK for part in parts)
    assert torch.equal(shards[0].unshard(parts, 1), x_BT)
    assert all(torch.equal(a, b) for a, b in zip(shards[0].shards(x_BT, 1), parts, strict=True))


def test_causal_work_is_even():
    """All ranks have equally many query-key pairs. In contiguous shards, the last would have 6 times the first's."""
    work = [int((shard.columns + 1).sum()) for shard in division(4, 32)]
    assert max(work) == min(work)
    alone = [int((shard.columns + 1).sum()) for shard in division(4, 4)]
    assert max(alone) > 6 * min(alone), "control"


def over_cp(**options: Any) -> ParallelConfig:
    return ParallelConfig(cp=connect().size, **options)


Case = tuple[ContextMethod, int | None, int]
"""Method, attention chunk size (None: full attention) and sequence length."""


def attended(cases: list[Case], bug: str | None = None) -> list[list[Tensor]]:
    """Return, for each case, this rank's part of the output and of the gradients."""
    meshes, found = meshes_here(over_cp()), []
    for method, chunk, length in cases:
        shard, rows = ContextShard(meshes.cp, length, CHUNK, method), positions(length)
        if bug == "another document":
            rows = rows.clone()
            rows[:, length // 2 :] += 1003
        context = shard.sequence_context(rows, torch.device("cpu"))
        own = (shard.take(x) for x in inputs(length))
        found.append(figures(lambda q, k, v, c=context, n=chunk: module.attend_shard(q, k, v, c, n), *own))
    return found


def whole(found: list[list[list[Tensor]]], place: int, case: Case) -> list[Tensor]:
    shard = ContextShard(MeshAxis("cp", len(found)), case[2], CHUNK, case[0])
    return [shard.unshard([rank[place][figure] for rank in found], 1) for figure in range(4)]


def wanted(chunk: int | None, length: int) -> list[Tensor]:
    plan = ForwardContext(positions(length)).plan(chunk)
    return figures(lambda q, k, v: attend(q, k, v, plan), *inputs(length))


CASES: dict[int, list[Case]] = {
    2: [
        (ContextMethod.gather, None, 48),
        (ContextMethod.ulysses, None, 48),
        (ContextMethod.ring, None, 48),
        (ContextMethod.ring, 64, 48),
        (ContextMethod.gather, 8, 16),
        (ContextMethod.gather, 8, 48),
    ],
    3: [
        (ContextMethod.ring, None, 72),
        (ContextMethod.gather, None, 72),
        (ContextMethod.gather, 8, 72),
        (ContextMethod.gather, 4, 48),
    ],
    4: [(ContextMethod.ring, None, 32), (ContextMethod.gather, 8, 64)],
}


@pytest.mark.parametrize("size", CASES)
def test_shards_attend_as_whole_sequences(ranks, size):
    """Documents start inside chunks. Shards have an even or odd number of chunks, with or without a tail."""
    found = ranks(size, attended, CASES[size])
    for place, case in enumerate(CASES[size]):
        assert largest(whole(found, place, case), wanted(*case[1:])) < 1e-12, case


def test_the_comparison_notices_another_document(ranks):
    cases = [(ContextMethod.gather, None, 48), (ContextMethod.ring, None, 48), (ContextMethod.gather, 8, 48)]
    found = ranks(2, attended, cases, "another document")
    for place, case in enumerate(cases):
        assert largest(whole(found, place, case), wanted(*case[1:])) > 1e-3, case


def asked(lengths: list[int]) -> list[Tensor]:
    placed = placed_here(tiny(1), over_cp(), PrecisionConfig(Compute.float64))
    return [placed_logits(placed, [(7 * i) % 64 for i in range(length)]) for length in lengths]


def test_generation_under_context_parallelism(ranks):
    """Use prompts shorter than a chunk of 16, prompts of whole chunks, and lengths in between."""
    lengths = [1, 15, 32, 41]
    (wanted,), found = ranks(1, asked, lengths), ranks(2, asked, lengths)
    for place, logits_V in enumerate(wanted):
        for rank in found:
            torch.testing.assert_close(rank[place], logits_V, rtol=0, atol=1e-12)
    assert not torch.allclose(wanted[2], wanted[3])
