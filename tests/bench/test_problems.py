"""The labelled problems: answers are right, labels are the numbers of steps, and length does not reveal them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter

import pytest

from bench.data.problems import MAX_STEPS, Problem, make_problems, read_problems
from core.errors import DataError


def run(problem: Problem) -> tuple[str, int]:
    """Run the expression or program in a prompt with Python; return the answer and the number of operations."""
    if problem.family == "expression":
        text = re.search(r"[(\d][\d()+*/ -]*\d", problem.prompt)
        return f"{eval(text[0]):.0f}", sum(text[0].count(sign) for sign in "+-*/")
    program = problem.prompt.split("\n\n", 1)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    rounds = re.search(r"range\(1, (\d+)\)", program)
    operations = len(re.findall(r"^\w+ (?:= \w+ (?:[+*-]|//)|(?:[+*-]|//)=) ", program, re.MULTILINE))
    return printed.getvalue().strip(), int(rounds[1]) - 1 if rounds else operations


def test_answers_and_steps_are_what_python_finds():
    checked = [problem for problem in make_problems(800, 0) if problem.family in ("expression", "program")]
    assert len(checked) == 400
    for problem in checked:
        answer, steps = run(problem)
        assert (re.findall(r"\d+", problem.response)[-1], steps) == (answer, problem.label), problem


def test_the_check_notices_a_wrong_answer_and_a_wrong_count():
    problem = next(p for p in make_problems(100, 0) if p.family == "program")
    answer, steps = run(problem)
    changed = problem.prompt.replace("print(", "print(1 + ")
    assert run(Problem(changed, problem.response, problem.label, "program"))[0] != answer
    assert steps != problem.label + 1


def test_a_seed_is_the_set_and_steps_are_even():
    problems = make_problems(640, 3)
    assert problems == make_problems(640, 3)
    assert problems != make_problems(640, 4)
    assert len({problem.prompt for problem in problems}) == 640
    counts = Counter((problem.family, problem.label) for problem in problems)
    assert len(counts) == 4 * MAX_STEPS and set(counts.values()) == {20}


def test_problems_of_one_length_differ_in_steps():
    """In each eighth of the answers, sorted by length, at least four step counts occur and none makes up half."""
    problems = sorted(make_problems(1600, 5), key=lambda problem: len(problem.response))
    for begin in range(0, 1600, 200):
        shares = Counter(problem.label for problem in problems[begin : begin + 200])
        assert len(shares) >= 4 and max(shares.values()) < 100


def test_a_labelled_set_is_read_from_a_path_or_rejected(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": "1 + 1?", "response": "2", "label": 1}, {"prompt": "q", "response": "a", "label": 2.5}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_problems(path) == [Problem("1 + 1?", "2", 1.0), Problem("q", "a", 2.5)]
    for line in ("{", '{"prompt": "a", "response": "b"}', '{"prompt": "", "label": "x"}', "3", ""):
        path.write_text(line)
        with pytest.raises(DataError, match=r"set\.jsonl"):
            read_problems(path)
