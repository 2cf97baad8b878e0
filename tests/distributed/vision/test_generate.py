"""Logits of text after pictures are those of one process under every layout, and each picture is encoded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.vision.encoder import VisionEncoder
from model.vision.fusion import Images
from tests.distributed.vision.test_answers import LAYOUTS, prepared
from tests.support.bugs import planted
from tests.support.tiny import saved, trainer
from train.eval.generate import placed_logits
from train.eval.pictures import PicturePrompt

PLACEHOLDER, PER_TILE, SIDE, PICTURES, NEW_TOKENS = 5, 4, 8, 3, 3
FORGETFUL = "pictures are encoded with every token"


def prompt() -> PicturePrompt:
    pixels = torch.randint(0, 256, (PICTURES, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    return PicturePrompt([6, *[PLACEHOLDER] * PER_TILE, 7] * PICTURES, pixels.to(torch.uint8), PLACEHOLDER)


def logits_after(root: Path, words: list[str], bug: str | None = None) -> tuple[Tensor, int]:
    """Return the logits [NEW_TOKENS, V] while the text grows, and how many tiles this rank encoded."""
    placed, pictures = trainer(root, "run", words).engine.placed, prompt()
    tiles: list[int] = []
    encode = VisionEncoder.forward

    def forward(self: VisionEncoder, pixels_N3SS: Tensor) -> Tensor:
        tiles.append(len(pixels_N3SS))
        return encode(self, pixels_N3SS)

    text, found = [0, *pictures.ids, 40, 41], []
    placed.model.eval()
    with pytest.MonkeyPatch.context() as patch, planted(None if bug == FORGETFUL else bug):
        patch.setattr(VisionEncoder, "forward", forward)
        if bug == FORGETFUL:
            patch.setattr(Images, "rows", lambda self, encode: encode())
        for _ in range(NEW_TOKENS):
            found.append(placed_logits(placed, text, pictures))
            text.append(PLACEHOLDER)  # as a model may generate it, which shows no picture
    return torch.stack(found), sum(tiles)


def save_run(root: Path, words: list[str]) -> None:
    saved(root, "run", words)


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the directory of a run with a checkpoint, and its words."""
    root, words = tmp_path_factory.mktemp("alone"), prepared(tmp_path_factory.mktemp("cache"))
    ranks(1, save_run, root, words)
    return root, words


@pytest.fixture(scope="module")
def alone(ranks, trained) -> Tensor:
    ((logits, tiles),) = ranks(1, logits_after, *trained)
    assert tiles == PICTURES and len(logits.unique(dim=0)) == NEW_TOKENS
    return logits


def on_ranks(ranks, trained, root: Path, name: str, bug: str | None = None) -> list[tuple[Tensor, int]]:
    (saved_at, words), (count, layout) = trained, LAYOUTS[name]
    shutil.copytree(saved_at / "run", root / "run")
    return ranks(count, logits_after, root, [*words, *layout], bug)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_one_process(ranks, trained, alone, tmp_path, name):
    found = on_ranks(ranks, trained, tmp_path, name)
    for logits, _ in found:
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-10)
    assert {tiles for _, tiles in found} <= {0, 1, 2, PICTURES} and sum(tiles for _, tiles in found) >= PICTURES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "pp2, all stages"])
def test_pictures_that_are_encoded_again_are_noticed(ranks, trained, alone, tmp_path, name):
    found = on_ranks(ranks, trained, tmp_path, name, FORGETFUL)
    assert sum(tiles for _, tiles in found) == NEW_TOKENS * PICTURES
    assert torch.allclose(found[0][0], alone, atol=1e-10)


@pytest.mark.slow
def test_lost_tiles_are_noticed(ranks, trained, alone, tmp_path):
    found = on_ranks(ranks, trained, tmp_path, "pp2, all stages", "tiles_of_later_stages_lost")
    assert not torch.allclose(found[0][0], alone, atol=1e-3)
