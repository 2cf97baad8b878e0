"""Answers about pictures, and the examples for the report, are those of one process under every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from core.config import load
from data.corpus import prepare
from model import head
from tests.support.tiny import TINY, saved
from train.config import TrainConfig
from train.eval.answers import measure
from train.eval.examples import Example, examples

SIZES = "tile_size: 8, patch_size: 2"
VISION = [
    "+model.vision={hidden_size: 16, num_layers: 2, num_heads: 2, mlp_hidden_size: 64, adapter_hidden_size: 16, "
    f"image_token_id: 5, {SIZES}}}",
    f"+data.images={{tiles: {{{SIZES}, max_tiles: 1}}}}",
    "precision=fp64",
    "optimizer.lr=0.01",
    "training.steps=16",
    "training.micro_batch_size=4",
    "training.seq_len=64",
    "data=files",
    "~data.sources.text",
    "+data.sources.scenes={kind: 'data.images.generated.sources:Scenes', options: {number: 150}}",
    "data.tokenizer.vocab_size=300",
    "data.held_out=0.2",
]
STEPS = 16


def prepared(cache: Path) -> list[str]:
    """Return the words of a run, whose corpus is made."""
    words = [*VISION, f"data.cache={cache}"]
    prepare(load("train", TrainConfig, [*TINY, *words]).data, lambda line: None)
    return words


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return prepared(tmp_path_factory.mktemp("cache"))


def asked(root: Path, words: list[str], bug: bool = False) -> tuple[dict[str, Any], list[Example]]:
    """Return the answers of a model trained for a few steps, and the examples.

    `bug`: each rank takes the likeliest token of its own part of the vocabulary.
    """
    run = saved(root, "run", words, STEPS)
    placed, loader, corpus = run.engine.placed, run.loaders["main"], run.corpus
    with pytest.MonkeyPatch.context() as patch:
        if bug:
            patch.setattr(head, "_likeliest", lambda sums, shard: sums.likeliest_T)
        found = measure(placed, loader, ["scenes"], 9, 2, corpus)["scenes"].plain()
        return found, examples(placed, loader, "scenes", 2, corpus)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(ranks, trained, data) -> Any:
    """Return the answers of one process, which leaves a checkpoint."""
    (found,) = ranks(1, asked, trained, data)
    answers, shown = found
    assert answers["documents"] > 10 and answers["own"] > 0 and len(shown) == 12
    assert any(one.is_right for one in shown) and not all(one.is_right for one in shown)
    assert len({one.pictures[0] for one in shown}) == 12 and {one.question[:8] for one in shown} == {"How many"}
    return found


LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2 + cp2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "pp2, all stages": (2, ["parallel.pp=2", "parallel.vision.stages=all"]),
    "dp2, shared tiles": (2, ["parallel.vision.over_data_parallel=true"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_those_of_one_process(ranks, alone, trained, tmp_path, data, name):
    count, layout = LAYOUTS[name]
    shutil.copytree(trained / "run", tmp_path / "run")
    assert ranks(count, asked, tmp_path, [*data, *layout]) == [alone] * count


@pytest.mark.slow
def test_tokens_of_the_wrong_part_are_noticed(ranks, alone, trained, tmp_path, data):
    shutil.copytree(trained / "run", tmp_path / "run")
    found = ranks(2, asked, tmp_path, [*data, "parallel.tp=2"], True)
    assert found[0] == found[1] and found[0][1] != alone[1]
