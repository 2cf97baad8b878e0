"""Filter a corpus while it is prepared: which documents are kept, and where they are in the token stream."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet
import pytest

from core.errors import ConfigError, DataError
from data.config import DataConfig
from data.corpus import DOCUMENTS, HELD_OUT, TRAIN, Corpus, prepare
from data.filter.corpus import SourcePart, filter_sources
from data.filter.pipeline import Filter
from data.sources import Document
from tests.data.conftest import counts_of, documents_of, make_config, silent
from tests.support.filtering import prose, two_sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the settings of two sources; `prose` has a duplicate, `code` an empty file."""
    root = tmp_path_factory.mktemp("sources")
    sources = two_sources(root)
    (root / "prose" / "900.txt").write_text(prose(1, 0, words=30)[0]["text"])
    (root / "code" / "901.txt").write_text(" \n")
    return sources


def config_of(folders: dict[str, Any], cache: Path, **rules: Any) -> DataConfig:
    return make_config(cache, folders, filter={"keep": 0.5, "unit": "documents", **rules})


@pytest.fixture(scope="module")
def corpora(folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """Return the same corpus with the filter and without it."""
    cache = tmp_path_factory.mktemp("cache")
    return prepare(config_of(folders, cache), silent), prepare(make_config(cache, folders), silent)


def test_training_documents_alone_are_filtered(corpora):
    mine, plain = corpora
    assert mine.directory != plain.directory and mine.fingerprint != plain.fingerprint
    for source in ("prose", "code"):
        assert documents_of(mine, source, HELD_OUT) == documents_of(plain, source, HELD_OUT)
        before, after = documents_of(plain, source, TRAIN), documents_of(mine, source, TRAIN)
        assert [text for text in before if text in set(after)] == after, "some of them, in their order"
        assert abs(len(after) - len(before) / 2) <= 1, "each source is a domain with its own rate"


def test_the_counts_of_the_manifest_add_up(corpora):
    mine, plain = corpora
    audit = json.loads((mine.directory / "audit.json").read_text())
    assert audit["totals"]["in"]["documents"] == sum(domain["in"]["documents"] for domain in audit["domains"].values())
    prefix = "dropped_by_filter_"
    for source in ("prose", "code"):
        counts, without = counts_of(mine, source), counts_of(plain, source)
        dropped = {key.removeprefix(prefix): n for key, n in counts.items() if key.startswith(prefix)}
        assert counts["documents"] + sum(dropped.values()) == without["documents"]
        reasons = audit["domains"][source]["reasons"]
        assert dropped == {name: size["documents"] for name, size in reasons.items() if name != "hard"}
        assert counts.get("dropped_empty", 0) == without.get("dropped_empty", 0)
    assert mine.manifest["filter"]["scorer"] == "ngram" and mine.manifest["filter"]["keep"] == 0.5
    assert {"audit.json", "audit.html", "scores.parquet"} <= {path.name for path in mine.directory.iterdir()}


def test_the_index_leads_to_each_document(corpora):
    mine, plain = corpora
    for source in ("prose", "code"):
        index = pyarrow.parquet.read_table(mine.directory / f"{source}{DOCUMENTS}").to_pylist()
        stream, texts = mine.stream(source, TRAIN), documents_of(mine, source, TRAIN)
        for row, text in zip(index, texts, strict=True):
            tokens = stream.window(row["start"], row["tokens"])
            assert (tokens[0], tokens[-1]) == (mine.tokenizer.bos_id, mine.tokenizer.eos_id)
            assert mine.tokenizer.decode(tokens[1:-1].tolist()) == text
        scores = pyarrow.parquet.read_table(mine.directory / "scores.parquet").to_pylist()
        assert [row["id"] for row in scores if row["kept"] and row["domain"] == source] == [
            row["name"] for row in index
        ]
    assert not (plain.directory / f"prose{DOCUMENTS}").exists(), "control: without names there is no index"


def test_the_index_knows_of_padding(folders, tmp_path, no_page):
    corpus = prepare(replace(config_of(folders, tmp_path), align=64), silent)
    index = pyarrow.parquet.read_table(corpus.directory / f"code{DOCUMENTS}").to_pylist()
    stream = corpus.stream("code", TRAIN)
    begins = np.flatnonzero(stream.window(0, len(stream)) == corpus.tokenizer.bos_id).tolist()
    assert [row["start"] for row in index] == begins and corpus.padding("code") > 0


def test_the_cache_holds_for_the_same_rules_and_files(folders, tmp_path, no_page):
    evaluation = tmp_path / "set.txt"
    evaluation.write_text("words of a set that nobody has seen before and nobody will ever see again here")
    rules = {"contamination": {"sets": {"mine": str(evaluation)}}}
    said: list[str] = []
    first = prepare(config_of(folders, tmp_path, **rules), said.append)
    assert any("scored" in line for line in said)
    said.clear()
    assert prepare(config_of(folders, tmp_path, **rules), said.append).directory == first.directory and not said
    assert prepare(config_of(folders, tmp_path, keep=0.3, **rules), silent).directory != first.directory
    evaluation.write_text(evaluation.read_text() + " " + prose(5, 0, words=30)[4]["text"])
    changed = prepare(config_of(folders, tmp_path, **rules), silent)
    assert changed.directory != first.directory, "the content of a file that the rules name counts"


def test_a_killed_filter_resumes(corpora, folders, tmp_path, no_page, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Filter, "_decide", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config_of(folders, tmp_path), silent)
    said: list[str] = []
    resumed = prepare(config_of(folders, tmp_path), said.append)
    assert not any("scored" in line for line in said), "stored scores are used"
    assert resumed.fingerprint == corpora[0].fingerprint


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"select": {"protect": ["none"]}}, r"filter\.select=none: no such source; try prose or code"),
        ({"scorer": {"kind": "loss", "model": "x"}}, r"filter\.scorer\.kind=loss: needs a model, and models cannot"),
        ({"scorer": {"kind": "random", "window": 3}}, r"filter\.scorer\.window=3: has no effect on random"),
        ({"contamination": {"sets": {"mine": "/none"}}}, r"filter\.contamination\.sets\.mine=/none: no such file"),
        ({"select": {"clean": "/none"}}, r"filter\.select\.clean=/none: no such file"),
        ({"gates": {"min_characters": 10**6}}, r"sources\.prose: .*data\.filter drops all of it \(.*too_short"),
    ],
)
def test_wrong_rules_are_refused_with_their_key(folders, tmp_path, no_page, rules, message):
    with pytest.raises(ConfigError, match=rf"data\.{message}"):
        prepare(config_of(folders, tmp_path, **rules), silent)


def changing(*counts: int) -> SourcePart:
    """Return a source whose number of documents is the next of `counts` each time it is read."""
    left = iter(counts)
    source = Mock(documents=lambda: [Document(row["text"], False) for row in prose(next(left))])
    source.name = "changing"
    return SourcePart(source, "the same")


@pytest.mark.parametrize("later", [19, 20, 21])
def test_documents_that_change_meanwhile_are_an_error(corpora, folders, tmp_path, no_page, later):
    rules = config_of(folders, tmp_path).filter
    (source,) = filter_sources([changing(20, later)], rules, corpora[0].tokenizer, tmp_path, silent, None)
    if later == 20:
        assert len(list(source.documents())) == 20, "control"
    else:
        with pytest.raises(DataError, match="the documents of changing changed while they were filtered"):
            list(source.documents())
