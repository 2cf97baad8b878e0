"""Examine mathematics: generated linear systems, quadratic equations and word problems with exact answers.

A question is a pure function of (seed, number). `train/exam/answers_text.py` lists the forms of answers that are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

from core.errors import ConfigError
from data.images.generated.draws import Draws
from train.exam.answers_text import (
    Claim,
    Point,
    RootsAnswer,
    SystemAnswer,
    UnreadableAnswer,
    read_number,
    read_roots,
    read_system,
)
from train.exam.base import Outcome, Question, Verdict
from train.exam.config import Generated
from train.exam.linear import LinearSystem, rank, signed_sum

UNKNOWNS = ("x", "y", "z")
_SUBSTITUTIONS = 4
_HALF = 0.5
"""Score of "infinitely many solutions" without the solutions, and of one of two roots."""


@dataclass(frozen=True)
class LinearSystems(Generated):
    """Linear systems in turn with one solution, with none and with infinitely many.

    The last are right only as a whole: each of the given families must have the dimension of the set of solutions, and
    random members of it must solve the system. "infinitely many" alone scores 0.5. The figure `kind` is the share of
    answers with the right number of solutions.
    """

    unknowns: int = 2
    """2 or 3."""

    name: ClassVar[str] = "linear_systems"
    version: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unknowns not in (2, 3):
            raise ConfigError("unknowns", self.unknowns, "must be 2 or 3", [2, 3])

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return UNKNOWNS[: self.unknowns]

    def questions(self) -> Sequence[Question]:
        names = " and ".join(self._names) if self.unknowns == 2 else "x, y and z"
        task = f"Solve for {names}. Give all solutions, with a parameter t if there are infinitely many."
        worked = [self._system("worked", place) for place in range(self.shots)]
        before = [f"{_equations(one)}\nAnswer: {solution_text(one)}\n\n" for one in worked]
        systems = [self._system("asked", place) for place in range(self.number)]
        return [
            Question(
                f"{self.name}-{self.unknowns}-{place}",
                f"{task}\n\n{''.join(before)}{_equations(one)}\nAnswer:",
                one,
                max_tokens=48,
                own_text=_equations(one),
            )
            for place, one in enumerate(systems)
        ]

    def judge(self, question: Question, answer: str) -> Verdict:
        system: LinearSystem = question.reference
        try:
            found = read_system(answer, system.unknowns)
        except UnreadableAnswer as error:
            return Verdict(Outcome.unreadable, 0, str(error), {"kind": 0})
        score, note = judge_system(system, found)
        is_kind = _said(found) == (Claim.none if system.nullity is None else min(system.nullity, 1))
        outcome = Outcome.right if score == 1 else Outcome.partly if score else Outcome.wrong
        return Verdict(outcome, score, note, {"kind": float(is_kind)})

    def _system(self, what: str, place: int) -> LinearSystem:
        draws = Draws("linear system", what, self.seed, self.unknowns, place)
        make = (_with_one_solution, _without_solution, _with_many_solutions)[place % 3]
        return make(draws, self._names)


def judge_system(system: LinearSystem, found: SystemAnswer) -> tuple[float, str]:
    """Return the score of an answer and why."""
    match system.nullity:
        case None:
            return (1, "no solution") if found.claim is Claim.none else (0, "there is no solution")
        case _ if found.claim is Claim.none:
            return 0, "there is a solution"
        case 0:
            if found.claim is Claim.infinite or not found.points:
                return 0, "there is one solution"
            is_right = all(
                all(one.is_constant for one in point) and system.holds([one.constant for one in point])
                for point in found.points
            )
            return (1, "the solution") if is_right else (0, "not the solution")
        case _:
            if not found.points:
                return _HALF, "infinitely many, but which?"
            faults = [fault for point in found.points if (fault := family_fault(system, point))]
            return (0, faults[0]) if faults else (1, "all solutions")


def family_fault(system: LinearSystem, point: Point) -> str:
    """Say why a parametrised family is not the set of solutions; return an empty string if it is.

    A family lies in the set of solutions if random members of it solve the system, and is all of it if its direction
    space has the dimension of the set.
    """
    names = list(dict.fromkeys(name for one in point for name in one.terms))
    directions = [[one.terms.get(name, Fraction(0)) for one in point] for name in names]
    if rank(directions) != system.nullity:
        return f"a family of dimension {rank(directions)} instead of {system.nullity}"
    draws = Draws("substitution", *point)
    for _ in range(_SUBSTITUTIONS):
        values = {name: Fraction(draws.between(-99, 99), draws.between(1, 9)) for name in names}
        if not system.holds([one.at(values) for one in point]):
            return "a family that has other points than the solutions"
    return ""


def _said(found: SystemAnswer) -> Claim | int:
    """Return no solution, or 0 for one solution and 1 for infinitely many."""
    if found.claim is Claim.none:
        return Claim.none
    is_family = any(not one.is_constant for point in found.points for one in point)
    return int(found.claim is Claim.infinite or is_family)


def solution_text(system: LinearSystem) -> str:
    """Return the answer in words and expressions."""
    solution = system.solution()
    if solution is None:
        return "no solution"
    values = ", ".join(f"{name} = {value}" for name, value in solution.items())
    return f"infinitely many solutions: {values}" if system.nullity else values


def _equations(system: LinearSystem) -> str:
    return ", ".join(f"{signed_sum(list(zip(row, system.unknowns, strict=False)))} = {row[-1]}" for row in system.rows)


def _with_one_solution(draws: Draws, names: tuple[str, ...]) -> LinearSystem:
    point = [_value(draws) for _ in names]
    rows = _independent(draws, len(names), len(names))
    return LinearSystem(names, tuple(_whole([*row, _dot(row, point)]) for row in rows))


def _with_many_solutions(draws: Draws, names: tuple[str, ...]) -> LinearSystem:
    """Return equations of which one to two follow from the others. No coefficient is 0: no equation is solved."""
    point = [Fraction(draws.between(-9, 9)) for _ in names]
    while True:
        first = _independent(draws, draws.between(1, len(names) - 1), len(names))
        rows = [[*row, _dot(row, point)] for row in first]
        while len(rows) < len(names):
            factors = [_nonzero(draws, 3) for _ in first]
            rows.append([_dot(factors, column) for column in zip(*rows[: len(first)], strict=True)])
        if all(value for row in rows for value in row[:-1]) and len({tuple(row) for row in rows}) == len(rows):
            return LinearSystem(names, tuple(map(tuple, rows)))


def _without_solution(draws: Draws, names: tuple[str, ...]) -> LinearSystem:
    *rows, last = _with_many_solutions(draws, names).rows
    return LinearSystem(names, (*rows, (*last[:-1], last[-1] + _nonzero(draws, 9))))


def _independent(draws: Draws, height: int, width: int) -> list[list[Fraction]]:
    while True:
        rows = [[_nonzero(draws, 6) for _ in range(width)] for _ in range(height)]
        if rank(rows) == height:
            return rows


def _nonzero(draws: Draws, most: int) -> Fraction:
    return Fraction(draws.between(1, most) * (1 - 2 * draws.below(2)))


def _value(draws: Draws) -> Fraction:
    """Return a whole number, or one time in four a fraction."""
    return Fraction(draws.between(-9, 9), draws.between(2, 4) if draws.below(4) == 0 else 1)


def _dot(row: Sequence[Fraction], point: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(row, point, strict=True)), Fraction(0))


def _whole(row: Sequence[Fraction]) -> tuple[Fraction, ...]:
    scale = math.lcm(*(value.denominator for value in row))
    return tuple(value * scale for value in row)


@dataclass(frozen=True)
class Quadratics(Generated):
    """Quadratic equations in turn with two rational roots, with no real root and with a double root.

    One of two roots scores 0.5.
    """

    name: ClassVar[str] = "quadratics"
    version: ClassVar[int] = 3

    def questions(self) -> Sequence[Question]:
        before = []
        for place in range(self.shots):
            equation, roots = self._equation("worked", place)
            said = " or ".join(f"x = {root}" for root in roots) or "no real solution"
            before.append(f"{equation}\nAnswer: {said}\n\n")
        asked = [self._equation("asked", place) for place in range(self.number)]
        task = "Find all real solutions."
        return [
            Question(
                f"{self.name}-{i}",
                f"{task}\n\n{''.join(before)}{equation}\nAnswer:",
                roots,
                max_tokens=32,
                own_text=equation,
            )
            for i, (equation, roots) in enumerate(asked)
        ]

    def judge(self, question: Question, answer: str) -> Verdict:
        roots: tuple[Fraction, ...] = question.reference
        try:
            found = read_roots(answer)
        except UnreadableAnswer as error:
            return Verdict(Outcome.unreadable, 0, str(error))
        if found == RootsAnswer(Claim.open if roots else Claim.none, roots):
            return Verdict(Outcome.right, 1)
        if found.claim is Claim.open and set(found.roots) < set(roots):
            return Verdict(Outcome.partly, _HALF, "one of two roots")
        return Verdict(Outcome.wrong, 0, "other roots")

    def _equation(self, what: str, place: int) -> tuple[str, tuple[Fraction, ...]]:
        """Return the equation as text, and its roots, ascending."""
        draws = Draws("quadratic", what, self.seed, place)
        while True:
            scale, p, q = _nonzero(draws, 3), _value(draws), _value(draws)
            if place % 3 == 1:  # (x - p)^2 + |q| + 1
                factors, roots = (Fraction(1), -2 * p, p * p + abs(q) + 1), tuple[Fraction, ...]()
            else:
                q = p if place % 3 == 2 else q
                factors, roots = (Fraction(1), -p - q, p * q), tuple(sorted({p, q}))
            if len(roots) == (2, 0, 1)[place % 3]:
                break
        row = [scale * value for value in _whole(factors)]
        return f"{signed_sum(list(zip(row, ('x^2', 'x', ''), strict=True)))} = 0", roots


@dataclass(frozen=True)
class WordProblems(Generated):
    """Problems in words whose answer is one number: purchases, ages, distances, shares and two kinds of tickets."""

    name: ClassVar[str] = "word_problems"
    version: ClassVar[int] = 2

    def questions(self) -> Sequence[Question]:
        before = "".join(
            f"{text}\nAnswer: {number}\n\n" for text, number in (self._problem("worked", i) for i in range(self.shots))
        )
        asked = [self._problem("asked", place) for place in range(self.number)]
        return [
            Question(f"{self.name}-{place}", f"{before}{text}\nAnswer:", number, max_tokens=24, own_text=text)
            for place, (text, number) in enumerate(asked)
        ]

    def judge(self, question: Question, answer: str) -> Verdict:
        try:
            found = read_number(answer)
        except UnreadableAnswer as error:
            return Verdict(Outcome.unreadable, 0, str(error))
        is_right = found == question.reference
        return Verdict(Outcome.right, 1) if is_right else Verdict(Outcome.wrong, 0, f"{found}")

    def _problem(self, what: str, place: int) -> tuple[str, Fraction]:
        return _PROBLEMS[place % len(_PROBLEMS)](Draws("word problem", what, self.seed, place))


def _purchase(draws: Draws) -> tuple[str, Fraction]:
    pens, pads, price, other = (draws.between(2, 9) for _ in range(4))
    text = (
        f"A pen costs {price} dollars and a pad {other} dollars. How many dollars do {pens} pens and {pads} pads cost?"
    )
    return text, Fraction(pens * price + pads * other)


def _ages(draws: Draws) -> tuple[str, Fraction]:
    child, older, years = draws.between(4, 15), draws.between(20, 40), draws.between(2, 9)
    text = (
        f"Ana is {child} years old, and her mother is {older} years older. How old will her mother be in {years} years?"
    )
    return text, Fraction(child + older + years)


def _distance(draws: Draws) -> tuple[str, Fraction]:
    speed, halves = draws.between(20, 90), draws.between(3, 9)
    hours = Fraction(halves, 2)
    shown = str(hours) if hours.denominator == 1 else f"{halves // 2}.5"
    return f"A train travels {speed} km per hour for {shown} hours. How many km does it travel?", speed * hours


def _shares(draws: Draws) -> tuple[str, Fraction]:
    people, each, eaten = draws.between(3, 8), draws.between(2, 9), draws.between(1, 9)
    apples = people * each + eaten
    text = f"Of {apples} apples {eaten} are eaten. {people} friends share the others equally. How many does each get?"
    return text, Fraction(each)


def _tickets(draws: Draws) -> tuple[str, Fraction]:
    adults, children, price = draws.between(2, 20), draws.between(2, 20), draws.between(3, 8)
    dear = price + draws.between(1, 6)
    text = (
        f"A ticket costs {dear} dollars for adults and {price} dollars for children. {adults + children} tickets were "
        f"sold for {adults * dear + children * price} dollars. How many of them were for adults?"
    )
    return text, Fraction(adults)


_PROBLEMS: tuple[Callable[[Draws], tuple[str, Fraction]], ...] = (_purchase, _ages, _distance, _shares, _tickets)
