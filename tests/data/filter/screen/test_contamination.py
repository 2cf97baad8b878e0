"""Contamination: planted passages of evaluation sets in every format, and text that only resembles them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from data.filter.config import ContaminationConfig
from data.filter.screen.contamination import EvaluationSets
from tests.data.filter.screen.test_duplicates import document

QUESTION = (
    "A train leaves the station at nine and travels for three hours at eighty miles per hour; how far does it get?"
)
PASSAGE = "a TRAIN leaves   the station, at nine: and travels for\nthree hours at eighty miles..."
PLANTED = f"{document(1)} {PASSAGE} {document(2)}"
TWELVE_WORDS = "a train leaves the station at nine and travels for three hours"


def jsonl(folder: Path) -> Path:
    path = folder / "set.jsonl"
    path.write_text(
        json.dumps({"id": 7, "doc": {"choices": ["x", QUESTION]}}) + "\n\n" + json.dumps({"q": None}) + "\n"
    )
    return path


def compressed(folder: Path) -> Path:
    path = folder / "set.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(folder).read_bytes()))
    return path


def parquet(folder: Path) -> Path:
    path = folder / "set.parquet"
    rows = {"number": [1, 2], "question": [None, QUESTION], "choices": [["a"], ["b", "c"]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


def text(folder: Path) -> Path:
    path = folder / "set.md"
    path.write_text(f"# Exam\n\n{QUESTION}\n")
    return path


@pytest.mark.parametrize("write", [jsonl, compressed, parquet, text])
def test_a_planted_passage_is_found(write: object, tmp_path: Path) -> None:
    assert callable(write)
    contaminated = EvaluationSets(ContaminationConfig({"exam": str(write(tmp_path))}))
    assert contaminated(PLANTED) == "exam"
    assert contaminated(document(1)) is None
    assert contaminated(f"{document(1)} {TWELVE_WORDS} {document(2)}") is None
    assert contaminated("") is None


def test_it_is_the_set_that_finds_it(tmp_path: Path) -> None:
    """The control: without the set, or with runs longer than what was planted, nothing is found."""
    assert EvaluationSets(ContaminationConfig())(PLANTED) is None
    assert EvaluationSets(ContaminationConfig({"exam": str(jsonl(tmp_path))}, words=17))(PLANTED) is None


def test_the_first_set_that_matches_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(document(1))
    sets = {"exam": str(jsonl(tmp_path)), "other": str(other)}
    assert EvaluationSets(ContaminationConfig(sets))(PLANTED) == "exam"
    assert EvaluationSets(ContaminationConfig(dict(reversed(sets.items()))))(PLANTED) == "other"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "no such file"),
        ("short.txt", b"too few words", "has no text of 13 words"),
        ("empty.jsonl", b"", "has no text of 13 words"),
        ("broken.jsonl", b'{"a": ', "cannot be read: line 1 is not JSON"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
        ("broken.parquet", b"no parquet", "cannot be read"),
        ("latin.txt", b"\xff\xfe", "cannot be read"),
        ("set.csv", b"a,b", "unknown suffix; try .jsonl"),
    ],
)
def test_a_set_that_could_never_match_is_refused(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        EvaluationSets(ContaminationConfig({"exam": str(path)}))
    assert caught.value.key == "contamination.sets.exam"
    assert says in str(caught.value)
