"""Start a sharded run from a Hugging Face checkpoint or from another run. Each rank reads only its part."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model.huggingface import HuggingFaceCheckpoint, checkpoint
from model.tensor_source import whole as whole_tensor
from parallel.sharding import ShardBlock
from tests.support import hf_models
from tests.support.hf_models import like
from tests.support.mixed import write_documents
from tests.support.tiny import EXACT, saved, trainer, whole
from tests.train.vision.test_vision_run import VISION, data_of
from train.checkpoint.init_from import open_model


def started(root: Path, path: Path, overrides: list[str]) -> tuple[dict[str, torch.Tensor], int]:
    """Return the initial weights of a run on these ranks, and the number of tensor bytes that this rank read."""
    read, sizes = checkpoint.read_rows, []

    def counted(*arguments):
        rows = read(*arguments)
        sizes.append(rows.nbytes)
        return rows

    with patch.object(checkpoint, "read_rows", counted):
        placed = trainer(root, "run", [*overrides, *EXACT, *like(path), f"model.init_from={path}"]).engine.placed
    return {name: whole(p, placed.specs[name]) for name, p in placed.model.named_parameters()}, sum(sizes)


@pytest.mark.parametrize("layout", [[], ["parallel.dp_replicate=2"]], ids=["fsdp", "hsdp"])
def test_each_rank_reads_only_its_slices(ranks, small_corpus, tmp_path, layout):
    path = hf_models.save(hf_models.make("maverick", vocab_size=320, num_local_experts=8), tmp_path / "hf")
    source = HuggingFaceCheckpoint(path)
    total = sum(torch.Size(shape).numel() * 4 for shape in source.shapes.values())
    shards = 2 if layout else 4
    for weights, count in ranks(4, started, tmp_path, path, [*small_corpus, *layout]):
        assert set(weights) == set(source.shapes)
        for name, tensor in weights.items():
            assert torch.equal(tensor.float(), whole_tensor(source, name)), name
        assert total / shards <= count <= 1.05 * total / shards


def biases(root: Path, name: str, overrides: list[str], steps: int = 0) -> dict[str, torch.Tensor]:
    """Return the selection biases of this rank's layers after `steps` steps. Save a checkpoint unless `steps` is 0."""
    run = saved(root, name, [*overrides, *EXACT], steps) if steps else trainer(root, name, [*overrides, *EXACT])
    buffers = run.engine.placed.model.named_buffers()
    return {buffer: bias_E.clone() for buffer, bias_E in buffers if buffer.endswith("bias_E")}


@pytest.mark.parametrize("layout", ["parallel.pp=2", "parallel.ep=2"])
def test_every_rank_copies_the_selection_biases(ranks, small_corpus, tmp_path, layout):
    (first,) = ranks(1, biases, tmp_path, "first", small_corpus, 1)
    line = [*small_corpus, f"model.init_from={tmp_path / 'first'}", "parallel.recompute=full", layout]
    found = [pair for rank in ranks(2, biases, tmp_path, "second", line) for pair in rank.items()]
    assert {name for name, _ in found} == set(first)
    assert all(bias_E.any() and torch.equal(bias_E, first[name]) for name, bias_E in found)


ZERO3 = ["parallel.engine=deepspeed", "parallel.zero.stage=3", "precision=fp32", "model.moe_every=0"]
Blocks = dict[str, tuple[ShardBlock, torch.Tensor]]


def weights_of_parts(root: Path, name: str, overrides: list[str]) -> Blocks:
    """Return the blocks of this rank's initial weights and its selection biases."""
    run = trainer(root, name, [*EXACT, *VISION, *data_of(root), *overrides])
    found = {one.spec.info.name: (one.block, one.values.clone()) for one in run.engine.weights()}
    for buffer, bias_E in run.engine.placed.model.named_buffers():
        if buffer.endswith("bias_E"):
            found[buffer] = ShardBlock((0,), tuple(bias_E.shape)), bias_E.clone()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.pp=2"], ["parallel.ep=2"], ["parallel.tp=2", "training.freeze=[decoder]"], ZERO3],
    ids=["fsdp", "pp", "ep", "tp, frozen", "zero3"],
)
def test_parts_of_the_model_under_every_kind_of_layout(ranks, small_corpus, tmp_path, layout):
    write_documents(tmp_path / "in")
    kept = [key for key in layout if key.startswith("model.")]
    sources = {"text": [*small_corpus, "run.seed=1"], "seeing": [*VISION, *data_of(tmp_path), "run.seed=2"]}
    for name, overrides in sources.items():
        ranks(1, biases, tmp_path, name, [*overrides, *kept], 1)
    taken = [f"model.init_parts.decoder={tmp_path / 'text'}", f"model.init_parts.vision={tmp_path / 'seeing'}"]
    opened = {name: open_model(tmp_path / name) for name in sources}
    expected = dict(opened["text"].selection_biases())
    for name, source in opened.items():
        part = [n for n in source.shapes if n.startswith("vision.") == (name == "seeing")]
        expected |= {parameter: whole_tensor(source, parameter) for parameter in part}
    found = ranks(2, weights_of_parts, tmp_path, "both", [*layout, *taken])
    assert {name for rank in found for name in rank} == set(expected)
    for name, (block, values) in [pair for rank in found for pair in rank.items()]:
        place = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
        assert torch.equal(values, expected[name][place].to(values.dtype)), name
