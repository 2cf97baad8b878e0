"""Running examinations: outcomes, intervals, judges that crash, stored results and paired comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import pytest

from core.errors import ConfigError, LeviathanError
from train.exam.base import NotAsked, Outcome, Question, Verdict, fingerprint
from train.exam.config import ExamConfig, SuiteConfig
from train.exam.pictures import SceneQuestions
from train.exam.registry import EXAMS, make_exam, make_suite
from train.exam.results import check_comparable, compare_suites, last_results, scores_by_step
from train.exam.run import run_exam, run_suite, summary
from train.exam.statistics import compare, interval, mcnemar, sign_flip


@dataclass(frozen=True)
class Parity:
    """Is a number even? The judge scores the answers "yes" and "half", and crashes at "crash"."""

    number: int = 10
    same_id: bool = False
    name, version = "parity", 1

    def questions(self) -> Sequence[Question]:
        return [Question("0" if self.same_id else str(i), f"Is {i} even?", i % 2 == 0) for i in range(self.number)]

    def judge(self, question: Question, answer: str) -> Verdict:
        if answer == "crash":
            raise KeyError("a fault\nof the judge")
        if answer == "exit":
            raise SystemExit(3)
        if answer == "interrupt":
            raise KeyboardInterrupt
        if answer in ("nan", "inf"):
            return Verdict(Outcome.partly, 0.5, "", {"length": float(answer)})
        if answer == "half":
            return Verdict(Outcome.partly, 0.5, "", {"length": 4})
        is_right = (answer == "yes") == question.reference
        return Verdict(Outcome.right if is_right else Outcome.wrong, int(is_right), "", {"length": len(answer)})


def said(*answers: str):
    return lambda questions: [answers[i % len(answers)] for i in range(len(questions))]


def test_results_count_outcomes_and_average_scores():
    found = run_exam(Parity(), said("yes", "no")).plain()
    assert (found["score"], found["outcomes"]["right"], found["interval_method"]) == (1, 10, "wilson")
    assert found["interval"] == pytest.approx([0.7224672, 1], abs=1e-6), "Wilson's interval of 10 of 10"
    assert run_exam(Parity(), said("no", "yes")).plain()["interval"][0] == 0
    mixed = run_exam(Parity(), said("yes", "half")).plain()
    assert (mixed["score"], mixed["interval_method"], mixed["figures"]["length"]) == (0.75, "bootstrap", 3.5)
    assert mixed["interval"][0] < 0.75 < mixed["interval"][1]
    assert mixed["interval"] == run_exam(Parity(), said("yes", "half")).plain()["interval"], "a fixed seed"
    with pytest.raises(LeviathanError, match="10 questions, but 1 answers"):
        run_exam(Parity(), lambda questions: ["yes"])


def test_a_judge_that_crashes_is_counted_apart():
    found = run_exam(Parity(), said("yes", "crash")).plain()
    assert (found["outcomes"]["judge_failed"], found["outcomes"]["right"], found["score"]) == (5, 5, 1)
    failed = found["answers"][1]
    assert failed["score"] is None and failed["note"].startswith("KeyError: ") and "\n" not in failed["note"]
    assert run_exam(Parity(), said("crash")).plain()["score"] is None
    assert run_exam(Parity(), said("yes", "x")).plain()["outcomes"]["judge_failed"] == 0, "control"


@pytest.mark.parametrize("answer", ["exit", "nan", "inf"])
def test_a_judge_that_exits_or_finds_no_number_has_failed(answer):
    found = run_exam(Parity(), said("yes", answer)).plain()
    assert (found["outcomes"]["judge_failed"], found["score"], found["figures"]) == (5, 1, {"length": 3})
    with pytest.raises(KeyboardInterrupt):
        run_exam(Parity(), said("interrupt"))
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_asked_is_counted_apart(tmp_path):
    def ask(questions):
        return [NotAsked(f"{i} tokens") if i < 3 else "yes" for i, _ in enumerate(questions)]

    found = run_exam(Parity(), ask).plain()
    assert (found["outcomes"]["not_asked"], found["outcomes"]["right"], found["outcomes"]["wrong"]) == (3, 3, 4)
    assert found["score"] == 3 / 7 and found["answers"][0]["score"] is None
    assert found["not_asked"] == "3 of 10 questions, the first: 0 tokens"
    none = run_exam(Parity(), lambda questions: [NotAsked("no encoder")] * 10).plain()
    assert (none["score"], none["interval"], none["not_asked"]) == (None, None, "10 of 10 questions, no encoder")
    assert run_exam(Parity(), said("yes")).plain()["not_asked"] is None, "control"
    assert compare(none, found)["left_out"] == 10 and compare(found, found)["questions"] == 7
    line = {"suite": "own", "exams": {"some": found, "none": none}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    shown = [str(one) for (one,) in scores_by_step(tmp_path / "evaluations.jsonl").values()]
    assert shown[0].startswith("0.429 (") and shown[0].endswith("; not asked: 3 of 10 questions, the first: 0 tokens")
    assert shown[1] == "not asked: 10 of 10 questions, no encoder"


def test_controls_are_reported_beside_the_score():
    exam = SceneQuestions(6)
    own = {one.pictures: one.reference[0] for one in exam.questions()}
    found = run_exam(exam, lambda questions: [own.get(one.pictures, "?") for one in questions]).plain()
    assert found["score"] == 1 and found["controls"]["other_picture"]["score"] == 0
    assert found["controls"]["black_picture"]["outcomes"]["unreadable"] == 6
    assert "answers" not in found["controls"]["other_picture"]


IN_A_SANDBOX = {"programs", "pages"}


@pytest.mark.slow  # make sandbox
@pytest.mark.parametrize("kind", sorted(IN_A_SANDBOX))
def test_kinds_in_a_sandbox_can_be_made(kind):
    assert len(make_exam(ExamConfig(kind, {})).questions()) > 5


def test_every_kind_of_the_registry_can_be_made(tmp_path):
    files = {"multiple_choice": {"choices": ["x1", "y1"], "answer": 0}, "short_lists": {"items": ["a"]}}
    for kind in EXAMS.keys() - IN_A_SANDBOX:
        options = {}
        if kind in files:
            options = {"path": str(tmp_path / f"{kind}.jsonl")}
            (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"question": "q", **files[kind]}))
        exam = make_exam(ExamConfig(kind, options))
        assert len(fingerprint(exam)) == 64
    assert make_exam(ExamConfig(f"{__name__}:Parity", {"number": 3})).questions()[2].id == "2"


REFUSED = {
    "no kind": (ExamConfig("quadratic"), "suite.exams.a.exam=quadratic: no such examination; try linear_systems"),
    "no option": (ExamConfig("quadratics", {"numbr": 2}), "suite.exams.a.options.numbr: no such key; try number"),
    "number": (ExamConfig("quadratics", {"number": 0}), "suite.exams.a.options.number=0: must be positive"),
    "type": (ExamConfig("quadratics", {"number": "x"}), "suite.exams.a.options.number=x"),
    "shots": (ExamConfig("quadratics", {"shots": 9}), "suite.exams.a.options.shots=9: must be at most 8"),
    "unknowns": (ExamConfig("linear_systems", {"unknowns": 4}), "unknowns=4: must be 2 or 3"),
    "subject": (ExamConfig("scenes", {"subject": "x"}), "suite.exams.a.options.subject"),
    "thing": (ExamConfig("scenes", {"thing": "x"}), "suite.exams.a.options.thing=x: no such kind; try pencil, ball"),
    "size": (ExamConfig("scenes", {"size": 1}), "suite.exams.a.options.size=1: must be from 84"),
    "module": (ExamConfig("nothing.here:Exam"), "suite.exams.a.exam=nothing.here:Exam: no module"),
    "no exam": (ExamConfig("train.exam.config:SuiteConfig"), "must be a class with name, version, questions, judge"),
    "same id": (ExamConfig(f"{__name__}:Parity", {"same_id": True}), "two of its questions have the id '0'"),
    "nothing": (ExamConfig(f"{__name__}:Parity", {"number": 0}), "asks nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_examination_is_one_line(name):
    exam, reason = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        make_suite(SuiteConfig("own", {"a": exam}))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_mcnemar_and_sign_flips_are_exact():
    """9 of 10 questions in favour of one model: 2 (C(10,0) + C(10,1)) / 2**10. Sign flips of equal sizes agree."""
    differences = [1.0] * 9 + [-1.0] + [0.0] * 5
    assert mcnemar(differences) == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert sign_flip(differences) == pytest.approx(mcnemar(differences))
    assert mcnemar([1.0, -1.0]) == mcnemar([0.0]) == sign_flip([]) == 1
    many = [0.5] * 40 + [-0.25] * 10
    assert sign_flip(many) == sign_flip(many) < 0.001 < 0.1 < sign_flip([0.5, -0.25] * 10)
    assert interval([]) is None


def test_results_are_compared_by_question():
    good, bad, half = (run_exam(Parity(), said(*one)).plain() for one in (["yes", "no"], ["no"], ["half", "crash"]))
    found = compare(bad, good)
    assert (found["better"], found["worse"], found["difference"], found["test"]) == (5, 0, 0.5, "mcnemar_exact")
    assert found["p_value"] == pytest.approx(2 / 2**5)
    found = compare(half, good)
    assert (found["questions"], found["left_out"], found["difference"], found["test"]) == (5, 5, 0.5, "sign_flip")
    with pytest.raises(ConfigError, match="asks other questions"):
        compare(good, run_exam(Parity(number=9), said("yes")).plain())


def test_suites_are_compared_with_stored_results(tmp_path):
    suite = SuiteConfig("own", {"a": ExamConfig(f"{__name__}:Parity", {"number": 4})})
    line, better = run_suite(suite, said("no")), run_suite(suite, said("yes", "no"))
    assert line["exams"]["a"]["options"] == {"number": 4} and "answers" not in summary(line)["exams"]["a"]
    other = {**line, "suite": "other"}
    text = [json.dumps(one) for one in (better, line, other)]
    (tmp_path / "evaluations.jsonl").write_text("\n".join([*text, text[0][:50], "{}"]))
    (tmp_path / "out.json").write_text(text[1])
    for place in (tmp_path, tmp_path / "out.json"):
        assert compare_suites(last_results(str(place), "own"), better)["a"]["better"] == 2
    (tmp_path / "bad.json").write_text("[]")
    for place, reason in (("bad.json", "is not an object"), ("nothing", "cannot be read"), ("out.json", "no results")):
        with pytest.raises(ConfigError, match=reason):
            last_results(str(tmp_path / place), "smoke")
    with pytest.raises(ConfigError, match="has other examinations"):
        compare_suites({"exams": {}}, better)


def test_other_questions_are_noticed_before_they_are_asked():
    suite, other = (SuiteConfig("own", {"a": ExamConfig(f"{__name__}:Parity", {"number": n})}) for n in (4, 5))
    line = run_suite(suite, said("no"))
    check_comparable(line, make_suite(suite))
    with pytest.raises(ConfigError, match="against: a: asks other questions"):
        check_comparable(line, make_suite(other))
    with pytest.raises(ConfigError, match="has other examinations"):
        check_comparable(line, {"b": Parity(4)})
