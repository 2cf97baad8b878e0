"""The filter inside a corpus: what goes, what stays, and where it lies afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from core.errors import ConfigError, DataError
from data.config import DataConfig
from data.corpus import DOCUMENTS, HELD_OUT, TRAIN, Corpus, prepare
from data.filter.corpus import SourcePart, filter_sources
from data.sources import Document, FileSource
from tests.data.conftest import make_config, silent
from tests.support.filtering import prose, two_sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources; one has a copy and an empty file."""
    root = tmp_path_factory.mktemp("sources")
    sources = two_sources(root)
    (root / "prose" / "900.txt").write_text(prose(1, 0, words=30)[0]["text"])
    (root / "code" / "901.txt").write_text(" \n")
    return sources


def config_of(folders: dict[str, Any], cache: Path, **rules: Any) -> DataConfig:
    return make_config(cache, folders, filter={"keep": 0.5, "unit": "documents", **rules})


def audit_of(corpus: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((corpus.directory / "audit.json").read_text())
    return found


@pytest.fixture(scope="module")
def corpora(folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """With the filter, and without."""
    cache = tmp_path_factory.mktemp("cache")
    return prepare(config_of(folders, cache), silent), prepare(make_config(cache, folders), silent)


def documents(corpus: Corpus, source: str, split: str) -> list[str]:
    stream = corpus.stream(source, split)
    tokens = np.empty(len(stream), np.int64)
    stream.read(0, tokens)
    begins = [*np.flatnonzero(tokens == corpus.tokenizer.bos_id), len(tokens)]
    return [corpus.tokenizer.decode(tokens[a + 1 : b - 1].tolist()) for a, b in pairwise(begins)]


def test_training_documents_are_filtered_and_held_out_ones_are_not(corpora):
    mine, plain = corpora
    assert mine.directory != plain.directory and mine.fingerprint != plain.fingerprint
    for source in ("prose", "code"):
        assert documents(mine, source, HELD_OUT) == documents(plain, source, HELD_OUT)
        before, after = documents(plain, source, TRAIN), documents(mine, source, TRAIN)
        assert [text for text in before if text in set(after)] == after, "some of them, in their order"
        assert abs(len(after) - len(before) / 2) <= 1, "each source is a domain with its own rate"


def test_the_counts_of_the_manifest_add_up(corpora):
    mine, plain = corpora
    audit = audit_of(mine)
    assert audit["totals"]["in"]["documents"] == sum(domain["in"]["documents"] for domain in audit["domains"].values())
    for source in ("prose", "code"):
        counts = mine.manifest["sources"][source][TRAIN]["counts"]
        dropped = {
            key.removeprefix("dropped_by_filter_"): n for key, n in counts.items() if key.startswith("dropped_by_")
        }
        without = plain.manifest["sources"][source][TRAIN]["counts"]
        assert counts["documents"] + sum(dropped.values()) == without["documents"]
        reasons = audit["domains"][source]["reasons"]
        assert dropped == {name: size["documents"] for name, size in reasons.items() if name not in ("hard",)}
        assert counts.get("dropped_empty", 0) == without.get("dropped_empty", 0)
    assert mine.manifest["filter"]["scorer"] == "ngram" and mine.manifest["filter"]["keep"] == 0.5
    assert {"audit.json", "audit.html", "scores.parquet"} <= {path.name for path in mine.directory.iterdir()}


def test_the_index_leads_to_each_document(corpora):
    mine, plain = corpora
    for source in ("prose", "code"):
        index = pyarrow.parquet.read_table(mine.directory / f"{source}{DOCUMENTS}").to_pylist()
        assert len(index) == mine.manifest["sources"][source][TRAIN]["counts"]["documents"]
        stream, texts = mine.stream(source, TRAIN), documents(mine, source, TRAIN)
        for row, text in zip(index, texts, strict=True):
            tokens = np.empty(row["tokens"], np.int64)
            stream.read(row["start"], tokens)
            assert (tokens[0], tokens[-1]) == (mine.tokenizer.bos_id, mine.tokenizer.eos_id)
            assert mine.tokenizer.decode(tokens[1:-1].tolist()) == text
        scores = pyarrow.parquet.read_table(mine.directory / "scores.parquet").to_pylist()
        assert [row["id"] for row in scores if row["kept"] and row["domain"] == source] == [
            row["name"] for row in index
        ]
    assert not (plain.directory / f"prose{DOCUMENTS}").exists(), "control: without names there is no index"


def test_the_index_knows_of_padding(folders, tmp_path):
    corpus = prepare(replace(config_of(folders, tmp_path), align=64), silent)
    index = pyarrow.parquet.read_table(corpus.directory / f"code{DOCUMENTS}").to_pylist()
    tokens = np.empty(len(corpus.stream("code", TRAIN)), np.int64)
    corpus.stream("code", TRAIN).read(0, tokens)
    begins = np.flatnonzero(tokens == corpus.tokenizer.bos_id).tolist()
    assert [row["start"] for row in index] == begins and corpus.padding("code") > 0


def test_a_second_start_takes_the_cache_and_other_rules_do_not(folders, tmp_path):
    said: list[str] = []
    first = prepare(config_of(folders, tmp_path), said.append)
    assert any("scored" in line for line in said)
    said.clear()
    again = prepare(config_of(folders, tmp_path), said.append)
    assert again.directory == first.directory and not said
    other = prepare(config_of(folders, tmp_path, keep=0.3), silent)
    assert other.directory != first.directory
    evaluation = tmp_path / "set.txt"
    evaluation.write_text("words of a set that nobody has seen before and nobody will ever see again here")
    sets = {"sets": {"mine": str(evaluation)}}
    with_set = prepare(config_of(folders, tmp_path, contamination=sets), silent)
    evaluation.write_text(evaluation.read_text() + " " + prose(5, 0, words=30)[4]["text"])
    changed = prepare(config_of(folders, tmp_path, contamination=sets), silent)
    assert changed.directory != with_set.directory, "the content of a file that the rules name counts"


def test_a_killed_filter_goes_on(folders, tmp_path, monkeypatch):
    from data.filter.pipeline import Filter

    def dies(self: Filter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Filter, "_decide", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_of(folders, tmp_path / "cut"), silent)
    said: list[str] = []
    cut = prepare(config_of(folders, tmp_path / "cut"), said.append)
    assert not any("scored" in line for line in said), "scores are taken once"
    whole = prepare(config_of(folders, tmp_path / "whole"), silent)
    assert cut.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"select": {"protect": ["none"]}}, r"data\.filter\.select=none: no such source; try prose or code"),
        ({"scorer": {"kind": "loss", "model": "x"}}, r"data\.filter\.scorer\.kind=loss: needs a model, and none can"),
        ({"scorer": {"kind": "random", "window": 3}}, r"data\.filter\.scorer\.window=3: means nothing to random"),
        (
            {"contamination": {"sets": {"mine": "/none"}}},
            r"data\.filter\.contamination\.sets\.mine=/none: no such file",
        ),
        ({"select": {"clean": "/none"}}, r"data\.filter\.select\.clean=/none: no such file"),
        (
            {"gates": {"min_characters": 10**6}},
            r"data\.sources\.prose: .*data\.filter leaves nothing of it \(.*too_short",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(folders, tmp_path, rules, message):
    with pytest.raises(ConfigError, match=message):
        prepare(config_of(folders, tmp_path, **rules), silent)


class Changing:
    """A source that has another number of documents every time."""

    name = "changing"

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)

    def fingerprint(self) -> str:
        return "the same"

    def documents(self) -> Any:
        for row in prose(self.counts.pop(0)):
            yield Document(row["text"], False)


def part(*counts: int) -> SourcePart:
    source = Changing(*counts)
    return SourcePart(source, source.fingerprint())


@pytest.mark.parametrize("later", [19, 21])
def test_documents_that_change_meanwhile_are_an_error(corpora, folders, tmp_path, later):
    rules = config_of(folders, tmp_path).filter
    (source,) = filter_sources([part(20, later)], rules, corpora[0].tokenizer, tmp_path, silent, None)
    with pytest.raises(DataError, match="the documents of changing changed while they were filtered"):
        list(source.documents())
    (source,) = filter_sources([part(20, 20)], rules, corpora[0].tokenizer, tmp_path / "b", silent, None)
    assert len(list(source.documents())) == 20, "control"


def test_a_source_gives_its_training_documents_alone(folders, tmp_path):
    config = config_of(folders, tmp_path)
    source = FileSource("prose", config.sources["prose"], config)
    given = list(source.documents())
    found = list(SourcePart(source, source.fingerprint()).records())
    assert [one.text for one in found] == [one.text for one in given if not one.held_out and not one.dropped]
    assert len({one.id for one in found}) == len(found) and {one.domain for one in found} == {"prose"}
