"""A model with vision computes under every layout what it computes in one process.

Some sequences, micro-batches, ranks and steps have no image: see `train.certify.worker.PICTURES`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.layouts import LAYOUTS, deep
from core.exit_codes import RankFailure
from launch.rank_pool import Pool
from model.config import ModelConfig
from model.vision.config import VisionConfig
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import EngineKind, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from parallel.vision.exchange import PURPOSE, tile_share
from precision.config import Compute, PrecisionConfig
from tests.distributed.test_cost import assert_formulas_hold
from tests.support.bugs import BuggyRanks, run_with_bug
from tests.support.models import placed_here
from train.certify.compare import Comparison, compare, compare_resumed
from train.certify.plan import Trial, compare_layouts, shrink
from train.certify.worker import SEED, SEQ_LEN, CertifyCase, RankResults, SyntheticLoader, run_cases
from train.engine.images import batch_images, load_tiles
from train.optim.config import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)


def seeing(top_k: int = 1) -> ModelConfig:
    """Return the model of `deep` with a vision encoder."""
    return shrink(replace(deep(top_k), vision=VisionConfig(image_token_id=63)), ParallelConfig(pp=4))


CASE = CertifyCase(seeing(), PrecisionConfig(Compute.float64), SGD, steps=3)


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    return ranks(1, run_cases, ParallelConfig(), {"run": CASE})[0]["run"]


def differing(ranks, alone, count: int, config: ParallelConfig, bug: str | None = None) -> list[Comparison]:
    found = BuggyRanks(ranks, bug)(count, run_cases, config, {"run": CASE})
    return [one for one in compare("run", alone, [rank["run"] for rank in found], CASE) if not one.passed]


@pytest.mark.parametrize("name", ["fsdp2", "tp2 + cp2", "pp2 zbv"])
def test_three_steps_are_those_of_one_process(ranks, alone, name):
    assert differing(ranks, alone, *LAYOUTS[name]) == []


@pytest.mark.parametrize(
    "bug, name, first",
    [
        ("rows_placed_before_the_scatter", "tp2", "embedding.weight"),
        pytest.param("tiles_in_reverse_order", "fsdp2", "embedding.weight", marks=pytest.mark.slow),
        pytest.param("tiles_in_reverse_order", "pp2 zbv", "embedding.weight", marks=pytest.mark.slow),
        pytest.param("class_token_first", "fsdp2", "embedding.weight", marks=pytest.mark.slow),
        pytest.param("class_token_first", "pp2 zbv", "embedding.weight", marks=pytest.mark.slow),
        pytest.param("text_after_pictures_not_learnt", "tp2", "embedding.weight", marks=pytest.mark.slow),
        ("scaled_by_participation", "fsdp2", "vision.class_token"),
        pytest.param("tiles_on_two_ranks", "tp2", "vision.class_token", marks=pytest.mark.slow),
        pytest.param("tiles_on_two_ranks", "cp2 ring", "vision.class_token", marks=pytest.mark.slow),
        pytest.param("encoder_not_summed_over_tp", "tp2", "vision.class_token", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_blamed(ranks, alone, bug, name, first):
    """Bugs that only change the encoder's gradients show in it first."""
    found = differing(ranks, alone, *LAYOUTS[name], bug)
    assert [one.first for one in found if one.name == "run: gradients"] == [first], found


@pytest.mark.parametrize(
    "bug, name",
    [
        ("encoder_skipped_without_images", "fsdp2"),
        pytest.param("shares_that_overlap", "cp2 gather", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_stops_the_run(bug, name):
    """Use a separate pool, since ranks whose collectives differ are of no further use."""
    pool, (count, config) = Pool(), LAYOUTS[name]
    try:
        with pytest.raises(RankFailure):
            pool(count, run_with_bug, bug, run_cases, config, {"run": CASE}, timeout_s=20.0)
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.muon])
def test_a_checkpoint_resumes_under_other_layouts(ranks, tmp_path, kind):
    """Save before the last step under tp and cp. Others continue with the encoder's weights and moments."""
    case = replace(CASE, optimizer=OptimizerConfig(kind=kind, lr=1e-2), save=tmp_path / "saved", steps=5)

    def run(name: str, case: CertifyCase) -> list[RankResults]:
        count, config = LAYOUTS[name]
        return [rank["run"] for rank in ranks(count, run_cases, config, {"run": case})]

    one = ranks(1, run_cases, ParallelConfig(), {"run": replace(case, save=None)})[0]["run"]
    assert [c for c in compare("saved", one, run("tp2 + cp2", case), case) if not c.passed] == []
    resumed = replace(case, save=None, resume=tmp_path / "saved")
    for name in ("fsdp2", "pp2 zbv", "cp2 gather"):
        assert [c for c in compare_resumed(name, one, run(name, resumed), case) if not c.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Recompute.full, Recompute.selective])
