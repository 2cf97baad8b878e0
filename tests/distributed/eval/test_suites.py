"""Examinations on two ranks give the result of one process. Rank 0 alone judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from launch.cli import main
from parallel.comm.world import connect
from tests.support.tiny import TINY
from train.eval.open_model import open_scoring_model
from train.exam.ask import greedy_answers, run_on_main
from train.exam.base import Exam, Outcome, Question, Verdict
from train.exam.run import run_exam

TWO_RANKS = ["launch=torchrun", "launch.processes=2"]


class Vowels:
    """Ask for continuations, and count the vowels in them. `judged`: how many answers this process judged."""

    name, version, limits = "vowels", 1, None

    def __init__(self, words: str = "the model reads a line", broken: bool = False) -> None:
        self.words, self.broken, self.judged = words.split(), broken, 0

    def questions(self) -> Sequence[Question]:
        return [Question(str(i), word, max_tokens=3 + 4 * (i % 2)) for i, word in enumerate(self.words)]

    def judge(self, question: Question, answer: str) -> Verdict:
        self.judged += 1
        if question.id == "1":
            raise RuntimeError("a judge that fails")
        share = sum(letter in "aeiou" for letter in answer) / max(1, len(answer))
        return Verdict(Outcome.partly, 0.5 * share, answer[:9])

    def controls(self) -> Mapping[str, Exam]:
        return {} if len(self.words) == 1 else {"shorter": Vowels(self.words[0])}

    def machine(self) -> Mapping[str, str]:
        if self.broken:
            raise ConfigError("suite", None, "there is no sandbox")
        return {"judge": "of rank 0" if self.judged else "of another rank"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_corpus) -> Path:
    root = tmp_path_factory.mktemp("suites")
    assert main(["train", *TINY, *small_corpus, f"run.root={root}", "run.name=run", "training.steps=2"]) == 0
    return root / "run"


def examined(
    run: Path, broken: bool = False, words: str = "the model reads a line"
) -> tuple[dict[str, Any], int] | str:
    """Return the result and the number of answers that this rank judged, or the error."""
    world, exam = connect(), Vowels(words, broken)
    ask = greedy_answers(open_scoring_model(run, world), 2)
    try:
        return run_on_main(world, ask, lambda ask: run_exam(exam, ask).plain()), exam.judged
    except ConfigError as error:
        return str(error)


def test_rank_0_judges_the_answers_of_all(ranks, run):
    alone, (first, second) = ranks(1, examined, run)[0], ranks(2, examined, run)
    assert first == alone and first[0]["machine"] == {"judge": "of rank 0"}
    assert second == (alone[0], 0) and alone[1] == 5
    assert first[0]["outcomes"]["judge_failed"] == 1 and len({one["answer"] for one in first[0]["answers"]}) > 1
    assert first[0]["controls"]["shorter"]["questions"] == 1


def test_a_machine_that_cannot_judge_is_an_error_of_all(ranks, run):
    assert ranks(2, examined, run, True) == ["suite: there is no sandbox"] * 2


def test_a_question_that_is_not_asked_is_counted_apart_by_all(ranks, run):
    (first, judged), (second, _) = ranks(2, examined, run, False, "the " + "a-" * 90)
    assert first == second and first["outcomes"]["not_asked"] == 1 and judged == 1
    assert "1 of 2 questions, it takes" in first["not_asked"]


def test_a_broken_question_is_not_asked_on_any_rank(ranks, run):
    (first, judged), (second, _) = ranks(2, examined, run, False, "a two<image>")
    assert first == second and judged == 1
    assert first["not_asked"].startswith("1 of 2 questions, a question has 0 pictures, but 1 times <image>")


@pytest.mark.slow
def test_the_command_divides_a_suite_over_two_ranks(run, command, tmp_path):
    questions = [{"question": letter, "choices": ["11", "22"], "answer": 0} for letter in "abc"]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    suite = ["suite=own", "+suite.exams.short={exam: multiple_choice, options: {path: q.jsonl}}"]
    words, lines = ["evaluate", str(run), *suite], run / "evaluations.jsonl"
    for more in ([], TWO_RANKS):
        done = command(*words, *more)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["suite"] == "own"
    alone, together = map(json.loads, lines.read_text().splitlines())
    for key in ("model", "exams", "step"):
        assert alone[key] == together[key]
    done = command(*words, "+suite.exams.other={exam: x}", *TWO_RANKS)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "no such examination" in done.stderr
