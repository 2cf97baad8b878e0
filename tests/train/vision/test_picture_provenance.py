"""`explain` and `step` name the pictures that a run's sequences show, as the batches themselves do."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from data.corpus import DOCUMENTS, TRAIN, Corpus, prepare
from data.filter.input.records import Record
from data.images.canvas import Canvas, placeholder_ids
from data.loader import Loader
from launch.cli import main
from tests.data.conftest import silent
from tests.data.filter.test_documents import documents_in
from tests.support.mixed import write_documents
from tests.train.vision.test_vision_run import train_in
from train.corpus import source_weights
from train.eval.contamination import seen_by, text_of
from train.provenance import explain_run, explain_step
from train.run_directory import load_config

FILTER = "+data.filter={keep: 1.0, unit: documents, scorer: {kind: length}}"
VISIT = re.compile(r"step (\d+) \(main\), sequence (\d+) of the batch, pictures? ([\d, ]+)")
ONLINE = ["online.every=2", "online.keep=0.5", "evaluation.baselines=false"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run on filtered documents, one of which repeats a picture, and one that filters online."""
    root = tmp_path_factory.mktemp("root")
    path = write_documents(root / "in")
    with open(path, "a") as file:
        file.write("\n" + json.dumps({"parts": [{"text": "the same again"}, {"image": "5-0.png"}]}))
    assert train_in(root, "run.name=filtered", FILTER, "data.packing=best_fit", "data.pack_seq_len=48") == 0
    assert train_in(root, "run.name=online", *ONLINE) == 0
    return root


def opened(run: Path) -> tuple[Corpus, Loader]:
    config = load_config(run)
    corpus = prepare(config.data, silent)
    return corpus, Loader(corpus, 48, 8, config.run.seed, "main", source_weights(config, corpus))


def digests_of(corpus: Corpus, loader: Loader, ordinals: list[int]) -> list[tuple[int, str]]:
    """Return (sequence, SHA-256) of each picture in a batch, from its own tiles and the stored bytes."""
    batch, stream = loader.samples(ordinals), corpus.pictures("mixed", TRAIN)
    found = []
    for index, tiles in enumerate(batch.images.tiles):
        for image in dict.fromkeys(tile.image for tile in tiles):
            found.append((index, hashlib.sha256(stream.content(image)).hexdigest()))
    return found


def listed(text: str) -> list[tuple[int, str]]:
    return [(int(n), digest) for n, digest in re.findall(r"sequence (\d+), .*SHA-256 (\w{64})", text)]


@pytest.mark.slow  # 20 s
def test_a_step_lists_the_pictures_of_its_batch(root, capsys):
    corpus, loader = opened(root / "filtered")
    for step in range(4):
        found = listed(explain_step(root / "filtered", step))
        assert found and found == digests_of(corpus, loader, list(range(step * 8, step * 8 + 8)))
    assert main(["filter", f"run={root / 'filtered'}", "step=2"]) == 0
    assert capsys.readouterr().out.startswith("step 2 (main): ")
    assert listed(explain_step(root / "filtered", 1)) != listed(explain_step(root / "filtered", 2)), "control"
    with pytest.raises(ConfigError, match="step=4: the run has the steps 0 to 3"):
        explain_step(root / "filtered", 4)


@pytest.mark.slow  # with the run of the test above
def test_a_step_of_an_online_filter_lists_what_was_taken(root):
    corpus, loader = opened(root / "online")
    lines = [json.loads(line) for line in (root / "online" / "online.jsonl").read_text().splitlines()]
    for step in range(4):
        window = lines[step // 2]["rows"]
        taken = window[step % 2 * 8 : step % 2 * 8 + 8]
        assert listed(explain_step(root / "online", step)) == digests_of(corpus, loader, taken)
    first = digests_of(corpus, loader, list(range(8)))
    assert listed(explain_step(root / "online", 0)) != first, "control: the order without the filter"


@pytest.mark.slow  # with the run of the first test
@pytest.mark.parametrize("name", ["filtered", "online"])
def test_a_document_names_its_pictures_and_steps(root, name):
    corpus, _ = opened(root / name)
    stream, seen = corpus.pictures("mixed", TRAIN), 0
    rows = pyarrow.parquet.read_table(corpus.directory / f"mixed{DOCUMENTS}").to_pylist()
    for document in list(dict.fromkeys(row["name"] for row in rows))[::4]:
        text = explain_run(root / name, document)
        spans = [(row["start"], row["start"] + row["tokens"]) for row in rows if row["name"] == document]
        numbers = [n for span in spans for n in stream.inside(*span)]
        wanted = [hashlib.sha256(stream.content(n)).hexdigest() for n in numbers]
        assert re.findall(r"picture \d+: .*SHA-256 (\w{64})", text) == wanted
        for place, (first, last) in enumerate(re.findall(r"tokens ([\d,]+) to ([\d,]+) of mixed", text)):
            ids = stream.images.ids
            begin, end = (int(token.replace(",", "")) for token in (first, last))
            tokens = corpus.stream("mixed", TRAIN).window(begin, end + 1 - begin)
            assert (tokens[0], tokens[-1]) == (ids.start, ids.end) and np.sum(tokens == ids.start) == 1
            for step, index, shown in VISIT.findall(text):
                if place in map(int, shown.split(",")):
                    seen += 1
                    assert (int(index), wanted[place]) in listed(explain_step(root / name, int(step)))
    assert seen > 5


@pytest.mark.slow  # with the run of the first test
def test_a_scorer_that_was_trained_on_the_documents(root):
    documents = documents_in(root / "in" / "documents.jsonl")
    records = [Record(document.id, "all", document.id, document.text) for document in documents]
    assert seen_by(root / "online").share(records) > 0.7, "all but the held-out documents"
    corpus, _ = opened(root / "online")
    one, two = corpus.tokenizer.encode(["one", "two"])
    ids = np.array([*one, *placeholder_ids(Canvas(1, 1), 4, corpus.images.ids), *two])
    assert corpus.tokenizer.decode(ids.tolist()) == "onetwo", "control: words on both sides of a picture would join"
    assert text_of(ids, corpus) == "one\ntwo"


@pytest.mark.slow  # with the run of the first test
def test_a_dropped_document_names_the_one_kept(root, capsys):
    words = ["filter", f"run={root / 'filtered'}", "explain=mixed:documents.jsonl:41"]
    assert main(words) == 0
    first, _, picture = capsys.readouterr().out.splitlines()
    assert first.endswith("dropped, duplicate_pictures of mixed:documents.jsonl:6")
    assert picture.startswith("picture 0: 5-0.png, ")
    assert main(["filter", f"run={root / 'online'}", "explain=documents.jsonl:99"]) == 2
    assert "no training document of" in capsys.readouterr().err
