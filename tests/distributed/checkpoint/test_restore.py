"""Generation and evaluation of a run of many ranks give the same results under its layout and in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from parallel.comm.world import connect
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from tests.support.tiny import EXACT, saved
from train.checkpoint.restore import restore
from train.eval.config import GenerateConfig
from train.eval.generate import continue_tokens, placed_logits, placed_model
from train.eval.held_out import held_out_loss


def trained(root: Path, overrides: list[str]) -> None:
    saved(root, "run", overrides, 2)


@torch.no_grad()
def looked_at(directory: Path) -> tuple[dict[str, int], list[int], float]:
    """Restore a run; return its axes, a continuation of a prompt of odd length, and the held-out loss."""
    found = restore(directory, connect())
    config = GenerateConfig(run="", tokens=7, temperature=0)
    tokens = list(continue_tokens(partial(placed_logits, found.placed), [5, 6, 7], 16, config, stop=-1))
    axes = found.placed.meshes.layout.axes
    cached = placed_model(found.placed, 16)
    assert (cached is None) == bool(axes.keys() & {"tp", "cp", "pp"})
    if cached is not None:
        assert list(continue_tokens(cached.next_logits(), [5, 6, 7], 16, config, stop=-1)) == tokens
    bytes_V = torch.ones(320, dtype=torch.int64)
    losses = held_out_loss(found.placed, found.loader(), bytes_V, 3, 2, found.weights())
    return axes, tokens, losses.loss


LAYOUTS = {
    "tp-ep": (2, {"tp": 2, "ep": 2}),
    "etp": (2, {"etp": 2}),
    "pp": (2, {"pp": 2}),
    "pp-v": (2, {"pp": 2, "schedule": "zbv"}),
    "cp": (2, {"cp": 2}),
    "pp-cp": (4, {"pp": 2, "cp": 2}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "pp-cp" else n for n in LAYOUTS])
def test_generation_and_evaluation_do_not_depend_on_the_layout(ranks, small_corpus, tmp_path, name):
    count, degrees = LAYOUTS[name]
    small = ["training.micro_batch_size=1", "training.global_batch_size=8", "training.seq_len=32"]
    overrides = [f"parallel.{key}={value}" for key, value in degrees.items()]
    ranks(count, trained, tmp_path, [*small_corpus, *EXACT, *small, *overrides])
    alone = ranks(1, looked_at, tmp_path / "run")[0]
    together = ranks(count, looked_at, tmp_path / "run")
    wanted = {axis: degree for axis, degree in degrees.items() if axis != "schedule"}
    for axes, tokens, loss in together:
        assert wanted.items() <= axes.items() and alone[0] == {}
        assert tokens == alone[1] and len(tokens) == 7
        assert loss == pytest.approx(alone[2], rel=1e-9)


def claims_differ(odd: int) -> str:
    world = connect()
    try:
        world.agree({"configuration": "a", "code version": "b" if world.rank == odd else "c"})
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_run_other_code_are_named(ranks):
    for odd in (0, 2):
        said = f"code version: rank {odd} has b, the other ranks c: start all ranks alike"
        assert ranks(3, claims_differ, odd) == [said] * 3
    assert ranks(3, claims_differ, 9) == [""] * 3


def test_ranks_fold_with_the_last_axis_fastest():
    """Dense layers use eight ranks as (replicate, shard, tp); experts use the same ranks as (replicate, efsdp, ep)."""
    layout = ParallelConfig(dp_replicate=2, tp=2, ep=2).resolve(8)
    for rank in range(8):
        m = meshes_of_rank(layout, rank)
        found = [axis.rank for axis in (m.dp, m.replicate, m.fsdp, m.tp, m.efsdp, m.experts)]
        assert found == [rank // 2, rank // 4, rank // 2 % 2, rank % 2, rank // 2 % 2, rank % 2]
