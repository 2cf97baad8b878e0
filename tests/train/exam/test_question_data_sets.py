"""Questions from data sets, in the forms of well-known ones: folders on disk stand for the hub, and nothing connects."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from core.config import build
from core.errors import ConfigError
from train.exam.base import fingerprint
from train.exam.knowledge import MultipleChoice, ShortLists

MMLU = [
    {"question": "The capital of France?", "choices": ["Rome", "Paris", "Bern", "Oslo"], "answer": 1},
    {"question": "The capital of Italy?", "choices": ["Rome", "Paris", "Bern", "Oslo"], "answer": 0},
]
ARC = [
    {"id": f"arc-{label}", "stem": "2 + 2?", "choices": {"text": ["three", "four"], "label": labels}, "key": label}
    for labels, label in ((["A", "B"], "B"), (["1", "2"], "2"))
]
PIQA = [{"goal": "To open a jar", "sol1": "turn the lid", "sol2": "paint the lid", "label": 0}]
HELLASWAG = [{"ctx": "He opens the jar and", "endings": ["flies", "eats", "sings", "sleeps"], "label": "1"}]
FORMS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "mmlu": (MMLU, {}, ["Paris", "Rome"]),
    "arc": (
        ARC,
        {"question": "stem", "choices": "choices.text", "labels": "choices.label", "answer": "key", "id": "id"},
        ["four", "four"],
    ),
    "piqa": (PIQA, {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}, ["turn the lid"]),
    "hellaswag": (HELLASWAG, {"question": "ctx", "choices": "endings", "answer": "label"}, ["eats"]),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))


def stored(folder: Path, rows: list[dict[str, Any]], form: str = "parquet", split: str = "test") -> str:
    folder.mkdir(exist_ok=True)
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    elif form == "jsonl":
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    else:
        datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", ["parquet", "jsonl", "saved"])
def test_data_sets_of_many_forms_are_read(tmp_path, name, form):
    rows, columns, right = FORMS[name]
    exam = build(MultipleChoice, {"dataset": stored(tmp_path / "set", rows, form), "columns": columns})
    assert [question.reference[0][question.reference[1]] for question in exam.questions()] == right
    assert [exam.judge(one, said).score for one, said in zip(exam.questions(), right, strict=True)] == [1] * len(right)
    assert exam.judge(exam.questions()[0], "Z").score == 0, "control"
    names = ["arc-B", "arc-2"] if name == "arc" else [f"row {i}" for i in range(len(right))]
    assert [question.id for question in exam.questions()] == names


def test_a_data_set_asks_what_a_file_with_its_records_asks(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({**one, "id": f"row {i}"}) + "\n" for i, one in enumerate(MMLU))
    )
    folder = stored(tmp_path / "set", MMLU)
    assert fingerprint(MultipleChoice(str(tmp_path / "a.jsonl"))) == fingerprint(MultipleChoice(dataset=folder))
    assert len(MultipleChoice(dataset=folder, number=1).questions()) == 1
    lists = stored(tmp_path / "lists", [{"prompt": "Name two.", "items": ["a1", "b1"]}])
    exam = ShortLists(dataset=lists, columns={"question": "prompt"})
    assert exam.judge(exam.questions()[0], "b1 and a1").score == 1
    stored(tmp_path / "set", MMLU[:1], split="validation")
    assert len(MultipleChoice(dataset=folder, split="validation").questions()) == 1


BAD: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "column": ({"columns": {"choices": "endings"}}, MMLU, "columns.choices=endings: the data set has no such column"),
    "part": (
        {"columns": {"question": "stem", "choices": "choices.t"}},
        ARC,
        "try id, stem, choices.text, choices.label",
    ),
    "key": ({"columns": {"quest": "stem"}}, ARC, "columns.quest: no such key of a question; try question, choices"),
    "type": ({"columns": {"choices": "question"}}, MMLU, "row 0: choices is not a list"),
    "answer": ({}, [MMLU[0], {**MMLU[1], "answer": 4}], "row 1: needs from 2 to 26 choices, and an answer"),
    "letter": ({}, [{**MMLU[0], "answer": "x"}], "row 0: needs from 2 to 26 choices, and an answer"),
    "label": ({"columns": FORMS["arc"][1]}, [{**ARC[0], "key": "C"}], "row 0: needs from 2 to 26 choices"),
    "id": ({"columns": FORMS["arc"][1]}, [ARC[0], ARC[0]], "row 1: the id 'arc-B' is also that of row 0"),
    "null": ({}, [{**MMLU[0], "question": None}], "row 0: it has no 'question'"),
    "split": ({"split": "train"}, MMLU, "cannot be read: "),
    "both": ({"path": "a.jsonl"}, MMLU, "cannot be combined with path"),
    "subset": ({"subset": "none"}, MMLU, "cannot be read: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_data_set_that_cannot_be_asked_is_one_line(tmp_path, name):
    options, rows, reason = BAD[name]
    with pytest.raises(ConfigError) as caught:
        build(MultipleChoice, {"dataset": stored(tmp_path / "set", rows), **options})
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.key.split(".")[0] in ("dataset", "columns", "split")


def test_options_of_a_data_set_that_is_missing(tmp_path):
    for options, reason in (
        ({"columns": {"question": "x"}}, "columns: applies to a data set"),
        ({"subset": "x"}, "subset: applies to a data set"),
        ({"dataset": str(tmp_path / "nothing")}, "nothing: cannot be read: "),
        ({"dataset": "someone/nothing"}, "dataset=someone/nothing: cannot be read: "),
        ({}, "name a jsonl file"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(MultipleChoice, options)
        assert reason in str(caught.value) and "\n" not in str(caught.value)
