"""Find planted passages of evaluation sets in every file format, and pass text that only resembles them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from data.filter.config import ContaminationConfig
from data.filter.screen.contamination import EvaluationSets, QuestionSearch
from tests.data.filter.screen.test_duplicates import document

QUESTION = (
    "A train leaves the station at nine and travels for three hours at eighty miles per hour; how far does it get?"
)
PASSAGE = "a TRAIN leaves   the station, at nine: and travels for\nthree hours at eighty miles..."
PLANTED = f"{document(1)} {PASSAGE} {document(2)}"
TWELVE_WORDS = "a train leaves the station at nine and travels for three hours"


def write_sets(folder: Path) -> dict[str, Path]:
    """Write the same evaluation set in every format; return the paths by name."""
    lines = json.dumps({"id": 7, "doc": {"choices": ["x", QUESTION]}}) + "\n\n" + json.dumps({"q": None}) + "\n"
    rows = {"number": [1, 2], "question": [None, QUESTION], "choices": [["a"], ["b", "c"]]}
    (folder / "set.jsonl").write_text(lines)
    (folder / "set.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "set.parquet")
    (folder / "set.md").write_text(f"# Exam\n\n{QUESTION}\n")
    return {path.name: path for path in folder.iterdir()} | {"folder": folder}


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz", "set.parquet", "set.md", "folder"])
def test_a_planted_passage_is_found(name, tmp_path):
    contaminated = EvaluationSets(ContaminationConfig({"exam": str(write_sets(tmp_path)[name])}))
    assert contaminated(PLANTED) == "exam"
    assert contaminated(document(1)) is None
    assert contaminated(f"{document(1)} {TWELVE_WORDS} {document(2)}") is None
    assert contaminated("") is None


def test_nothing_is_found_without_the_set(tmp_path):
    """Control: nothing is found without a set, or with n-grams longer than the planted passage."""
    assert EvaluationSets(ContaminationConfig())(PLANTED) is None
    exam = {"exam": str(write_sets(tmp_path)["set.jsonl"])}
    assert EvaluationSets(ContaminationConfig(exam, words=17))(PLANTED) is None


def test_sets_match_as_runs_of_words_do(tmp_path):
    """Random texts of three words against the runs of each set, as tuples; questions against texts likewise."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abc"), random.integers(1, 7))) for _ in range(120)]
    runs = [{tuple(text.split()[n : n + 4]) for n in range(len(text.split()) - 3)} for text in texts]
    one, *two, three = [place for place in range(60) if runs[place]][:4]
    names = {"one": [one], "two": two, "three": [three]}
    for name, places in names.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"q": texts[place]}) + "\n" for place in places))
    sets = EvaluationSets(ContaminationConfig({name: str(tmp_path / f"{name}.jsonl") for name in names}, words=4))
    of = {name: set().union(*(runs[place] for place in places)) for name, places in names.items()}
    wanted = [next((name for name in of if of[name] & mine), None) for mine in runs]
    assert [sets(text) for text in texts] == wanted and set(wanted) == {*names, None}
    search = QuestionSearch({place: (texts[place], "c c c c c") for place in range(60)}, words=4)
    assert search.too_short_Q.tolist() == [not mine for mine in runs[:60]]
    seen = set()
    for place in (70, 71, 90):
        search.add(texts[place])
        seen |= runs[place]
        assert search.found_Q.tolist() == [bool((mine | {tuple("cccc")}) & seen) for mine in runs[:60]]
    assert 0 < search.found_Q.sum() < 60


def test_the_first_set_that_matches_is_named(tmp_path):
    sets = {"exam": str(write_sets(tmp_path)["set.jsonl"]), "other": str(tmp_path / "other.txt")}
    (tmp_path / "other.txt").write_text(document(1))
    assert EvaluationSets(ContaminationConfig(sets))(PLANTED) == "exam"
    assert EvaluationSets(ContaminationConfig(dict(reversed(sets.items()))))(PLANTED) == "other"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.txt", b"too few words", "has no text of 13 words"),
        ("broken.jsonl", b'{"a": ', "cannot be read: line 1 is not JSON"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
        ("latin.txt", b"\xff\xfe", "cannot be read"),
        ("set.csv", b"a,b", "unknown suffix; try .jsonl"),
    ],
)
def test_sets_that_could_never_match_are_refused(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        EvaluationSets(ContaminationConfig({"exam": str(path)}))
    assert caught.value.key == "contamination.sets.exam"
    assert says in str(caught.value)