@pytest.mark.parametrize("name", ["fsdp2", "hsdp 2x2", "tp2 + cp2", "pp2 zbv", "pp2 one_f_one_b"])
def test_recomputation_changes_nothing(ranks, alone, name, mode):
    count, config = LAYOUTS[name]
    assert differing(ranks, alone, count, replace(config, recompute=mode)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", [("fsdp2", Recompute.none), ("tp2 + cp2", Recompute.full)])
def test_compiled_encoder_layers_compute_the_same(ranks, alone, name, mode):
    """The number of tiles differs between ranks, micro-batches and steps. Frames must be compiled, not left eager."""
    count, config = LAYOUTS[name]
    found = ranks(count, compiled, replace(config, compile=True, recompute=mode), timeout_s=600.0)
    for one in compare("compiled", alone, [rank for rank, _ in found], CASE):
        assert one.passed, one
    assert all(graphs >= 3 for _, graphs in found), [graphs for _, graphs in found]


def compiled(parallel: ParallelConfig) -> tuple[RankResults, int]:
    """Run the case. Return its results, and how often a frame was compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = run_cases(parallel, {"run": CASE})["run"]
    return found, torch._dynamo.utils.counters["frames"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("name", ["fsdp2", "hsdp 2x2", "tp2", "cp2 ring", "tp2 + cp2", "pp2 zbv", "pp2 + cp2"])
def test_the_formulas_count_the_encoders_bytes(ranks, name, mode):
    """Compare the bytes sent in a step of 6 tiles of 4 tokens, and those of parameters and optimizer state."""
    count, config = LAYOUTS[name]
    config = replace(config, recompute=mode)
    sent = assert_formulas_hold(ranks, CASE.model, count, config, image_tokens=24)
    assert any(purpose == PURPOSE for _, purpose in sent) == (config.cp * config.tp > 1)


def encoded_and_sent(parallel: ParallelConfig) -> tuple[list[int], int, Tensor | None]:
    """Return the tiles that this rank encodes, the bytes that it sends to others, and its logits of the first batch."""
    placed = placed_here(CASE.model, parallel, CASE.precision, SEED)
    vision, meshes = CASE.model.vision, placed.meshes
    assert vision is not None
    batch = SyntheticLoader(CASE.model.vocab_size, vision=vision).batch(0, 0, 4)
    assert batch.images is not None
    load_tiles(batch.images, meshes, 4)
    context = placed.sequence_context(batch.positions_BT)
    (context.images,) = batch_images(placed, batch.images, 4)
    meshes.traffic.take()
    logits = placed.outputs(placed.context_shard(SEQ_LEN).take(batch.tokens_BT), context)
    sent = sum(size for (_, purpose), size in meshes.traffic.take().items() if purpose == PURPOSE)
    return list(tile_share(meshes, 6)), sent, logits


@pytest.mark.slow
def test_tiles_are_shared_evenly_and_sent_once(ranks):
    ((_, _, whole),) = ranks(1, encoded_and_sent, ParallelConfig())
    found = ranks(4, encoded_and_sent, ParallelConfig(tp=2, cp=2))
    assert [tiles for tiles, _, _ in found] == [[0], [1, 2], [3], [4, 5]]
    assert sum(sent for _, sent, _ in found) == 6 * 4 * CASE.model.hidden_size * 8  # 6 tiles of 4 tokens, float64
    columns = [[*range(16), *range(48, 64)], [*range(16, 48)]]
    for rank, (_, _, logits) in enumerate(found):
        part = whole[:, columns[rank // 2]].chunk(2, dim=-1)[rank % 2]
        assert torch.allclose(logits, part, rtol=1e-9, atol=1e-12)


MORE = {
    "all axes": (8, ParallelConfig(tp=2, cp=2, pp=2)),
    "all axes, hsdp": (8, ParallelConfig(dp_replicate=2, cp=2, tp=2, ep=2, recompute=Recompute.full)),
    "cp4 + tp2": (8, ParallelConfig(cp=4, tp=2)),
    "etp2 + cp2": (4, ParallelConfig(cp=2, etp=2)),
    "pp2 + tp2 zero bubble": (4, ParallelConfig(pp=2, tp=2, schedule=PipelineSchedule.interleaved_zero_bubble)),
}
ZERO = {
    f"zero{stage} {name}": (count, replace(config, engine=EngineKind.deepspeed, zero=ZeroConfig(stage=stage)))
    for stage in (1, 2, 3)
    for name, (count, config) in {
        "dp2": (2, ParallelConfig()),
        "tp2": (4, ParallelConfig(tp=2)),
        "cp2 recomputed": (2, ParallelConfig(cp=2, recompute=Recompute.full)),
        "dp2 selective": (2, ParallelConfig(recompute=Recompute.selective)),
    }.items()
}
"""Layouts besides those of the page."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MORE, *ZERO])
def test_every_layout_passes_with_vision(ranks, name):
    """Compare resumed checkpoints, balancing terms and float32 too. Stage 3 has no routed experts."""
    count, config = (LAYOUTS | MORE | ZERO)[name]
    model = replace(seeing(), layer_list=[seeing().blocks[0]] * 4) if name in ZERO else seeing(2)
    (outcome,) = compare_layouts(model, [Trial((), config, count)], 3, ranks)
    assert outcome.passed, outcome.failures()
