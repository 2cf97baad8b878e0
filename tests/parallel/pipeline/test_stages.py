"""How a model is split into stages, and which pipelines are rejected."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from core.config import load
from core.errors import ConfigError
from model.config import ModelConfig
from model.flops import vision_flops
from model.vision.config import VisionConfig
from parallel import layout
from parallel.layout import ParallelConfig
from parallel.pipeline.stages import PipelineSchedule, balanced, layer_costs, stages
from parallel.vision.config import VisionParallelConfig
from tests.parallel.test_layout import SMALL, refusal
from train.config import TrainConfig, check

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODEL = ModelConfig(**SIZES, num_layers=8, dense_hidden_size=48, expert_hidden_size=32)


def test_the_costliest_part_is_as_cheap_as_can_be():
    source = random.Random(5)
    for _ in range(30):
        costs = [source.choice([1.0, 2.0, 5.0, 9.0]) for _ in range(source.randint(3, 9))]
        parts = source.randint(1, 3)
        sizes = balanced(costs, parts)
        assert sum(sizes) == len(costs) and len(sizes) == parts and min(sizes) >= 1

        def highest(bounds: tuple[int, ...], costs: list[float] = costs) -> float:
            ends = [0, *bounds, len(costs)]
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))

        best = min(highest(bounds) for bounds in itertools.combinations(range(1, len(costs)), parts - 1))
        assert highest(tuple(itertools.accumulate(sizes[:-1]))) == best


def test_a_large_head_and_full_attention_cost_more():
    """At 4,096 positions full attention costs more than attention in chunks of 64."""
    assert balanced(layer_costs(MODEL), 2) == [4, 4]
    assert balanced(layer_costs(replace(MODEL, vocab_size=32768)), 2)[1] < 4
    costs = layer_costs(replace(MODEL, attention_chunk_size=64, nope_every=4))
    assert costs[3] > 5 * costs[2]


def test_the_first_stage_has_fewer_layers_if_it_encodes_tiles():
    """The share of the corpus replaces null when a run has opened it."""
    short = replace(MODEL, attention_chunk_size=16, nope_every=0)
    seeing = replace(short, vision=VisionConfig(32, 2, 2, 128, 32, tile_size=8, patch_size=2, image_token_id=63))
    encoder = layer_costs(seeing, image_token_share=0.1)[0] - layer_costs(seeing)[0]
    assert encoder == pytest.approx(vision_flops(seeing.vision, 32).total / 6 / 40)
    assert layer_costs(short, image_token_share=0.1) == layer_costs(short)
    sizes = []
    for share in (None, 0.0, 0.25, 0.5):
        config = ParallelConfig(pp=2, vision=VisionParallelConfig(image_token_share=share)).resolve(2)
        sizes.append(len(config.stages(seeing).layers[0]))
    assert sizes[0] == sizes[1] == 4 > sizes[2] >= sizes[3] >= 1, sizes


def test_ties_go_to_the_even_split():
    """The costly layer gets a stage of its own. Other splits of the six cheap layers would cost the same."""
    assert balanced([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3) == [1, 3, 3]
    assert balanced([1.0] * 8, 4) == [2, 2, 2, 2]


def test_loops_and_vs_give_ranks_their_stages():
    loop = stages(MODEL, 2, PipelineSchedule.interleaved, 2, None)
    v = stages(MODEL, 2, PipelineSchedule.zbv, 2, None)
    assert [loop.of(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [v.of(rank) for rank in range(2)] == [[0, 3], [1, 2]], "the first and the last stage share a rank"
    assert [layer for stage in loop.layers for layer in stage] == list(range(8))
    assert stages(MODEL, 2, PipelineSchedule.one_f_one_b, 1, [7, 1]).layers == (range(7), range(7, 8)), "given"


@pytest.mark.parametrize(
    "world_size, overrides, message",
    [
        (2, ["parallel.schedule=zbv"], "parallel.schedule=zbv: there is no pipeline: add parallel.pp"),
        (2, ["parallel.stages_per_rank=2"], "parallel.stages_per_rank=2: there is no pipeline"),
        (4, ["parallel.pp=4", "parallel.schedule=zbv"], "times 2 stages per rank = 8 stages, more than the model's 4"),
        (2, ["parallel.pp=2", "parallel.layers_per_stage=[4,1]"], "must name 2 stages of at least one layer, 4"),
        (2, ["parallel.pp=2", "parallel.layers_per_stage=[4,0]"], "must name 2 stages of at least one layer, 4"),
        (2, ["parallel.pp=2", "parallel.stages_per_rank=2"], "one_f_one_b has one stage per rank; take another"),
        (2, ["parallel.pp=2", "parallel.schedule=zbv", "parallel.stages_per_rank=3"], "zbv has two stages per rank"),
        (2, ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.stages_per_rank=1"], "needs several stages per rank; try 2 or 4"),
        (2, ["parallel.pp=2", "training.micro_batch_size=8"], "training.micro_batch_size=8: one_f_one_b with pp=2 needs at least 2 micro-batches, but a rank's 8 sequences make 1"),
        (2, ["parallel.pp=2", "parallel.schedule=dualpipev", "training.micro_batch_size=4"], "training.micro_batch_size=4: dualpipev with pp=2 needs at least 4"),
        (2, ["parallel.pp=2", "parallel.schedule=interleaved", "training.global_batch_size=5"], "training.global_batch_size=5: interleaved with pp=2 needs at least 2 micro-batches, in rounds of equal"),
        (4, ["parallel.pp=4", "training.global_batch_size=2"], "training.global_batch_size=2: one_f_one_b with pp=4 needs at least 4 micro-batches"),
        (2, ["parallel.vision.stages=all"], "parallel.vision.stages=all: needs a pipeline: add parallel.pp=2"),
        (2, ["parallel.pp=2", "parallel.vision.stages=all"], "parallel.vision.stages=all: the model has no vision enc"),
        (2, ["parallel.vision.image_token_share=1.5"], "parallel.vision.image_token_share=1.5: must lie between 0"),
        (2, ["parallel.pp=2", "parallel.schedule=zbv", "parallel.compile=true"], "parallel.compile=true: compiled layers cannot defer the gradients"),
        (2, ["parallel.pp=2", "parallel.schedule=zbv", "model.tie_embeddings=true"], "parallel.schedule=zbv: both ends of a V-schedule are on one rank"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_impossible_pipelines_are_rejected(world_size, overrides, message):
    assert message in refusal(world_size, "model.num_layers=4", *overrides)


def test_a_schedule_that_torch_lacks_is_rejected(monkeypatch):
    monkeypatch.setattr(layout, "torch_version", lambda: (2, 12))
    with pytest.raises(ConfigError, match=r"schedule=zbv: needs torch 2.13 or newer, this is .*; try gpipe, one_f_"):
        ParallelConfig(pp=2, schedule=PipelineSchedule.zbv)
    assert ParallelConfig(pp=2, schedule=PipelineSchedule.interleaved).per_rank == 2


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
def test_every_schedule_accepts_some_batch(schedule):
    vocabulary = "data.tokenizer.vocab_size=300"
    asked = [*SMALL, vocabulary, "parallel.pp=2", f"parallel.schedule={schedule.name}"]
    check(load("train", TrainConfig, asked), 2)
