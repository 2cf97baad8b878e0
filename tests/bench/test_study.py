"""The study of filtering: answers and steps are right, arms are compared fairly, and a killed study resumes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data.problems import MAX_STEPS
from bench.study import __main__ as command
from bench.study import arms, report
from bench.study.arms import EVERYTHING, HARD, JUDGE, LEARNED, RANDOM, Cell, check_fair, draw, training_problems
from bench.study.tasks import FAMILIES, LETTERS, MODULUS, count_steps, draw_exam, draw_mix, solve
from bench.study.training import CHARACTERS, TOKENS, Size, answered, encoded, train_model
from model.init import initialise
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from train.eval.config import GenerateConfig
from train.eval.generate import CachedModel, Continuation, continue_batch

CELLS = (Cell(0.5, 48, 1), Cell(0.5, 96, 8))
TINY = Size(32, 1, 5e-3)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(arms, "learned", lambda pool, judged: judged + 0.1)
    monkeypatch.setattr(arms, "EXAM_EACH", 2)


def by_python(family: str, prompt: str) -> list[str]:
    """Run a problem as a Python program and return the states."""
    first, *operations = prompt.split()
    names, states = {"x": first[-1], "y": "0"}, [first[-1]]
    for kind, operand in operations:
        if family == "rewriting":
            names["x"] = names["x"].replace(kind, operand)
        else:
            name = "x" if kind == "+" else kind
            names[name] = str(eval(f"({names[name]} + {operand}) % {MODULUS}"))
        states.append(names["x"])
    return states


def test_answers_and_steps_are_what_python_finds():
    problems = draw_mix(random.Random(1), 300, 0.5)
    for problem in problems:
        states = by_python(problem.family, problem.prompt)
        assert problem.response.replace("=", "").split() == states[1:]
        assert sum(one != other for one, other in pairwise(states)) == problem.label
        assert count_steps(problem.family, problem.prompt) == problem.label
    assert {len(one.prompt) for one in problems if one.family != "program"} == {1 + 3 * MAX_STEPS}


def test_the_check_notices_another_rule_and_another_answer():
    problem = next(one for one in draw_mix(random.Random(1), 50, 0.0) if one.family == "rewriting")
    first, *rest = problem.prompt.split()
    other = next(letter for letter in LETTERS if letter != first)
    assert solve("rewriting", " ".join([other, *rest])) != problem.response or count_steps("rewriting", first) == 0
    exam = draw_exam(random.Random(0), 1)
    wrong = [replace(one, response=one.response[:-1] + "~") for one in exam]
    assert all(solve(one.family, one.prompt) != one.response for one in wrong)


def test_a_mix_is_as_easy_as_asked_and_an_exam_is_even():
    for easy in (0.3, 0.8):
        labels = [one.label for one in draw_mix(random.Random(2), 600, easy)]
        assert abs(np.mean(np.array(labels) <= 2) - easy) < 0.06
    exam = Counter((one.family, one.label) for one in draw_exam(random.Random(2), 3))
    assert set(exam.values()) == {3} and len(exam) == len(FAMILIES) * MAX_STEPS


def chosen(cell: Cell) -> tuple[arms.Draw, dict]:
    found = draw(cell, 0)
    return found, {arm: training_problems(cell, found, arm, 0) for arm in (RANDOM, HARD, JUDGE, LEARNED, EVERYTHING)}


@pytest.mark.parametrize("cell", CELLS)
def test_arms_train_on_equally_many_tokens(cell):
    found, orders = chosen(cell)
    check_fair(cell, found, orders)
    assert {int((encoded(order)[0] > 0).sum() // 100) for order in orders.values()} == {cell.trained * 34 // 100}
    distinct = {arm: len({one.prompt for one in order}) for arm, order in orders.items()}
    assert distinct[HARD] == distinct[RANDOM] == cell.trained // cell.epochs
    easiest = {arm: min(one.label for one in order) for arm, order in orders.items()}
    assert easiest[HARD] > easiest[RANDOM]
    assert found.area[HARD] == 1 and found.area[JUDGE] > 0.7


def test_unequal_arms_and_leaked_problems_are_noticed():
    found, orders = chosen(CELLS[0])
    with pytest.raises(ValueError, match="different amounts"):
        check_fair(CELLS[0], found, {**orders, HARD: orders[HARD][:-1]})
    with pytest.raises(ValueError, match="trains on 1 held-out"):
        check_fair(CELLS[0], found, {**orders, HARD: [found.exam[0], *orders[HARD][1:]]})


def test_answered_is_what_greedy_decoding_finds():
    model = Transformer(TINY.model, resolve(PrecisionConfig(Compute.float32)))
    initialise(model, replace(TINY.model, init=replace(TINY.model.init, head_std=1.0)), seed=0)
    with torch.no_grad():
        model.head.weight[len(CHARACTERS) :] = 0  # ids that no character has
        model.head.weight[0] = 0
    exam = [one for one in draw_exam(random.Random(0), 2) if one.family == "sum"]
    prompts = [[0, *map(CHARACTERS.index, one.prompt.replace(" ", ""))] for one in exam]
    greedy = GenerateConfig(run="", tokens=2 * MAX_STEPS, temperature=0)
    asked = [Continuation(prompt, greedy) for prompt in prompts]
    continue_batch(CachedModel(model, TOKENS), asked, stop=-1)
    said = [
        replace(problem, response="".join(CHARACTERS[token] for token in one.found))
        for problem, one in zip(exam, asked, strict=True)
        if min(one.found) > 0 and max(one.found) < len(CHARACTERS)
    ]
    assert len(said) > 3 and answered(model, said).all()
    for place in (0, -1):
        wrong = [list(one.response) for one in said]
        for letters in wrong:
            letters[place] = "1" if letters[place] != "1" else "2"
        changed = [replace(one, response="".join(letters)) for one, letters in zip(said, wrong, strict=True)]
        assert not answered(model, changed).any()


def test_a_run_is_repeatable_and_depends_on_its_seed():
    problems = draw_mix(random.Random(3), 64, 0.5)
    model, again, other = (train_model(problems, TINY, seed) for seed in (0, 0, 1))
    weights = [one.head.weight for one in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def fake_training(monkeypatch, stop: int | None = None) -> list[int]:
    """Replace training by a constant answer, and let the study be interrupted before run `stop`."""
    calls: list[int] = []

    def train(order, size, seed):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(seed)
        return sum(one.label for one in order)

    monkeypatch.setattr(command, "EXAM_EACH", 2)
    monkeypatch.setattr(command, "train_model", train)
    monkeypatch.setattr(command, "answered", lambda model, exam: np.arange(len(exam)) % 7 < model % 7)
    return calls


def stored(out: Path) -> dict:
    return {key: {**row, "seconds": 0} for key, row in command.done(out / command.RUNS).items()}


def test_a_killed_study_goes_on_and_repeats_no_run(tmp_path, monkeypatch):
    whole = fake_training(monkeypatch)
    command.study(CELLS, 2, tmp_path / "whole")
    first = fake_training(monkeypatch, stop=4)
    with pytest.raises(KeyboardInterrupt):
        command.study(CELLS, 2, tmp_path / "killed")
    with (tmp_path / "killed" / command.RUNS).open("a") as file:
        file.write('{"cell": "half a li')
    second = fake_training(monkeypatch)
    command.study(CELLS, 2, tmp_path / "killed")
    assert len(first) + len(second) == len(whole) == 2 * sum(len(cell.arms) for cell in CELLS)
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")


def made_runs(cell: Cell, gain: float, seeds: int = 5) -> dict:
    """Return runs in which the hard half answers `gain` more of the problems with 7 and 8 steps than the random half."""
    chance, runs = np.random.default_rng(0), {}
    for seed in range(seeds):
        base = chance.integers(5, 15, (len(FAMILIES), MAX_STEPS))
        for arm in cell.arms:
            better = np.zeros(MAX_STEPS)
            better[-2:] = gain * report.EXAM_EACH if arm == HARD else 0
            runs[cell.name, arm, seed] = {"right": (base + better).tolist(), "area": 0.5}
    return runs


def test_differences_are_paired_and_of_the_right_group():
    cell = CELLS[0]
    found = report.compare(made_runs(cell, 0.2), cell)
    hard, learned = (dict(zip(report.GROUPS, found["interval"][arm], strict=True)) for arm in (HARD, LEARNED))
    assert hard["7-8"] == pytest.approx((0.2, 0), abs=1e-9) and hard["1-2"] == pytest.approx((0, 0), abs=1e-9)
    assert hard[report.UNIFORM][0] == pytest.approx(0.05) and learned["7-8"] == pytest.approx((0, 0), abs=1e-9)
    assert hard[report.OWN][0] == pytest.approx(0.2 * 0.5 * 2 / 6)
    swapped = {
        (name, {RANDOM: HARD, HARD: RANDOM}.get(arm, arm), seed): row
        for (name, arm, seed), row in made_runs(cell, 0.2).items()
    }
    assert report.compare(swapped, cell)["interval"][HARD][3][0] == pytest.approx(-0.2)


def test_an_interval_is_students():
    ((mean, width),) = report.interval(np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]))
    assert (mean, width) == pytest.approx((0.3, 2.7764 * 0.158114 / 5**0.5), abs=1e-4)


def test_a_table_leaves_out_seeds_that_lack_an_arm():
    runs = made_runs(CELLS[0], 0.2)
    del runs[CELLS[0].name, LEARNED, 3]
    assert report.compare(runs, CELLS[0])["seeds"] == [0, 1, 2, 4]
    assert report.compare(made_runs(CELLS[0], 0.2, seeds=1), CELLS[0]) is None
