"""Runs whose corpus is deleted or moved, runs whose config.yaml is changed, and runs without a corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from tests.support.tiny import TINY


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[str]:
    """Return overrides that train on the folder `corpus` of the working directory, with a cache there."""
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for number in range(40):
        Path(f"corpus/{number}.txt").write_text(
            f"{number}: the quick brown fox jumps over the lazy dog {number**3}\n" * 9
        )
    tokenizer = ["data.tokenizer.vocab_size=300", "data.held_out=0.3"]
    return ["data=files", "data.sources.text.path=corpus", *tokenizer, "data.cache=cache"]


@pytest.fixture
def loss(capsys) -> Callable[..., float]:
    def run(*words: str) -> float:
        capsys.readouterr()
        assert main(["evaluate", *words]) == 0
        return json.loads(capsys.readouterr().out)["loss"]

    return run


RUN = ["train", *TINY, "run.name=x", "training.steps=2"]


def test_held_out_loss_without_the_files_of_the_corpus(corpus, loss, refused, tmp_path):
    assert main([*RUN, *corpus]) == 0
    before = loss("runs/x")
    shutil.move("corpus", "gone")
    assert loss("runs/x") == before, "the cache has the tokens"
    shutil.rmtree("cache")
    where = tmp_path / "corpus"
    hint = "To evaluate without the run's corpus, add text=FILES; if its tokens were moved, tokens=DIRECTORY"
    assert refused("evaluate", "runs/x") == f"data.sources.text.path={where}: no such file or folder. {hint}"
    assert loss("runs/x", "text=gone") > 0
    assert refused(*RUN, *corpus) == "data.sources.text.path=corpus: no such file or folder"
    shutil.move("gone", "corpus")
    assert main([*RUN, *corpus]) == 0


def test_moved_tokens_are_named_anew(corpus, loss, refused):
    assert main(["tokenize", *corpus, "out=tokens"]) == 0
    tokens = ["data=tokens", "data.tokens=tokens"]
    assert main([*RUN, *tokens]) == 0
    before = loss("runs/x")
    shutil.move("tokens", "elsewhere")
    assert "is not a directory of tokens" in refused("evaluate", "runs/x")
    assert loss("runs/x", "tokens=elsewhere") == before
    assert main([*RUN, "training.steps=2", "data=tokens", "data.tokens=elsewhere"]) == 0
    assert main(["tokenize", *corpus, "data.held_out=0.2", "out=others"]) == 0
    assert "the corpus is not the one this run was trained on" in refused("evaluate", "runs/x", "tokens=others")
    assert "tokens=elsewhere: applies to the held-out loss" in refused(
        "evaluate", "runs/x", "tokens=elsewhere", "text=corpus"
    )


def test_a_corpus_that_is_not_there_leaves_no_run(corpus, refused):
    for words in (
        corpus,
        ["data=tokens", "data.tokens=none"],
        [*corpus, "data.tokenizer.kind=tokenizer_json", "data.tokenizer.path=none"],
    ):
        refused(*RUN, *words, "data.sources.text.path=none" if words is corpus else "run.name=y")
        refused(*RUN, *words, "data.sources.text.path=none" if words is corpus else "run.name=y", "launch=torchrun")
    assert not Path("runs").exists()


def test_skipped_files_and_empty_splits_are_told(corpus, capsys):
    assert main(["tokenize", *corpus]) == 0
    assert "skipped" not in capsys.readouterr().out, "control"
    for name in ("copyright", "notes.TXT", ".hidden"):
        Path(f"corpus/{name}").write_text("text")
    Path("corpus/0.txt").write_text("changed")
    assert main(["tokenize", *corpus, "data.held_out=0.001"]) == 0
    said = capsys.readouterr().out
    reason = "files of unknown suffixes are skipped (2): copyright, notes.TXT"
    assert f"data.sources.text: {reason}\n" in said
    assert "data.sources.text: no document is held out (data.held_out=0.001)\n" in said


def test_a_stored_configuration_names_its_run_anywhere(corpus, tmp_path, monkeypatch):
    assert main([*RUN, *corpus]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["train", "--config", "../runs/x/config.yaml"]) == 0
    assert not Path("runs").exists(), "the run is finished"
    assert main(["train", "--config", "../runs/x/config.yaml", "run.root=mine"]) == 0
    assert Path("mine/x/summary.json").exists()


CHANGES = {
    "top_k: 2": "top_k: 3",
    "rope_theta: 500000.0": "rope_theta: 10.0",
    "hidden_size: 32": "hidden_size: 1000000",
    "  seq_len: 48\n": "",
}


def test_no_verb_believes_a_changed_configuration(corpus, refused, tmp_path):
    """What a checkpoint was trained with is stored in it. A wrong network would give wrong results silently."""
    assert main([*RUN, *corpus]) == 0
    path = Path("runs/x/config.yaml")
    before = path.read_text()
    for old, new in CHANGES.items():
        assert old in before
        path.write_text(before.replace(old, new, 1))
        for words in (["evaluate", "runs/x"], ["generate", "runs/x", "a"], ["export", "runs/x", "exported"]):
            line = refused(*words)
            assert "is of a run with" in line and "step-00000002" in line, line
            assert not Path("exported").exists()
    path.write_text(before)
    assert main(["generate", "runs/x", "a", "tokens=1"]) == 0, "control"
    path.write_text(before[:900])
    assert refused("generate", "runs/x", "a").startswith("run=runs/x: config.yaml has a damaged value, ")
