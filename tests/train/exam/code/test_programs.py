"""Python programs in the sandbox: right solutions pass, wrong ones and lies do not."""

from __future__ import annotations

import json

import pytest

from core.config import build
from train.exam.base import Outcome
from train.exam.code.programs import OWN, ProgrammingProblem, Programs
from train.exam.code.sandbox import Limits, SandboxError

pytestmark = pytest.mark.slow
SOLUTIONS = {row["task_id"]: row["canonical_solution"] for row in map(json.loads, OWN.read_text().splitlines())}
WRONG = {
    "own/running_maximum": ("found.append(number if", "found.append(max(numbers) if"),
    "own/roman": ('(4, "IV"), ', ""),
    "own/is_balanced": ("return not opened", "return True"),
    "own/merge_intervals": ("max(merged[-1][1], high)", "high"),
    "own/primes_below": ("+ 1))", "))"),
    "own/unshift": ("-places", "places"),
    "own/longest_run": ("max(best, length)", "length"),
    "own/transpose": ("list(column)", "tuple(column)"),
    "own/word_counts": ("text.lower()", "text"),
    "own/seconds_of": ("not text or ", ""),
}
"""For each problem a solution with one mistake."""
LIES = {
    "exit": "    import os; os._exit(0)",
    "system_exit": "    raise SystemExit(0)",
    "success_word": "    print('passed'); print('{\"failure\": \"\"}'); return []",
    "equal_to_all": "    return Equal()\n\nclass Equal(list):\n    def __eq__(self, other):\n        return True\n",
    "builtins": "    import builtins\n    builtins.list.__eq__ = builtins.AssertionError = lambda *_: True\n    return []",
    "frames": "    import sys, gc\n    for one in gc.get_objects():\n        if isinstance(one, dict):\n            one['failure'] = ''\n    return []",
    "channel": '    import os\n    for n in range(3, 40):\n        try:\n            os.write(n, b\'["passed"]\\n{"failure": ""}\\n\')\n        except OSError:\n            continue\n    return []',
    "forged_report": '    import os\n    for n in range(0, 40):\n        try:\n            os.write(n, b\'{"failure": ""}\')\n        except OSError:\n            continue\n    os._exit(0)',
    "recursion": "    return running_maximum(numbers)",
    "nested": "    value = []\n    for _ in range(100_000):\n        value = [value]\n    return value",
    "huge": "    return ['x' * 10**7]",
    "memory": "    return bytearray(10**10)",
    "object": "    return object()",
    "trace": "    import sys\n    sys.settrace(lambda *_: 1 / 0)\n    sys.setrecursionlimit(10**8)\n    return running_maximum(numbers)",
}


@pytest.fixture(scope="module")
def exam() -> Programs:
    return Programs(limits=Limits(wall_s=20))


def of(exam: Programs, id: str):
    return next(question for question in exam.questions() if question.id == id)


@pytest.mark.parametrize("id", SOLUTIONS)
def test_a_right_program_passes_and_a_wrong_one_does_not(exam, id):
    question, solution = of(exam, id), SOLUTIONS[id]
    old, new = WRONG[id]
    assert old in solution
    assert exam.judge(question, solution).outcome is Outcome.right
    fenced = f"```python\n{question.prompt}{solution}```\nThat is all."
    assert exam.judge(question, fenced).score == 1
    verdict = exam.judge(question, solution.replace(old, new))
    assert (verdict.outcome, verdict.score) == (Outcome.wrong, 0)


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_not_believed(exam, name):
    verdict = exam.judge(of(exam, "own/running_maximum"), LIES[name])
    print(name, verdict.note)
    assert verdict.outcome is Outcome.wrong and verdict.note


def test_an_endless_program_ends_at_its_limit():
    exam = build(Programs, {"limits": {"wall_s": 3}})
    assert exam.limits.memory_mib == 512
    verdict = exam.judge(of(exam, "own/roman"), "    while True:\n        number += 1")
    assert verdict.note == "was ended at its limit of wall time"


def test_an_answer_without_code_is_unreadable(exam):
    assert exam.judge(of(exam, "own/roman"), "I do not know.").outcome is Outcome.unreadable


def test_what_a_program_prints_does_not_matter(exam):
    answer = "    print('x' * 10**6)\n" + SOLUTIONS["own/transpose"]
    assert exam.judge(of(exam, "own/transpose"), answer).score == 1


def test_broken_tests_do_not_count_as_a_wrong_answer(exam):
    question = of(exam, "own/roman")
    broken = ProgrammingProblem(question.reference.prompt, "roman", "import os\nos._exit(3)")
    with pytest.raises(SandboxError, match="the tests failed"):
        exam._failure(broken, question.prompt + SOLUTIONS["own/roman"])


def test_a_file_of_problems_is_examined(tmp_path):
    path = tmp_path / "mine.jsonl"
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    path.write_text(json.dumps({"task_id": "a", "prompt": "def twice(n):\n", "entry_point": "twice", "test": test}))
    exam = Programs(path=str(path))
    assert [exam.judge(of(exam, "a"), f"    return {body}").score for body in ("n * 2", "n * 3")] == [1, 0]
