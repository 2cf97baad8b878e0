"""Data-parallel ranks that share tiles compute what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.layouts import LAYOUTS
from data.images.batch import BatchImages, TileRef
from parallel.layout import ParallelConfig, Recompute
from parallel.vision.config import EncoderStages, VisionParallelConfig
from parallel.vision.exchange import PURPOSE
from tests.distributed.test_cost import assert_formulas_hold
from tests.distributed.vision.test_ahead import encoded
from tests.distributed.vision.test_vision import CASE, MORE, ZERO, seeing
from tests.support.bugs import BuggyRanks
from train.certify.compare import compare
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import run_cases

SHARED = VisionParallelConfig(over_data_parallel=True)
LATER = VisionParallelConfig(EncoderStages.all, over_data_parallel=True)
OVER_DATA = {
    name: (count, replace(config, vision=SHARED))
    for name, (count, config) in (LAYOUTS | MORE | ZERO).items()
    if name in ("fsdp2", "hsdp 2x2", "ep2", "cp2 + fsdp2", "all axes, hsdp", "zero2 dp2", "zero3 dp2")
} | {
    "tp2 + fsdp2, recomputed": (4, ParallelConfig(tp=2, recompute=Recompute.full, vision=SHARED)),
    "pp2 + fsdp2": (4, ParallelConfig(pp=2, vision=SHARED)),
    "pp2 + fsdp2, all stages": (4, ParallelConfig(pp=2, vision=LATER)),
    "pp2 + tp2 + fsdp2, all stages": (8, ParallelConfig(pp=2, tp=2, vision=LATER)),
}


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    return ranks(1, run_cases, ParallelConfig(), {"run": CASE})[0]["run"]


def failed(ranks, alone, name: str, bug: str | None = None) -> set[str]:
    count, config = OVER_DATA[name]
    found = BuggyRanks(ranks, bug)(count, run_cases, config, {"run": CASE})
    return {one.name for one in compare("run", alone, [rank["run"] for rank in found], CASE) if not one.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OVER_DATA if name not in ZERO])
def test_three_steps_are_those_of_one_process(ranks, alone, name):
    assert failed(ranks, alone, name) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "pp2 + fsdp2, all stages", "zero2 dp2", "zero3 dp2"])
def test_layouts_that_share_tiles_over_data_pass(ranks, name):
    """Compare resumed checkpoints, balancing terms, held-out loss and float32 too."""
    count, config = OVER_DATA[name]
    model = replace(seeing(), layer_list=[seeing().blocks[0]] * 4) if name in ZERO else seeing(2)
    (outcome,) = compare_layouts(model, [Trial((), config, count)], 3, ranks)
    assert outcome.passed, outcome.failures()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "pp2 + fsdp2"])
def test_images_of_another_micro_batch_are_noticed(ranks, alone, name):
    assert {"run: loss", "run: gradient norm"} <= failed(ranks, alone, name, "images_of_another_micro_batch")


@pytest.mark.slow
def test_data_parallel_ranks_encode_equal_shares(ranks):
    """The 6 tiles of a step are in the first 3 sequences, which are the first rank's."""
    shared, separate = OVER_DATA["fsdp2"][1], LAYOUTS["fsdp2"][1]
    assert [sum(sizes) for sizes in ranks(2, encoded, separate)] == [6, 0]
    assert [sum(sizes) for sizes in ranks(2, encoded, shared)] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "cp2 + fsdp2", "pp2 + fsdp2", "pp2 + fsdp2, all stages"])
def test_the_formulas_count_the_bytes_over_data(ranks, name):
    count, config = OVER_DATA[name]
    sent = assert_formulas_hold(ranks, CASE.model, count, config, image_tokens=24)
    assert any(purpose == PURPOSE for _, purpose in sent)


def test_micro_batches_take_sequences_of_each_rank():
    tiles = [[TileRef("s", number, 0)] for number in range(8)]
    images = BatchImages(torch.arange(8)[:, None], tiles, 4)
    found = images.interleaved(2, 2, 1)
    assert [one[0].image for one in found.tiles] == found.rows_BT[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert found.local_rows_BT[:, 0].tolist() == [4, 5, 6, 7], "those of rank 1"
    assert images.interleaved(2, 4, 0).tiles == tiles and found.ranks == 2
