"""Online filtering of documents with pictures: a sequence's loss is that with its pictures, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.attention.plan import ForwardContext
from tests.support.mixed import write_documents
from tests.support.tiny import EXACT, trainer
from tests.train.test_online_run import ONLINE, stepped
from tests.train.vision.test_vision_run import VISION, data_of
from train.engine.images import batch_images, load_tiles
from train.loss import IGNORED
from train.trainer import Trainer

pytestmark = pytest.mark.slow  # 60 s

STEPS = 4


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pictures")
    write_documents(root / "in")
    sizes = ["training.steps=4", "training.global_batch_size=4", "training.micro_batch_size=2", "online.every=2"]
    sizes += ["training.seq_len=64"]  # cp cuts sequences into whole attention chunks
    return [*VISION, *data_of(root), *EXACT, *ONLINE, *sizes]


@torch.no_grad()
def losses_of(run: Trainer, ordinals: list[int], black: bool = False) -> np.ndarray:
    """Compute the loss of each sequence by itself, from the logits that the model gives with its pictures."""
    found = []
    for ordinal in ordinals:
        batch = run.loaders["main"].samples([ordinal])
        load_tiles(batch.images, run.engine.placed.meshes, 1)
        if black:
            batch.images.pixels = [torch.zeros_like(pixels) for pixels in batch.images.pixels]
        [images] = batch_images(run.engine.placed, batch.images, 1)
        context = ForwardContext(batch.positions_BT)
        context.images = images
        logits = run.engine.placed.model(batch.tokens_BT, context)
        logp, labels = logits.log_softmax(-1)[0], batch.labels_BT[0]
        assert (labels[batch.tokens_BT[0, 1:].eq(5).nonzero().flatten()] == IGNORED).all(), "placeholders are no labels"
        found.append(float(-logp[torch.arange(len(labels)), labels.clamp_min(0)][labels >= 0].mean()))
    return np.array(found)


def test_windows_are_chosen_by_losses_with_pictures(words, tmp_path):
    run = trainer(tmp_path, "run", words)
    online = run.callbacks[0]
    for step in (0, 1):
        online.before_step(step)
        run.train_step(step)
    online.before_step(2)
    scored = online._losses(run.phase(2), 2, list(range(16)))
    assert scored == pytest.approx(losses_of(run, list(range(16))), rel=1e-9)
    assert scored != pytest.approx(losses_of(run, list(range(16)), black=True), rel=1e-6), "control: black pictures"
    shown = run.loaders["main"].samples(range(16)).images.tiles
    assert sum(map(bool, shown)) > 8, "most sequences have pictures"


def windows(root: Path, name: str, words: list[str]) -> dict[str, Any]:
    return stepped(trainer(root, name, words), STEPS)


@pytest.mark.parametrize("axis", ["dp_shard", "cp", "pp"])
def test_two_ranks_take_the_same_sequences(words, tmp_path, ranks, axis):
    alone = ranks(1, windows, tmp_path, "one", words)[0]
    two = ranks(2, windows, tmp_path, "two", [*words, f"parallel.{axis}=2"])
    assert two[0]["windows"] == two[1]["windows"] == alone["windows"]
    assert two[0]["losses"] == pytest.approx(alone["losses"], rel=1e-9)
