"""Start a sharded run from a Hugging Face checkpoint or from another run. Each rank reads only its part."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model.huggingface import HuggingFaceCheckpoint, checkpoint
from model.tensor_source import whole as whole_tensor
from tests.support import hf_models
from tests.support.hf_models import like
from tests.support.tiny import EXACT, saved, trainer, whole


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
