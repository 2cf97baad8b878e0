"""Suites during training on two ranks: the answers and what is learnt are those without, and each rank searches a part
of the corpus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import trainer, whole
from tests.train.callbacks.test_suites import suite
from train.overlap import search
from train.run_directory import read_lines


def trained(root: Path, name: str, words: list[str]) -> tuple[dict[str, torch.Tensor], int]:
    """Train; return the weights, and the number of blocks of the corpus that this rank has searched."""
    run, read = trainer(root, name, words), []
    honest = search.block_texts
    search.block_texts = lambda *block: read.append(block) or honest(*block)
    try:
        assert run.fit() == 0
    finally:
        search.block_texts = honest
    specs = run.engine.placed.specs
    return {key: whole(value, specs.get(key)) for key, value in run.engine.placed.model.state_dict().items()}, len(read)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.dp_shard=2", "parallel.ep=2"])
def test_two_ranks_ask_and_learn_as_without(ranks, tmp_path, small_corpus, layout):
    words: list[Any] = [*small_corpus, "training.steps=2", layout]
    asking = [suite(tmp_path), "evaluation.suites_every=1"]
    plain = ranks(2, trained, tmp_path, "plain", words)
    asked = ranks(2, trained, tmp_path, "asked", [*words, *asking])
    for (without, _), (with_suites, _) in zip(plain, asked, strict=True):
        assert without.keys() == with_suites.keys()
        assert all(torch.equal(without[name], with_suites[name]) for name in without)
    assert [read for _, read in plain] == [0, 0] and all(read > 0 for _, read in asked)
    alone = ranks(1, trained, tmp_path, "alone", [*words[:-1], *asking])
    assert not all(torch.equal(alone[0][0][name], plain[0][0][name]) for name in alone[0][0]), "control: rounding"
    lines = [list(read_lines(tmp_path / name / "evaluations.jsonl")) for name in ("asked", "alone")]
    assert [line["step"] for line in lines[0]] == [1, 2] == [line["step"] for line in lines[1]]
    for two, one in zip(*lines, strict=True):
        assert two["exams"]["echo"]["answers"] == one["exams"]["echo"]["answers"]
        assert two["exams"]["echo"]["contamination"] == one["exams"]["echo"]["contamination"]
        assert two["exams"]["echo"]["contamination"]["ids_found"] == ["in"]
