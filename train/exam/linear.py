"""Linear expressions and systems in exact fractions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from itertools import chain


@dataclass(frozen=True)
class LinearExpression:
    """`constant` plus the sum of coefficient times name over `terms`, which holds no zeros."""

    constant: Fraction = Fraction(0)
    terms: Mapping[str, Fraction] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def __add__(self, other: LinearExpression) -> LinearExpression:
        names = dict.fromkeys(chain(self.terms, other.terms))
        sums = {name: self.terms.get(name, Fraction(0)) + other.terms.get(name, Fraction(0)) for name in names}
        terms = {name: value for name, value in sums.items() if value}
        return LinearExpression(self.constant + other.constant, terms)

    def times(self, factor: Fraction) -> LinearExpression:
        terms = {name: factor * value for name, value in self.terms.items() if factor}
        return LinearExpression(factor * self.constant, terms)

    def at(self, values: Mapping[str, Fraction]) -> Fraction:
        """Return the value for the given values of all names in it."""
        return self.constant + sum(factor * values[name] for name, factor in self.terms.items())

    def renamed(self, names: Mapping[str, str]) -> LinearExpression:
        """Replace names. Terms of names that become equal are added."""
        parts = (LinearExpression(terms={names.get(name, name): value}) for name, value in self.terms.items())
        return reduce(LinearExpression.__add__, parts, LinearExpression(self.constant))

    def __str__(self) -> str:
        parts = [(self.constant, "")] * bool(self.constant or not self.terms)
        return signed_sum([*parts, *((factor, name) for name, factor in self.terms.items())])


def signed_sum(terms: Sequence[tuple[Fraction, str]]) -> str:
    """Write coefficients and names, "" for a constant, such as "1/2 - x + 3y/2". Terms of 0 are omitted."""
    text = ""
    for factor, name in ((factor, name) for factor, name in terms if factor):
        size = abs(factor)
        above = "" if name and size.numerator == 1 else str(size.numerator)
        below = "" if size.denominator == 1 else f"/{size.denominator}"
        sign = ("-" if factor < 0 else "+") if text or factor < 0 else ""
        text += f" {sign} {above}{name}{below}" if text else f"{sign}{above}{name}{below}"
    return text or "0"


def variable(name: str) -> LinearExpression:
    return LinearExpression(terms={name: Fraction(1)})


@dataclass(frozen=True)
class LinearSystem:
    """Each row has the coefficients of `unknowns`, then the right-hand side."""

    unknowns: tuple[str, ...]
    rows: tuple[tuple[Fraction, ...], ...]

    @property
    def nullity(self) -> int | None:
        """The dimension of the set of solutions; None if it is empty."""
        _, pivots = eliminated(self.rows)
        return None if len(self.unknowns) in pivots else len(self.unknowns) - len(pivots)

    def holds(self, point: Sequence[Fraction]) -> bool:
        """Return whether a point, in the order of the unknowns, solves every equation."""
        return all(sum(a * b for a, b in zip(row, point, strict=False)) == row[-1] for row in self.rows)

    def solution(self, parameters: Sequence[str] = ("t", "s", "r")) -> dict[str, LinearExpression] | None:
        """Return each unknown as an expression in parameters, or None if there is no solution."""
        rows, pivots = eliminated(self.rows)
        if len(self.unknowns) in pivots:
            return None
        free = [column for column in range(len(self.unknowns)) if column not in pivots]
        found = {self.unknowns[column]: variable(name) for column, name in zip(free, parameters, strict=False)}
        for row, pivot in zip(rows, pivots, strict=False):
            terms = {parameters[place]: -row[column] for place, column in enumerate(free) if row[column]}
            found[self.unknowns[pivot]] = LinearExpression(row[-1], terms)
        return {name: found[name] for name in self.unknowns}


def eliminated(rows: Sequence[Sequence[Fraction]]) -> tuple[list[list[Fraction]], list[int]]:
    """Return the reduced row echelon form and the columns of its pivots (Gauss-Jordan elimination)."""
    left, pivots = [list(row) for row in rows], list[int]()
    for column in range(len(left[0]) if left else 0):
        place = len(pivots)
        chosen = next((row for row in range(place, len(left)) if left[row][column]), None)
        if chosen is None:
            continue
        left[place], left[chosen] = left[chosen], left[place]
        scale = left[place][column]
        left[place] = [value / scale for value in left[place]]
        for row in range(len(left)):
            if row != place and (factor := left[row][column]):
                left[row] = [a - factor * b for a, b in zip(left[row], left[place], strict=True)]
        pivots.append(column)
    return left, pivots


def rank(rows: Sequence[Sequence[Fraction]]) -> int:
    return len(eliminated(rows)[1])
