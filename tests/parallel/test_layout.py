"""Layouts that cannot work are rejected before anything is built, with the nearest layouts that work."""

from __future__ import annotations

import pytest

from core.config import load
from core.errors import ConfigError
from parallel.layout import ParallelConfig, nearest
from train.config import TrainConfig, check

SMALL = ["model.vocab_size=320", "training.global_batch_size=8", "training.micro_batch_size=1", "training.seq_len=64"]


def refusal(world_size: int, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(load("train", TrainConfig, [*SMALL, *overrides]), world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    "world_size, overrides, message",
    [
        (4, ["parallel.tp=3"], "parallel.tp=3: tp = 3 must divide the world's 4 ranks; try 1, 2 or 4"),
        (8, ["parallel.dp_replicate=4", "parallel.tp=4"], "parallel.dp_replicate=4: dp_replicate * tp = 16 must divide the world's 8 ranks; try 1 or 2"),
        (8, ["parallel.dp_shard=3", "parallel.tp=2"], "parallel.dp_shard=3: times pp * dp_replicate * cp * tp = 2"),
        (4, ["parallel.ep=3"], "parallel.ep=3: ep * etp = 3 must divide dp_shard * cp * tp = 4 ranks; try 1, 2 or 4"),
        (4, ["parallel.tp=4"], "parallel.tp=4: must divide the model's key/value heads of 2; try 1 or 2"),
        (2, ["parallel.tp=2", "model.vocab_size=321"], "parallel.tp=2: must divide the model's vocabulary of 321"),
        (2, ["parallel.tp=2", "model.shared_expert_hidden_size=15"], "must divide the model's shared expert's hidden size of 15; try 1"),
        (3, ["parallel.ep=3", "training.global_batch_size=6"], "parallel.ep=3: must divide the model's 8 experts; try 1, 2"),
        (2, ["parallel.ep=2", "model.moe_every=0"], "parallel.ep=2: the model has no routed experts; try 1"),
        (4, ["parallel.etp=4", "model.expert_hidden_size=48"], "must split the expert hidden size of 48 into multiples of 8; try 1"),
        (3, [], "training.global_batch_size=8: must divide into dp_replicate * dp_shard = 3 equal parts, or change launch.processes; try 3, 6 or 9"),
        (4, ["training.micro_batch_size=3"], "training.micro_batch_size=3: must divide a rank's 2 sequences; try 1 or 2"),
        (2, ["parallel.tp=2", "training.seq_len=63"], "training.seq_len=63: must divide into tp=2 equal parts of the"),
        (2, ["parallel.cp=2", "model.attention_chunk_size=32", "training.seq_len=80"], "training.seq_len=80: must divide into cp=2 parts of whole chunks of 32; try 64 or 128"),
        (4, ["parallel.cp=4", "model.attention_chunk_size=32"], "parallel.cp=4: training.seq_len=64 has only 2 whole chunks of 32; try 1 or 2"),
        (2, ["parallel.cp=2", "model.attention_chunk_size=null", "training.seq_len=81"], "training.seq_len=81: must divide into cp=2 parts; try 80 or 82"),
        (4, ["parallel.cp=2", "parallel.tp=2", "model.attention_chunk_size=9", "training.seq_len=54"], "parts of whole chunks of 9, and each into tp=2; try 36 or 72"),
        (4, ["parallel.cp=4", "parallel.cp_method=ulysses"], "cp=4: must divide the 2 key/value heads of a rank for cp_method=ulysses; or take another parallel.cp_method: gather or ring; try 1 or 2"),
        (2, ["model.attention_chunk_size=16", "data.align=24"], "data.align=24: must be a multiple of the model's attention chunk of 16"),
        (2, ["data.align=48"], "training.seq_len=64: must be a multiple of data.align=48"),
        (2, ["parallel.tp=0"], "parallel.tp=0: must be positive"),
        (2, ["parallel.dp_shard=all"], "parallel.dp_shard=all: must be a number of ranks; try auto"),
        (2, ["parallel.ep=2", "parallel.dispatch=deepep", "precision=bf16"], "DeepEP is not installed: pip install"),
        (2, ["parallel.ep=2", "parallel.dispatch=deepep"], "parallel.dispatch=deepep: supports bfloat16 only: add "),
        (2, ["parallel.engine=deepspeed", "parallel.reduce_every=step"], "parallel.reduce_every=step: configures FSDP2"),
        (2, ["parallel.reduce_dtype=bfloat16", "parallel.reduce_every=step"], "reduce_every=step: would also sum micro-"),
        (2, ["parallel.engine=deepspeed", "parallel.gather_experts=step"], "parallel.gather_experts=step: configures"),
        (4, ["parallel.ep=4", "parallel.exchange_node_size=3"], "exchange_node_size=3: must divide ep * etp = 4 ranks into nodes that have all etp = 1 slices of an expert; try 1, 2 or 4"),
        (4, ["parallel.ep=2", "parallel.etp=2", "parallel.exchange_node_size=1"], "into nodes that have all etp = 2 slices of an expert; try 2 or 4"),
        (4, ["parallel.ep=4", "parallel.exchange_node_size=2", "parallel.dispatch=all_gather"], "exchange_node_size=2: is for dispatch=all_to_all, not all_gather: omit it"),
        (1, ["precision=fp32", "precision.param_dtype=bfloat16"], "precision.param_dtype=bfloat16: needs bfloat16 matmuls"),
    ],
    ids=lambda value: " ".join(value) or "batch" if isinstance(value, list) else None,
)  # fmt: skip
def test_impossible_layouts_are_rejected(world_size, overrides, message):
    assert message in refusal(world_size, *overrides)


@pytest.mark.parametrize(
    "world_size, degrees, wanted",
    [
        (8, {}, {"dp_shard": 8}),
        (8, {"tp": 2, "ep": 8}, {"dp_shard": 4, "tp": 2, "ep": 8}),
        (8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    ],
)
def test_auto_fills_the_world(world_size, degrees, wanted):
    layout = ParallelConfig(**degrees).resolve(world_size)
    assert layout.axes == wanted and layout.world_size == world_size
    assert layout.dp_replicate * layout.efsdp * layout.ep * layout.etp * layout.pp == world_size


def test_the_nearest_values_come_in_order():
    assert nearest([1, 2, 4, 8, 16, 32], 12) == [2, 4, 8, 16]
    assert nearest([1, 2], 7) == [1, 2]


@pytest.mark.parametrize("cp, tp, chunk", [(2, 1, 16), (4, 1, 16), (2, 2, 16), (3, 2, 5), (2, 1, None), (1, 4, 16)])
def test_the_shortest_sequence_that_fits(cp, tp, chunk):
    """Compare with a search over all lengths."""
    model = load("train", TrainConfig, [f"model.attention_chunk_size={chunk or 'null'}"]).model
    layout = ParallelConfig(cp=cp, tp=tp).resolve(cp * tp)

    def legal(length: int) -> bool:
        try:
            layout.check_seq_len(model, length)
        except ConfigError:
            return False
        return True

    for length in range(1, 140):
        found = layout.padded_length(model, length)
        assert legal(found) and found >= length
        assert found <= next(n for n in range(length, 1000) if legal(n)) or found == length, (length, found)
