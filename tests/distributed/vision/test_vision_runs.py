"""Runs on documents with pictures, from files to predictions, do on several ranks what they do in one process.

`test_vision.py` compares a model on synthetic batches. Here the trainer, its loader and its corpus are those of a run.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.images.batch import BatchImages
from data.loader import IGNORED, Batch, Loader
from model import head
from precision.config import Compute, PrecisionConfig
from tests.distributed.test_data_parallel import same_sequences_on_every_rank
from tests.distributed.vision.test_vision import CASE
from tests.support.bugs import planted, replaces
from tests.support.mixed import write_documents
from tests.support.tiny import EXACT, trainer
from tests.train.vision.test_vision_run import VISION, data_of
from train.certify.compare import compare
from train.certify.worker import RankResults, copy_blocks
from train.engine import images as engine_images
from train.eval.answers import answers
from train.eval.held_out import held_out_loss, predictions
from train.trainer import Trainer

STEPS = 3
LAYOUTS = {
    "fsdp2": (2, ["training.micro_batch_size=4"]),
    "fsdp4": (4, []),
    "tp2": (2, ["parallel.tp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "cp2 ring": (2, ["parallel.cp=2", "parallel.cp_method=ring"]),
    "pp2": (2, ["parallel.pp=2", "training.micro_batch_size=1"]),
    "tp2 + cp2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "pp2 + fsdp2": (4, ["parallel.pp=2", "parallel.schedule=zbv", "training.micro_batch_size=1"]),
    "pp2, all stages": (2, ["parallel.pp=2", "parallel.vision.stages=all", "training.micro_batch_size=1"]),
    "fsdp2, shared tiles": (2, ["parallel.vision.over_data_parallel=true"]),
    "zero2": (2, ["parallel.engine=deepspeed", "parallel.zero.stage=2", "precision=fp32"]),
}


@dataclass
class RunOnRank:
    """What a rank computed in a run, and what it read. `batches`: this rank's sequences of each step with the tiles that
    it encodes. `predicted`: this rank's columns of the first held-out sequences and its predictions there, if any.
    """

    place: tuple[int, int]
    """The rank among those with other sequences, and among those with parts of the same ones."""
    results: RankResults
    batches: list[Batch]
    answers: dict[str, float]
    predicted: tuple[Tensor, Tensor] | None


def train_on_rank(root: Path, overrides: Sequence[str], bug: str | None = None) -> RunOnRank:
    """Train, evaluate and predict on this rank."""
    with planted(bug):
        run = trainer(root, "run", [*EXACT, *overrides])
        placed, meshes = run.engine.placed, run.meshes
        place = (meshes.dp.rank, meshes.sequence.rank)
        results, batches = _trained(run)
        bytes_V = torch.from_numpy(run.corpus.tokenizer.token_bytes())
        loader, size = run.loaders["main"], 2
        results.held_out = held_out_loss(placed, loader, bytes_V, 24, size, run.weights).loss
        found = answers(placed, loader, "mixed", 24, size, run.corpus)
        assert found is not None
        batch = loader.held_out("mixed", 0, size)
        assert batch.images is not None and any(batch.images.tiles)
        with torch.no_grad():
            predicted = predictions(placed, batch)
        columns = placed.context_shard(batch.tokens_BT.shape[1]).columns
        return RunOnRank(place, results, batches, asdict(found), None if predicted is None else (columns, predicted[0]))


def _trained(run: Trainer) -> tuple[RankResults, list[Batch]]:
    results, batches = RankResults(), []
    get, clip, engine = run.batches.get, run.engine.clip, run.engine

    def keep_batch(step: int) -> Batch:
        batch = get(step)
        assert batch.images is not None
        batches.append(replace(batch, images=replace(batch.images, decode=None)))  # which cannot be sent to the test
        return batch

    def keep_gradients(limit: float | None) -> Tensor:
        results.gradients = results.gradients or copy_blocks(engine.gradients())
        return clip(limit)

    run.batches.get, engine.clip = keep_batch, keep_gradients  # type: ignore[method-assign]
    for step in range(STEPS):
        metrics = run.train_step(step)
        results.loss.append(metrics.loss.item())
        results.norm.append(metrics.gradient_norm.item())
        for key, value in metrics.balance.items():
            results.balance[key].append(value)
    results.weights = copy_blocks(engine.weights())
    buffers = engine.placed.model.named_buffers()
    results.routers = {name: buffer.clone() for name, buffer in buffers if "balance" in name}
    run.batches.close()
    return results, batches


def images_of(batch: Batch) -> BatchImages:
    assert batch.images is not None
    return batch.images


def global_batch(ranks: Sequence[RunOnRank], step: int) -> list[Any]:
    """Return what the ranks read in a step: tokens, labels, positions, rows, references of tiles, and the pixels in the
    order in which the sequences show them.
    """
    holders = {run.place: run.batches[step] for run in reversed(ranks)}  # of a pipeline's stages the first
    owners = [batch for (_, part), batch in sorted(holders.items()) if part == 0]
    whole = owners[0]
    for other in owners[1:]:
        whole = replace(whole.concat(other), images=images_of(whole).concat(images_of(other)))
    pixels = []
    for dp in sorted({place[0] for place in holders}):
        shares = [images_of(batch).pixels for place, batch in sorted(holders.items()) if place[0] == dp]
        pixels += [part for micro_batch in zip(*shares, strict=True) for part in micro_batch]
    return [*whole.tensors, images_of(whole).rows_BT, images_of(whole).tiles, torch.cat(pixels)]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def joined(ranks: Sequence[RunOnRank]) -> Tensor:
    """Return the predictions of all ranks as one tensor [B, T]."""
    parts = [run.predicted for run in ranks if run.predicted is not None]
    whole = torch.full((len(parts[0][1]), max(int(columns.max()) for columns, _ in parts) + 1), -1)
    for columns, tokens in parts:
        whole[:, columns] = tokens
    return whole


def differences(alone: RunOnRank, ranks: Sequence[RunOnRank], compute: Compute = Compute.float64) -> list[str]:
    """Name what differs from the run in one process."""
    case = replace(CASE, precision=PrecisionConfig(compute))
    found = [str(one) for one in compare("run", alone.results, [r.results for r in ranks], case) if not one.passed]
    kinds = ("tokens", "labels", "positions", "sources", "rows", "tiles", "pixels")
    for step in range(STEPS):
        pairs = zip(kinds, global_batch([alone], step), global_batch(ranks, step), strict=True)
        found += [f"{kind} of step {step}" for kind, one, other in pairs if not same(one, other)]
    if any(run.answers != alone.answers for run in ranks):
        found.append("answers")
    return found + ([] if torch.equal(joined([alone]), joined(ranks)) else ["predictions"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("pictures")
    write_documents(root / "in", count=150)
    return [*VISION, *data_of(root), "training.seq_len=96"]


@pytest.fixture(scope="module")
def alone(ranks, corpus, tmp_path_factory) -> RunOnRank:
    (found,) = ranks(1, train_on_rank, tmp_path_factory.mktemp("one"), corpus)
    read = [global_batch([found], step) for step in range(STEPS)]
    assert all(len(pixels) > 8 for *_, pixels in read) and found.answers["documents"] > 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_compute_what_one_process_does(ranks, corpus, alone, tmp_path, name):
    """Compare losses, norms, gradients, weights, batches with their pixels, held-out losses, answers, predictions.
    DeepSpeed computes in float32.
    """
    count, layout = LAYOUTS[name]
    compute = Compute.float32 if "precision=fp32" in layout else Compute.float64
    assert differences(alone, ranks(count, train_on_rank, tmp_path, [*corpus, *layout]), compute) == []


@replaces(engine_images, "tile_share")
def tiles_of_a_neighbour(honest, meshes, tiles, ranks):
    """A rank decodes the right number of tiles, from the other end of the micro-batch."""
    mine = honest(meshes, tiles, ranks)
    return range(tiles)[::-1][mine.start : mine.stop]


@replaces(head, "_likeliest")
def words_of_one_rank(honest, sums, shard):
    """Each rank predicts from its own part of the vocabulary."""
    return sums.likeliest_T


@replaces(Loader, "_assemble")
def no_label_at_image_end(honest, self, *arguments):
    """The first token after a picture is not predicted."""
    batch = honest(self, *arguments)
    batch.labels_BT[batch.tokens_BT == self.corpus.images.ids.end] = IGNORED
    return batch


NOTICED = {
    (no_label_at_image_end.__name__, "tp2"): ["run: loss", "labels of", "held-out loss"],
    (same_sequences_on_every_rank.__name__, "fsdp2"): ["gradients", "tokens of", "pixels of"],
    (tiles_of_a_neighbour.__name__, "fsdp2"): ["gradients", "pixels of", "held-out loss"],
    (tiles_of_a_neighbour.__name__, "cp2"): ["gradients", "pixels of", "held-out loss"],
    (tiles_of_a_neighbour.__name__, "pp2"): ["gradients", "pixels of", "held-out loss"],
    (words_of_one_rank.__name__, "tp2"): ["predictions"],
}


@pytest.mark.slow
@pytest.mark.parametrize("bug, name", NOTICED)
def test_the_comparison_notices(ranks, corpus, alone, tmp_path, bug, name):
    count, layout = LAYOUTS[name]
    found = differences(alone, ranks(count, train_on_rank, tmp_path, [*corpus, *layout], bug))
    for what in NOTICED[bug, name]:
        assert any(what in one for one in found), (what, found)
