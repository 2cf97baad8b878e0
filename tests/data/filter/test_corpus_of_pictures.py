"""A run's filter on documents with pictures: the corpus has the kept documents with their own pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from core.config import build, plain
from core.errors import ConfigError
from data.config import DataConfig
from data.corpus import DOCUMENTS, HELD_OUT, TRAIN, Corpus, prepare
from data.filter.config import DuplicateConfig, FilterRules, decisive_settings
from data.images.parts import ImagePart, PartsDocument
from tests.data.conftest import silent
from tests.data.filter.test_documents import broken, filtered, smooth
from tests.support.mixed import write_documents

TILES = {"tile_size": 8, "patch_size": 2, "max_tiles": 4}
RULES = {"keep": 1.0, "unit": "documents", "scorer": {"kind": "length"}}


def made(path: Path, cache: Path, rules: dict[str, Any] | None = None, **images: Any) -> Corpus:
    settings = {
        "sources": {"mixed": {"kind": "documents", "path": str(path)}},
        "images": {"tiles": TILES, **images},
        "tokenizer": {"vocab_size": 300},
        "held_out": 0.2,
        "cache": str(cache),
        "filter": rules,
    }
    return prepare(build(DataConfig, settings), silent)


def pictures_by_document(corpus: Corpus) -> dict[str, list[bytes]]:
    """Return the pictures of each training document, by its name in the source."""
    stream, found = corpus.pictures("mixed", TRAIN), {}
    for row in pyarrow.parquet.read_table(corpus.directory / f"mixed{DOCUMENTS}").to_pylist():
        numbers = stream.inside(row["start"], row["start"] + row["tokens"])
        found[row["name"].removeprefix("mixed:")] = [stream.content(number) for number in numbers]
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write 24 documents, and 6 that repeat the pictures of others."""
    path = write_documents(tmp_path / "in", 24)
    with open(path, "a") as file:
        for number in range(1, 24, 4):
            parts = [{"image": f"{number}-0.png"}, {"text": f"again {number}"}]
            file.write("\n" + json.dumps({"parts": parts}))
    return path


def test_repeated_pictures_are_not_in_the_corpus(source, tmp_path, no_page):
    whole, mine = made(source, tmp_path / "cache"), made(source, tmp_path / "cache", RULES)
    before, after = pictures_by_document(whole), pictures_by_document(mine)
    [table] = [pyarrow.parquet.read_table(mine.directory / "scores.parquet").to_pylist()]
    dropped = [row for row in table if not row["kept"]]
    assert {row["reason"] for row in dropped} == {"duplicate_pictures"} and 0 < len(dropped) <= 6
    assert after == {name: before[name] for name in before if f"mixed:{name}" not in {row["id"] for row in dropped}}
    counts = [corpus.manifest["sources"]["mixed"] for corpus in (whole, mine)]
    assert counts[1][TRAIN]["counts"]["dropped_by_filter_duplicate_pictures"] == len(dropped)
    assert counts[0][HELD_OUT] == counts[1][HELD_OUT], "held-out documents are not filtered"
    shown = json.loads((mine.directory / "audit.json").read_text())["examples"]["duplicate_pictures"]
    assert all(row["thumbnails"] for row in shown)
    assert made(source, tmp_path / "other", RULES).fingerprint == mine.fingerprint


def test_a_corpus_is_made_from_the_kept_documents(source, tmp_path):
    filtered(source, tmp_path / "out")
    corpus = made(tmp_path / "out" / "kept.parquet", tmp_path / "cache")
    manifest = corpus.manifest["sources"]["mixed"]
    assert manifest[TRAIN]["counts"]["documents"] + manifest[HELD_OUT]["counts"]["documents"] == 24
    digests = pyarrow.parquet.read_table(corpus.directory / "mixed-train-images.parquet")["sha256"].to_pylist()
    assert len(digests) > 10


def test_bad_pictures_follow_the_policy_of_the_run(tmp_path, no_page):
    folder = broken(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"^data\.sources\.mixed.*images\.on_bad=drop$"):
        made(folder, tmp_path / "cache", RULES)
    with pytest.raises(
        ConfigError, match=r"^data\.sources=mixed:documents\.jsonl:3: .*; try data\.filter\.on_error=drop"
    ):
        made(folder, tmp_path / "cache", {**RULES, "on_error": "fail"}, on_bad="drop")
    corpora = [made(folder, tmp_path / "cache", rules, on_bad="drop") for rules in (None, RULES)]
    dropped = [corpus.manifest["sources"]["mixed"][TRAIN]["counts"]["dropped_bad_media"] for corpus in corpora]
    assert dropped == [2, 2]
    assert pictures_by_document(corpora[0]) == pictures_by_document(corpora[1])


@pytest.mark.slow  # 1 s
def test_other_images_settings_are_filtered_again(source, tmp_path, no_page):
    first = made(source, tmp_path / "cache", RULES)
    with pytest.raises(ConfigError, match=r"has 3 pictures and videos, more than data\.images\.max_images=2"):
        made(source, tmp_path / "cache", RULES, max_images=2)
    assert made(source, tmp_path / "cache", RULES, max_images=2, on_bad="drop").fingerprint != first.fingerprint


class Imported:
    """A source of a picture and a text."""

    def fingerprint(self) -> str:
        return "imported"

    def documents(self) -> Iterator[PartsDocument | str]:
        for number in range(12):
            yield PartsDocument(f"p{number}", (ImagePart(smooth(number % 8), "own"), f"text {number}"))
            yield f"a text without pictures, number {number}"


def test_imported_documents_are_filtered(tmp_path, no_page):
    kind = f"{__name__}:Imported"
    settings = {"sources": {"mixed": {"kind": kind}}, "images": {"tiles": TILES}, "tokenizer": {"vocab_size": 300}}
    corpus = prepare(build(DataConfig, {**settings, "held_out": 0.1, "cache": str(tmp_path), "filter": RULES}), silent)
    counts = corpus.manifest["sources"]["mixed"][TRAIN]["counts"]
    assert counts["dropped_by_filter_duplicate_pictures"] > 0 and counts["pictures"] <= 8


def test_old_rules_keep_their_hash():
    """The order of samples depends on it."""
    assert "pictures" not in decisive_settings(FilterRules())["duplicates"]
    changed = FilterRules(duplicates=DuplicateConfig(pictures=None))
    assert decisive_settings(changed)["duplicates"]["pictures"] is None
    assert plain(FilterRules())["duplicates"]["pictures"] == 8
