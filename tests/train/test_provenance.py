"""Compare the steps that `visits` reports for a document with every batch of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from data.corpus import DOCUMENTS, TRAIN, Corpus, prepare
from data.loader import Loader
from launch.cli import main
from tests.data.conftest import silent
from tests.support.filtering import two_sources
from tests.support.tiny import TINY
from train.config import phases
from train.corpus import source_weights
from train.provenance import DocumentSpan, TrainedSequence, find_places, visits
from train.run_directory import load_config

PHASE = "+phases=[{name: later, steps: 5, seq_len: 32, global_batch_size: 4, weights: {code: 1.0}}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of two phases on filtered documents. The first phase is longer than an epoch of a source."""
    root = tmp_path_factory.mktemp("run")
    folders = two_sources(root)
    code = f"+data.sources.code={{kind: files, path: '{folders['code']['path']}', weight: 2.0}}"
    data = ["data=files", f"data.sources.text.path={folders['prose']['path']}", code, "data.tokenizer.vocab_size=300"]
    data += [f"data.cache={root / 'cache'}", "data.held_out=0.2", "+data.filter={keep: 0.5, unit: documents}"]
    small = ["training.steps=30", "training.seq_len=24", "model.num_layers=2", "model.attention_chunk_size=8"]
    assert main(["train", *TINY, *data, *small, PHASE, "optimizer=sgd", f"run.root={root}", "run.name=run"]) == 0
    return root / "run"


def by_force(directory: Path, corpus: Corpus, place: DocumentSpan, steps: int) -> list[TrainedSequence]:
    """Look at every batch of every step, and find each sequence in the stream by its tokens."""
    config, found = load_config(directory), []
    stream = corpus.stream(place.source, TRAIN)
    tokens = np.empty(len(stream), np.int64)
    stream.read(0, tokens)
    mine = np.arange(place.start + 1, place.start + place.tokens)
    for phase in phases(config):
        weights = phase.weights or source_weights(config, corpus)
        loader = Loader(corpus, phase.seq_len, phase.global_batch_size, config.run.seed, phase.name, weights)
        where = {
            tokens[begin : begin + phase.seq_len].tobytes(): begin
            for begin in range(0, stream.num_sequences(phase.seq_len) * phase.seq_len, phase.seq_len)
        }
        assert len(where) == stream.num_sequences(phase.seq_len), "sequences must differ"
        for step in range(phase.start, min(phase.stop, steps)):
            batch = loader.batch(step - phase.start)
            for row, content in enumerate(batch.tokens_BT.numpy()):
                if corpus.sources[int(batch.sources_B[row])] != place.source:
                    continue
                begin = where[content.tobytes()]
                if ((mine > begin) & (mine <= begin + phase.seq_len)).any():
                    found.append(TrainedSequence(phase.name, step, row))
    return found


def test_the_steps_that_trained_on_a_document(run):
    config = load_config(run)
    corpus = prepare(config.data, silent)
    compared, several = 0, 0
    for source in ("text", "code"):
        index = pyarrow.parquet.read_table(corpus.directory / f"{source}{DOCUMENTS}").to_pylist()
        for row in index[::4]:
            [place] = find_places(corpus, row["name"])
            assert place == DocumentSpan(source, row["start"], row["tokens"])
            found = visits(run, config, corpus, place, 35)
            assert found == by_force(run, corpus, place, 35)
            assert visits(run, config, corpus, place, 9) == [one for one in found if one.step < 9]
            compared, several = compared + 1, several + (len({one.phase for one in found}) == 2)
    assert compared >= 8 and several, "some in both phases"
    moved = replace(place, start=place.start + 500 if place.start < 500 else place.start - 500)
    assert visits(run, config, corpus, moved, 35) != by_force(run, corpus, place, 35), "control: another place"
    other = replace(config, run=replace(config.run, seed=1))
    assert visits(run, other, corpus, place, 35) != by_force(run, corpus, place, 35), "control: another order"
    assert find_places(corpus, "text:none") == []


def test_a_token_counts_where_it_is_a_label():
    """BOS is not a label. If a document ends with a sequence's first token, only the sequence before trains on it."""
    assert DocumentSpan("a", 0, 10).sequences(5) == (0, 1) and DocumentSpan("a", 0, 6).sequences(5) == (0, 0)
    assert DocumentSpan("a", 4, 3).sequences(5) == (0, 1) and DocumentSpan("a", 5, 2).sequences(5) == (1, 1)


def test_explain_leads_to_the_steps(run, capsys):
    corpus = prepare(load_config(run).data, silent)
    rows = pyarrow.parquet.read_table(corpus.directory / "scores.parquet").to_pylist()
    kept = next(row["id"] for row in rows if row["kept"] and row["domain"] == "code")
    assert main(["filter", f"explain={kept}", f"run={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [place] = find_places(corpus, kept)
    found = visits(run, load_config(run), corpus, place, 35)
    assert lines[0] == f"{kept} ({kept}, domain code): kept, hard"
    assert f"trained on in {len(found)} sequences of the 35 logged steps" in lines
    assert f"  step {found[0].step} ({found[0].phase}), sequence {found[0].index} of the batch" in lines
    dropped = next(row["id"] for row in rows if not row["kept"])
    assert main(["filter", f"explain={dropped}", f"run={run}"]) == 0
    assert "trained on" not in capsys.readouterr().out
    for words, message in (
        (["explain=none", f"run={run}"], "explain=none: no record has this name"),
        ([f"explain={kept}", "run=/none"], "run=/none: no run there: its config.yaml is missing"),
    ):
        assert main(["filter", *words]) == 2
        assert message in capsys.readouterr().err


def test_explain_needs_filtered_data(small_corpus, tmp_path, capsys):
    words = [*TINY, *small_corpus, f"run.root={tmp_path}", "run.name=run"]
    assert main(["train", *words, "training.steps=1"]) == 0
    assert main(["filter", "explain=text:1", f"run={tmp_path / 'run'}"]) == 2
    assert "its data were not filtered: data.filter is null" in capsys.readouterr().err
