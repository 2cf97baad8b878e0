"""The two further labelled kinds: labels are those of the structure, length does not reveal them, code runs."""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from copy import deepcopy
from heapq import heapify, heappop, heappush

import pytest
from scipy.stats import spearmanr

from bench.data.code_tasks import GRADES, TOPICS, make_tasks
from bench.data.maths import DOMAINS, LEVELS, make_maths
from bench.data.problems import Problem

KINDS = {make_maths: (len(DOMAINS), LEVELS), make_tasks: (len(TOPICS), GRADES)}
INPUTS = {"numbers": [5, 3, 8, 1, 9, 2, 7], "text": "ab (c) eaeb listen silent", "tables": [[3, 1, 2], [4, 6, 5]]}
LIBRARY = (bisect_left, OrderedDict, deque, heapify, heappop, heappush)


@pytest.mark.parametrize("make", KINDS)
def test_a_seed_is_the_set_and_labels_are_even(make):
    families, labels = KINDS[make]
    problems = make(20 * families * labels, 3)
    assert problems == make(len(problems), 3) != make(len(problems), 4)
    assert len({problem.prompt for problem in problems}) == len(problems)
    counts = Counter((problem.family, problem.label) for problem in problems)
    assert len(counts) == families * labels and set(counts.values()) == {20}


@pytest.mark.parametrize("make", KINDS)
def test_length_hardly_depends_on_the_label(make):
    problems = make(1000, 5)
    labels = [problem.label for problem in problems]
    for lengths in ([len(one.prompt) for one in problems], [len(one.response) for one in problems]):
        assert abs(spearmanr(labels, lengths).statistic) < 0.2
    longer = [label + len(one.prompt) / 500 for label, one in zip(labels, problems, strict=True)]
    assert spearmanr(labels, longer).statistic > 0.2


def code_of(task: Problem) -> str:
    return re.search(r"```python\n(.*?)\n```", task.response, re.DOTALL)[1]


def nested(code: str) -> bool:
    """Return whether a loop has a loop or a branch inside."""
    loops = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.For | ast.While)]
    return any(
        isinstance(part, ast.For | ast.While | ast.If) for loop in loops for part in ast.walk(loop) if part != loop
    )


def test_solutions_run_and_have_the_structure_of_their_grade():
    tasks = make_tasks(360, 0)
    for task in tasks:
        names, code = {one.__name__: one for one in LIBRARY}, code_of(task)
        exec(code, names)
        given = "3 4 + 2 *" if "postfix" in task.prompt else deepcopy(INPUTS[task.family])
        names[re.match(r"def (\w+)", code)[1]](given)
        assert nested(code) >= (task.label == 2) and not (nested(code) and task.label == 1), code


def test_few_answers_stand_in_the_prompt():
    problems = make_maths(600, 0)
    answers = [re.findall(r"\\boxed\{(\d+)\}", problem.response)[-1] for problem in problems]
    shown = [bool(re.search(rf"\b{a}\b", one.prompt)) for a, one in zip(answers, problems, strict=True)]
    assert sum(shown) < 0.4 * len(problems)
