"""Questions in training text: planted ones are found and others are not, in token streams, in files and by the verb."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.config import build
from core.errors import ConfigError
from data.config import DataConfig
from data.corpus import Corpus, prepare
from data.filter.screen.contamination import QuestionSearch
from launch.cli import main
from launch.verbs.evaluate import EvaluateConfig
from tests.support.tiny import TINY
from train.config import SEARCH_TOKENS
from train.exam.knowledge import MultipleChoice
from train.exam.registry import make_suite, read_suites
from train.overlap import corpus as streams
from train.overlap import search
from train.overlap.samples import search_samples
from train.overlap.search import Overlap, search_corpus, search_files, search_for_model, texts_of_exam

QUESTION = "which planet of the solar system has the largest moon and the most rings of all planets"
OTHER = "which river of the old continent has the longest delta and the most islands of all rivers"
NOISE = np.random.default_rng(0).integers(0, 200, (40, 300))
TEXTS = {"q": [QUESTION], "other": [OTHER], "short": ["what is it"]}


def documents(folder: Path, planted: int) -> None:
    """Write 40 documents of noise. Number `planted` has the question in its middle."""
    folder.mkdir()
    for number, row in enumerate(NOISE):
        words = [f"w{one}" for one in row]
        if number == planted:
            words[150:150] = QUESTION.upper().replace(" ", ",  ").split(" ")
        (folder / f"{number:02}.txt").write_text(" ".join(words))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Corpus]:
    """Return two corpora that are the same but for a question in one document of the first."""
    root, found = tmp_path_factory.mktemp("corpora"), []
    for name, planted in (("with", 20), ("without", -1)):
        documents(root / name, planted)
        values = {"sources": {"text": {"kind": "files", "path": str(root / name)}}, "cache": str(root / "cache")}
        values |= {"tokenizer": {"vocab_size": 400}, "held_out": 0.05}
        found.append(prepare(build(DataConfig, values), lambda line: None))
    return found


def searched(corpus: Corpus, texts: Mapping[str, Sequence[str]] = TEXTS, limit: int = 10**9) -> Overlap:
    return search_corpus({"exam": texts}, corpus, ["text"], limit)["exam"]


def test_a_planted_question_is_found_and_others_are_not(corpora, monkeypatch):
    """Blocks of any size find it: none cuts an n-gram in two. Control: the same corpus without the question."""
    assert searched(corpora[0]).found == ["q"] and searched(corpora[0]).too_short == ["short"]
    assert searched(corpora[1]).found == []
    for size in (64, 97, 1000):
        monkeypatch.setattr(streams, "BLOCK", size)
        assert searched(corpora[0]).found == ["q"] and searched(corpora[1]).found == []
    found = searched(corpora[0])
    assert found.searched_tokens == found.corpus_tokens == len(corpora[0].stream("text", "train"))


def test_blocks_without_an_overlap_miss_the_question(corpora, monkeypatch):
    """Control of the overlap: a border in the question hides it."""
    monkeypatch.setattr(streams, "BLOCK", 32)
    assert searched(corpora[0]).found == ["q"]
    monkeypatch.setattr(streams, "_OVERLAP", 0)
    assert searched(corpora[0]).found == []


def test_a_limit_is_kept_and_said(corpora, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 100)
    found = searched(corpora[0], limit=1000)
    assert 0 < found.searched_tokens <= 1000 < (found.corpus_tokens or 0)
    assert found.beside({"q": 1.0, "other": 0.0, "short": 0.5})["status"] == "searched in part"
    chosen = streams.blocks(corpora[0], ["text"], 1000)
    assert chosen[-1][1] > len(corpora[0].stream("text", "train")) * 0.8, "evenly spread"


def test_scores_on_found_and_clean_questions_stand_apart():
    overlap = Overlap(["a", "b"], ["d"], 10, 10)
    beside = overlap.beside({"a": 1.0, "b": None, "c": 0.25, "d": 1.0})
    assert (beside["found"], beside["clean"], beside["too_short"]) == (2, 1, 1)
    assert (beside["score_found"], beside["score_clean"], beside["ids_found"]) == (1.0, 0.25, ["a", "b"])
    assert Overlap([], ["d"]).beside({"d": 1.0})["status"].startswith("no question has 13 words")


def test_the_search_agrees_with_a_plain_statement():
    """A question is found if and only if 13 consecutive words of it are in a text."""
    draw = np.random.default_rng(1)
    words = [f"w{number}" for number in range(40)]
    text = [words[i] for i in draw.integers(0, 40, 2000)]
    questions = {}
    for number in range(60):
        length, at = int(draw.integers(5, 20)), int(draw.integers(0, 1900))
        own = text[at : at + length] if number % 2 else [words[i] for i in draw.integers(0, 40, length)]
        questions[str(number)] = [" ".join(own)]
    finder = QuestionSearch(questions)
    finder.add(" ".join(text))
    there = {tuple(text[i : i + 13]) for i in range(len(text) - 12)}
    for name, is_found in zip(questions, finder.found_Q, strict=True):
        own = questions[name][0].split()
        expected = any(tuple(own[i : i + 13]) in there for i in range(len(own) - 12))
        assert is_found == expected, name
    assert 0 < finder.found_Q.sum() < 30 and finder.too_short_Q.sum() > 10


def test_files_are_searched_up_to_a_limit(tmp_path):
    documents(tmp_path / "texts", 3)
    (tmp_path / "a.jsonl").write_text(json.dumps({"x": {"y": ["no", QUESTION]}}) + "\n")
    for pattern in ("texts", "texts/03.txt", "a.jsonl"):
        assert search_files({"e": TEXTS}, str(tmp_path / pattern), 10**6)["e"].found == ["q"]
    assert search_files({"e": TEXTS}, str(tmp_path / "texts/04.txt"), 10**6)["e"].found == [], "control"
    found = search_files({"e": TEXTS}, str(tmp_path / "texts"), 100)["e"]
    assert (found.found, found.searched_tokens, found.corpus_tokens) == ([], 100, None)
    with pytest.raises(ConfigError, match=r"corpus=.*nothing: no such file"):
        search_files({"e": TEXTS}, str(tmp_path / "nothing"), 100)


def test_sources_without_weight_are_not_searched(monkeypatch):
    """`late` has a weight in the second phase alone, `never` in none."""
    phases = [SimpleNamespace(weights=None), SimpleNamespace(weights={"late": 1.0, "never": 0.0})]
    monkeypatch.setattr(streams, "phases", lambda config: phases)
    monkeypatch.setattr(streams, "source_weights", lambda config, corpus: {"usual": 0.5, "late": 0.0, "never": 0.0})
    corpus: Any = SimpleNamespace(sources=["usual", "late", "never"])
    assert streams.trained_sources(None, corpus) == ["usual", "late"]  # type: ignore[arg-type]
    del phases[1]
    assert streams.trained_sources(None, corpus) == ["usual"], "control"  # type: ignore[arg-type]


def test_solved_examples_are_not_looked_for():
    """What questions share is no sign that one of them is known: instructions and solved examples are left out."""
    exams = make_suite(read_suites(["smoke"])["smoke"])
    texts = {label: texts_of_exam(exam) for label, exam in exams.items()}
    for label, exam in exams.items():
        for question in exam.questions():
            own = texts[label][question.id][0]
            assert own in question.prompt and len(own) < len(question.prompt) / 1.3, label
            choices = "\nA. " in question.prompt
            assert question.prompt.endswith(f"{own}\nAnswer:") or (choices and f"{own}\nA. " in question.prompt)


def test_choices_make_no_short_question_long(tmp_path):
    """A question of 6 words with choices of 24 in all cannot be found, so it is not clean. A choice of 13 words can be
    found. Control: a long question is clean.
    """
    short, choices = "What is the capital of Italy?", [f"the city number {name} of it" for name in ("ab", "cd", "ef")]
    rows = {"short": (short, choices), "long": (QUESTION, choices), "choice": (short, [OTHER, "another"])}
    lines = [{"id": key, "question": one[0], "choices": one[1], "answer": 0} for key, one in rows.items()]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    texts = texts_of_exam(MultipleChoice(str(tmp_path / "q.jsonl")))
    for content, found, too_short in (("no", [], ["short", "choice"]), (OTHER, ["choice"], ["short"])):
        (tmp_path / "text.txt").write_text(content)
        overlap = search_files({"e": texts}, str(tmp_path / "text.txt"), 10**6)["e"]
        beside = overlap.beside(dict.fromkeys(rows, 1.0))
        assert (overlap.found, overlap.too_short, beside["clean"]) == (found, too_short, 1)
    lettered = ["\n".join([short, *(f"A. {one}" for one in choices)])]
    assert not QuestionSearch({"short": lettered}).too_short_Q[0], "control: with its choices it would seem long"


@pytest.mark.parametrize("content", ["", " \n", '{"x": 1}'])
def test_files_without_text_are_refused(tmp_path, content):
    path = tmp_path / ("a.jsonl" if content.startswith("{") else "a.txt")
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"corpus=.*has no text in which to look for questions"):
        search_for_model({"e": TEXTS}, tmp_path, str(path), 10**6)
    path.write_text('{"x": "a"}' if content.startswith("{") else "a")
    assert search_for_model({"e": TEXTS}, tmp_path, str(path), 10**6)[0]["e"].found == [], "control"


def test_samples_of_tasks_are_looked_for_by_their_documents(tmp_path):
    documents(tmp_path / "texts", 3)
    logged = [
        {"doc_id": i, "doc": {"question": [QUESTION, OTHER][i], "answer": 0}, "metrics": ["acc"], "acc": [1.0, 0.0][i]}
        for i in (0, 1)
    ]
    found = search_samples({"task": logged}, tmp_path, str(tmp_path / "texts"), 10**6)["task"]
    assert (found["found"], found["clean"], found["ids_found"]) == (1, 1, ["0"])
    assert found["score_found"] == {"acc,none": 1.0} and found["score_clean"] == {"acc,none": 0.0}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"a": "text"}) + "\n{broken\n")
    broken = search_samples({"task": logged}, tmp_path, str(tmp_path / "bad.jsonl"), 10**6)["task"]
    assert broken["status"] == "not looked for" and "cannot be read" in broken["why"], "the scores are not lost"
    nothing = search_samples({"task": logged}, tmp_path, None, 10**6)["task"]
    assert nothing["status"] == "not looked for" and "corpus=FILES" in nothing["why"]


def test_the_verb_puts_contamination_beside_the_score(tmp_path, small_corpus, capsys, monkeypatch):
    """Of a run, its corpus is searched once; files in its place on demand; of another model, nothing without files."""
    line = [
        "train",
        *TINY,
        *small_corpus,
        "model.balance.bias_rate=0",
        f"run.root={tmp_path}",
        "run.name=run",
        "training.seq_len=128",
    ]
    assert main([*line, "training.steps=1"]) == 0
    planted = "while for the model reads a line and writes another def return if else"
    rows = [
        {"id": name, "question": text, "choices": ["11", "22"], "answer": 0}
        for name, text in (("in", planted), ("out", QUESTION))
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = f"{{exam: multiple_choice, options: {{path: '{tmp_path / 'q.jsonl'}'}}}}"
    words = ["suite=own", f"+suite.exams.short={exam}"]

    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 0
    found = json.loads(capsys.readouterr().out)["exams"]["short"]["contamination"]
    assert (found["status"], found["ids_found"], found["clean"]) == ("searched", ["in"], 1)
    kept = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())["exams"]["short"]
    assert kept["contamination"] == found
    monkeypatch.setattr(search, "search_corpus", lambda *arguments: pytest.fail("is searched again"))
    run, texts = tmp_path / "run", {"short": texts_of_exam(MultipleChoice(str(tmp_path / "q.jsonl")))}
    assert search_for_model(texts, run, None, SEARCH_TOKENS)[0]["short"].found == ["in"]
    assert search_for_model(texts, run, None, 0) == ({}, "search_tokens=0")
    (tmp_path / "text.txt").write_text(f"{QUESTION}?")
    assert search_for_model(texts, run, str(tmp_path / "text.txt"), SEARCH_TOKENS)[0]["short"].found == ["out"]
    assert "the model is not a run" in search_for_model(texts, tmp_path, None, SEARCH_TOKENS)[1]
    monkeypatch.setattr(streams, "find_corpus", lambda *arguments: None)
    assert "are not where they were" in search_for_model(texts, run, None, SEARCH_TOKENS)[1]
    with pytest.raises(ConfigError, match="corpus=x: applies to tasks and suites"):
        EvaluateConfig(run="r", corpus="x")
