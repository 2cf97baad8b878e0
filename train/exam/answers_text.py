"""Read the answers to mathematical questions from free text. Nothing in the text is executed.

Only what follows the last "answer:", "answer is" or "\\boxed{" is read, if the text has one of these.

Accepted, in any case, with `$`, `\\(`, `\\frac{a}{b}` and the like of LaTeX:

- No solution: "no solution", "no solutions", "no real solution(s)", "no (real) roots", "does not have a solution",
  "does not have (any) real solutions", "has no solution", "inconsistent", "unsolvable", "the empty set", "∅", or
  nothing but "none". Complex roots may follow: "no real solution: x = 1 ± 2i".
- Infinitely many: "infinitely many", "an infinite number", "infinite solutions", and a family without such words.
- Values of a system: "x = 2, y = -1/3", "x=2 and y=-1/3", "y = -1/3; x = 2", "x = 4/2 = 2, ...", "(2, -1/3)",
  "(x, y) = (2, -1/3)", "{(2, -1/3)}", "x = 2 y = -1/3", "x = 2 \\text{ and } y = -1/3", "x = 2 \\quad y = -1/3";
  "P(2, -1/3)", "P = (2, -1/3)", "S = {(2, -1/3)}"; `[...]` and `⟨...⟩` as `(...)`. Tuples are in the order of the
  unknowns. A capital letter before a tuple that stands alone names a point; any other letter is a factor.
- A family: "x = 1 - t, y = t", "x = 1 - y" (an unknown without a value is free), "y = t, x = 1 - y", "(1 - s, s)",
  "{(1-s, s)}", "(1, 0) + t(-1, 1)", "t(-1, 1) + (1, 0)", "(1, 0) + (-1, 1)t", "t = y, x = 1 - t",
  "x = 1 - t, y = t (t ∈ R)", "x = 1 - t, y = t (t real)". Parameters have one letter, perhaps with digits after it (t,
  s1, λ, t_1).
- Roots of a quadratic in x: "x = 2 or x = 3", "x = 2, 3", "x1 = 2, x2 = 3", "x_1 = 2 and x_2 = 3", "x = 1 ± 2",
  "x ∈ {2, 3}", "2 and 3", "{2, 3}", "the roots are 2 and 3". Words after a value, as in "x = 3 (double root)", are
  ignored.
- A number: "12", "12 tickets", "$12", "1,200", "-5/2", "2.5", "twelve", "... = 12".

A number is whole, a decimal (which is exact: 0.33 is not 1/3) or a quotient. Expressions have +, -, *, / by a number,
products with a number without a sign (2t, 3(t - 1)), and parentheses. Not accepted: equations that are not solved
("x + y = 1"), powers, roots, mixed numbers ("1 1/2"), decimal commas ("x = 2,5").

A line break separates as a semicolon does. Bullets are ignored. A dash or a number before a value is a bullet only if
two lines have one: "- 12" is negative, and "45. Ana is 12" has two numbers. A text that says two things ("no solution,
or x = 2", "x = 2 or x = 3" for a system) or negates a number of solutions ("not inconsistent") is unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from core.errors import OneLineError
from train.exam.linear import LinearExpression, variable

LONGEST, DIGITS, DEPTH, CHAIN = 4000, 40, 20, 8
"""Characters of the end of an answer that are read, digits of a number, nested parentheses, and "=" in a chain."""
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


class UnreadableAnswer(OneLineError):
    """A text in which no answer can be read, or that says two things."""


class Claim(Enum):
    """What a text says about the number of solutions."""

    none = "none"
    infinite = "infinite"
    open = "open"
    """Nothing in words: the values tell."""


Point = tuple[LinearExpression, ...]
"""The expression of each unknown, in order."""


@dataclass(frozen=True)
class SystemAnswer:
    """`points`: what the text gives as values, in each of its notations; all must be right."""

    claim: Claim
    points: tuple[Point, ...]


@dataclass(frozen=True)
class RootsAnswer:
    claim: Claim
    roots: tuple[Fraction, ...]


_NONE = re.compile(
    r"(?:does not|doesn't|do not|don't) have(?: an?| any)?(?: real)? (?:solutions?|roots?)\b"
    r"|\bno(?: real)? (?:solutions?|roots?)\b"
    r"|\binconsistent\b|\bunsolvable\b|\bempty ?set\b|∅|\A\W*none\W*\Z"
)
_INFINITE = re.compile(r"\binfinitely many\b|\ban infinite number\b|\binfinite(?:ly)?(?: many)? solutions\b")
_NEGATED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|without)\b|n't\b)(?:(?!\bbut\b|\bunique\b)[^.,;:]){0,20}\Z"
)
_ANSWER = re.compile(r"\banswer\s*(?::|\bis\b:?|=)|\\boxed\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bb|bf|it|rm)|operatorname|mbox)\s*\{([^{}]*)\}")
_EQUATION = r"[$*\\(]*[a-z](?:_?\{?\d+\}?)?\s*(?:=|∈|\\in\b)"
_DASHES = re.compile(r"^[ \t]*-[ \t]+", re.MULTILINE)
_NUMBERING = re.compile(r"^[ \t]*\d+[.)][ \t]+", re.MULTILINE)
_SURE_BULLET = re.compile(
    rf"^[ \t]*(?:[*•]|-(?=[ \t]+{_EQUATION})|\d+[.)](?=[ \t]+(?:{_EQUATION}|[$*\\]*[(\[{{⟨])))[ \t]+", re.MULTILINE
)
"""Of a single line: a dash before a number is a sign, and a number before a word is an answer."""
_POINT_NAME = re.compile(
    r"(?<![\w\\])[A-Z](?:_?\{?\d+\}?)?(?=\s*(?:\\left\s*)?([(\[⟨][^()\[\]⟨⟩,]*,[^()\[\]⟨⟩]*[)\]⟩])\s*(.?))", re.DOTALL
)
"""The name of a point, the tuple after it, and the sign after that."""
_OPERATORS = "+-*/·\N{MULTIPLICATION SIGN}\N{MINUS SIGN}\N{EN DASH}"
_NO_ROOT = re.compile(r"\bdiscriminant\b|[\d)}√*±=+-]\s*i(?![^\W\d_])")
"""Beside "no real solution", the discriminant and numbers with the imaginary unit are no roots."""
_SIGNS = {
    "-": ("\N{MINUS SIGN}", "\N{EN DASH}"),
    "*": ("·", "\N{MULTIPLICATION SIGN}", "\\cdot", "\\times"),
    "/": ("\N{FRACTION SLASH}", "÷"),
    "(": ("⟨", "[", "\\langle"),
    ")": ("⟩", "]", "\\rangle"),
    "{": ("\\{",),
    "}": ("\\}",),
    "'": ("\N{RIGHT SINGLE QUOTATION MARK}",),
    "±": ("\\pm",),
    "∈": ("\\in",),
    "√": ("\\sqrt",),
    "∅": ("\\emptyset", "\\varnothing"),
    "λ": ("\\lambda",),
    "μ": ("\\mu",),
    "^2": ("²",),
    "^3": ("³",),
    " 1/2": ("½",),
    "; ": ("\\\\", "\\quad", "\\qquad"),
    "=": ("&=",),
    " ": ("$", "**", "\\(", "\\)", "\\,", "\\;", "\\:", "\\!", "~"),
    "": ("\\left", "\\right"),
    **{str(digit): (sign,) for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}
_REPLACED = {old: new for new, signs in _SIGNS.items() for old in signs}
_AFTER_VALUE = ",;.:)}|?=\"'`→⇒∀"
_REMARK = 12
"""Tokens of a parenthesis in which a word makes it a remark."""
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|([a-z\u03b1-\u03c9](?:_?\{?\d+\}?)?(?![^\W\d_]))|([^\W\d_]+)|(\S))")


def final_part(text: str, numbered: bool = True) -> str:
    """Return what follows the last mark of a final answer, in lower case, without bullets and the commands of LaTeX.
    `numbered`: "1." at the start of lines is a bullet too.
    """
    text = _POINT_NAME.sub(_unnamed, text[-LONGEST:]).lower()
    marks = list(_ANSWER.finditer(text))
    text = text[marks[-1].end() :] if marks else text
    text = _without_bullets(text.strip(), numbered)
    text = re.sub(r"\n+", "; ", text)
    while (plain := _FRACTION.sub(r"((\1)/(\2))", _FONT.sub(r" \1 ", text))) != text:
        text = plain
    for old in sorted(_REPLACED, key=len, reverse=True):
        text = text.replace(old, _REPLACED[old])
    return text.replace("\\", " ")


def _unnamed(match: re.Match[str]) -> str:
    """Return nothing for the name of a point, and the letter itself where it is a factor: "(1, 0) + T(-1, 1)"."""
    before = match.string[: match.start()].rstrip()[-1:]
    is_factor = (before and before in f"{_OPERATORS}^)]}}⟩∈") or (match[2] and match[2] in _OPERATORS)
    return match[0] if is_factor else ""


def _without_bullets(text: str, numbered: bool) -> str:
    """Remove bullets. Dashes and numbers are bullets if two lines have one; else they may belong to the answer."""
    for pattern in (_DASHES, _NUMBERING) if numbered else (_DASHES,):
        if len(pattern.findall(text)) > 1:
            text = pattern.sub("", text)
    return _SURE_BULLET.sub("", text) if numbered else text


def claim(text: str) -> Claim:
    """Return what a text says in words. Raises `UnreadableAnswer` for two claims and for a negated one."""
    found = {
        said: [match.start() for match in pattern.finditer(text)]
        for said, pattern in ((Claim.none, _NONE), (Claim.infinite, _INFINITE))
    }
    if any(_NEGATED.search(text[:start]) for starts in found.values() for start in starts):
        raise UnreadableAnswer("a number of solutions is negated")
    said = [one for one, starts in found.items() if starts]
    if len(said) > 1:
        raise UnreadableAnswer("says both no and infinitely many solutions")
    return said[0] if said else Claim.open


def read_system(text: str, unknowns: Sequence[str]) -> SystemAnswer:
    """Read the answer to a linear system. Raises `UnreadableAnswer`."""
    text = final_part(text)
    said = claim(text)
    scanner = Scanner(text, unknowns)
    assignments = scanner.assignments()
    values = _joined([(name, value) for name, value in assignments if name in unknowns])
    if values:
        values = _defined(assignments, unknowns) | values
    label = tuple(map(variable, unknowns))  # (x, y) = ...
    points = [point for point in scanner.tuples() if point != label]
    if values:
        points.append(_resolved(values, unknowns))
    if said is Claim.none and points:
        raise UnreadableAnswer("says no solution, and gives values")
    if said is Claim.open and not points:
        raise UnreadableAnswer("gives no values and no number of solutions")
    return SystemAnswer(said, tuple(points))


def read_roots(text: str, unknown: str = "x") -> RootsAnswer:
    """Read the answer to a quadratic equation. Raises `UnreadableAnswer`."""
    text = final_part(text)
    said = claim(text)
    if said is Claim.none:  # "no real solution: x = 1 ± 2i"
        text = "; ".join(one for one in re.split(r"[,;:]|\b(?:or|and)\b", text) if not _NO_ROOT.search(one))
    roots = dict.fromkeys(
        root for signs in "+-" for root in _roots(Scanner(text.replace("±", signs), [unknown]), unknown)
    )
    if said is Claim.none and roots:
        raise UnreadableAnswer("says no solution, and gives values")
    if said is Claim.open and not roots:
        raise UnreadableAnswer("gives no values")
    return RootsAnswer(said, tuple(sorted(roots)))


def read_number(text: str) -> Fraction:
    """Read the only number of the answer, or the one after the last "=". Raises `UnreadableAnswer`."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", final_part(text, numbered=False)).rpartition("=")[2]
    words = "|".join(WORDS)
    found = re.findall(rf"(?<![\w.])(-?\s*(?:\d+(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?![.\d]))?)|\b({words})\b", text)
    numbers = {Fraction(WORDS.index(word)) if word else _fraction(digits) for digits, word in found}
    if len(numbers) != 1:
        raise UnreadableAnswer("gives several numbers" if numbers else "gives no number")
    return numbers.pop()


def _fraction(text: str) -> Fraction:
    above, _, below = re.sub(r"\s", "", text).partition("/")
    if len(text) > DIGITS or (below and not int(below)):
        raise UnreadableAnswer("a number is too long, or divided by zero")
    return Fraction(above) / (Fraction(below) if below else 1)


def _joined(assignments: list[tuple[str, LinearExpression]]) -> dict[str, LinearExpression]:
    """Return the value of each unknown. An expression may be followed by a number, which is its value."""
    found: dict[str, LinearExpression] = {}
    for name, value in assignments:
        before = found.get(name, value)
        if before != value and (before.is_constant or not value.is_constant):
            raise UnreadableAnswer(f"gives different values of {name}")
        found[name] = value
    return found


def _defined(assignments: list[tuple[str, LinearExpression]], unknowns: Sequence[str]) -> dict[str, LinearExpression]:
    """Return the unknowns by which parameters are defined: "t = y/2" gives y = 2t."""
    found = {}
    for name, value in assignments:
        if name not in unknowns and len(value.terms) == 1 and (unknown := next(iter(value.terms))) in unknowns:
            found[unknown] = (variable(name) + LinearExpression(-value.constant)).times(1 / value.terms[unknown])
    return found


def _resolved(values: dict[str, LinearExpression], unknowns: Sequence[str]) -> Point:
    """Return the point that assignments describe. An unknown without a value is free. An unknown whose value is a
    single parameter may stand for it in the values of others.
    """
    free = {name: name for name in unknowns if name not in values}
    for name, value in values.items():
        if not value.constant and [*value.terms.values()] == [1] and next(iter(value.terms)) not in unknowns:
            free[name] = next(iter(value.terms))
        elif value == variable(name):
            free[name] = name
    for name, value in values.items():
        if name not in free and any(one in unknowns and one not in free for one in value.terms):
            raise UnreadableAnswer(f"the value of {name} depends on another unknown that has a value")
    return tuple(variable(free[name]) if name in free else values[name].renamed(free) for name in unknowns)


def _roots(scanner: Scanner, unknown: str) -> list[Fraction]:
    """Return the values after each "x =", or those of a text that has nothing but values."""
    assigned = [value for name, value in scanner.assignments(lists=True) if re.fullmatch(rf"{unknown}\d*", name)]
    assigned = assigned or scanner.bare_values()
    if not all(value.is_constant for value in assigned):
        raise UnreadableAnswer("a root is not a number")
    return [value.constant for value in assigned]


class Scanner:
    """The tokens of a text, and what can be read from them: numbers, names of one letter, words and signs."""

    def __init__(self, text: str, unknowns: Sequence[str]) -> None:
        matches = list(_TOKEN.finditer(text))
        self.tokens = [match.groups() for match in matches]
        self.spaced = [match[0][0].isspace() for match in matches]
        self.unknowns = unknowns
        self._heights = self._nesting()

    def _nesting(self) -> dict[int, int]:
        """Return how many parentheses are nested in each one that is closed, with itself. The others are not read: that
        from each of 4,000 open ones would take seconds.
        """
        heights: dict[int, int] = {}
        opened: list[int] = []
        for at in range(len(self.tokens)):
            if self._is(at, "("):
                opened.append(at)
                heights[at] = 1
            elif opened and self._is(at, ")"):
                inner = opened.pop()
                if opened:
                    heights[opened[-1]] = max(heights[opened[-1]], heights[inner] + 1)
        for at in opened:
            del heights[at]
        return heights

    def _is(self, at: int, signs: str) -> bool:
        return at < len(self.tokens) and (self.tokens[at][3] or "") in signs and self.tokens[at][3] is not None

    def _name(self, at: int) -> str | None:
        found = self.tokens[at][1] if at < len(self.tokens) else None
        return None if found is None else re.sub(r"[_{}]", "", found)

    def assignments(self, lists: bool = False) -> list[tuple[str, LinearExpression]]:
        """Return each NAME = EXPRESSION, the last expression of a chain NAME = A = B. `lists`: with the further values
        of NAME = A, B or C.
        """
        found, end = [], 0
        for at in range(len(self.tokens)):
            name = self._name(at)
            if name is None or not self._is(at + 1, "=∈") or (at and at != end and self._belongs(at - 1)):
                continue
            if self._is(at + 1, "∈") and self._name(at + 2) is not None:
                continue  # "t ∈ R"
            if at and at == end and self._is(at - 2, "+-") and not self._is(at - 3, "="):
                raise UnreadableAnswer('"x = 1 - 2 y = 3" can be read in two ways')
            value, end = self._chain(at + 2 + (lists and self._is(at + 2, "{")))
            if value is not None and not lists and self._is_decimal_comma(end):
                raise UnreadableAnswer("a value has a decimal comma")
            if value is None:
                end = 0
                continue
            found.append((name, value))
            while lists and self._is_separator(end):
                value, after = self._expression(self._after_separators(end))
                if value is None or self._is(after, "=") or not value.is_constant:
                    break
                found.append((name, value))
                end = after
        return found

    def _after_separators(self, at: int) -> int:
        while self._is_separator(at):
            at += 1
        return at

    def _belongs(self, at: int) -> bool:
        """Return whether the token makes the name after it a part of an expression: "2x = 4" gives no x."""
        return self.tokens[at][0] is not None or self._is(at, "+-*/^√)")

    def _is_separator(self, at: int) -> bool:
        return self._is(at, ",;") or (at < len(self.tokens) and self.tokens[at][2] in ("or", "and"))

    def _is_decimal_comma(self, at: int) -> bool:
        """Return whether digits, a comma and digits follow without a space, and no product of the latter."""
        around = [at - 1, at + 1]
        digits = all(place < len(self.tokens) and self.tokens[place][0] is not None for place in around)
        close = self._is(at, ",") and digits and not (self.spaced[at] or self.spaced[at + 1])
        return close and self._name(at + 2) is None and not self._is(at + 2, "(*")

    def _chain(self, at: int) -> tuple[LinearExpression | None, int]:
        value, end = self._expression(at)
        links = 0
        while value is not None and self._is(end, "=") and links < CHAIN:
            links += 1
            value, end = self._expression(end + 1)
        if value is not None and end < len(self.tokens):
            number, _, _, sign = self.tokens[end]
            if number or (sign and sign not in _AFTER_VALUE and not self._is_remark(end)):
                raise UnreadableAnswer(f"a value is followed by {number or sign!r}")
        return value, end

    def _is_remark(self, at: int) -> bool:
        """Return whether a parenthesis with words or a domain follows: (checked), (t real), (t ∈ R)."""
        if not self._is(at, "("):
            return False
        for place in range(at + 1, min(at + 1 + _REMARK, len(self.tokens))):
            if self.tokens[place][2] is not None or self._is(place, "∈"):
                return True
            if self._is(place, ")"):
                return False
        return False

    def tuples(self) -> list[Point]:
        """Return each (A, B, ...) with as many expressions as unknowns, and each sum of multiples of such tuples."""
        found, at = [], 0
        while at < len(self.tokens):
            point, end = self._vector(at)
            if point is not None:
                if at and self._is(at - 1, ")*/^√"):
                    raise UnreadableAnswer(f"a tuple follows {self.tokens[at - 1][3]!r}")
                found.append(point)
            at = max(end, at + 1) if point is not None else at + 1
        return found

    def _vector(self, at: int) -> tuple[Point | None, int]:
        if self._is(at, "+-") and self._is(at + 1, "(") and self.spaced[at + 1]:
            return None, at  # a dash before a tuple
        total, at = self._multiple(at)
        while total is not None and self._is(at, "+-"):
            more, end = self._multiple(at)
            if more is None:
                raise UnreadableAnswer("a tuple is followed by something else")
            total, at = tuple(a + b for a, b in zip(total, more, strict=True)), end
        return total, at

    def _multiple(self, at: int) -> tuple[Point | None, int]:
        """Read a tuple, perhaps with a sign, a number and a parameter before it, or a parameter after it."""
        factor, end = self._sign_and_factor(at)
        point, end = self._tuple(end)
        if point is None:
            return None, at
        after = end + self._is(end, "*")
        is_article = after == end and self.spaced[end : end + 1] == [True] and self._name(end) == "a"
        if (name := self._name(after)) is not None and not self._is(after + 1, "=∈") and not is_article:
            if not factor.is_constant:
                raise UnreadableAnswer("has a product of two unknown numbers")
            factor, end = variable(name).times(factor.constant), after + 1
        if self._is(end, "*/^"):
            raise UnreadableAnswer("a tuple is followed by something else")
        if factor.is_constant:
            return tuple(one.times(factor.constant) for one in point), end
        if not all(one.is_constant for one in point):
            raise UnreadableAnswer("has a product of two unknown numbers")
        return tuple(factor.times(one.constant) for one in point), end

    def _sign_and_factor(self, at: int) -> tuple[LinearExpression, int]:
        factor = LinearExpression(Fraction(-1 if self._is(at, "-") else 1))
        at += self._is(at, "+-")
        if at < len(self.tokens) and self.tokens[at][0] is not None:
            factor, at = factor.times(_fraction(self.tokens[at][0])), at + 1
        if (name := self._name(at)) is not None:
            factor, at = variable(name).times(factor.constant), at + 1
        return factor, at + self._is(at, "*")

    def _tuple(self, at: int) -> tuple[Point | None, int]:
        if not self._is(at, "(") or self._is_remark(at):
            return None, at
        parts: list[LinearExpression] = []
        while len(parts) < len(self.unknowns):
            value, at = self._expression(at + 1)
            if value is None or not self._is(at, ",)"):
                return None, at
            parts.append(value)
            if self._is(at, ")"):
                break
        if len(parts) != len(self.unknowns) or not self._is(at, ")"):
            return None, at
        return tuple(parts), at + 1

    def bare_values(self) -> list[LinearExpression]:
        """Return the values of a text that has nothing else but separators and braces, perhaps after words that end
        in a colon, "are" or "is". Return none for other texts.
        """
        found, end = [], len(self.tokens)
        at = max((at + 1 for at in range(end) if self._is(at, ":") or self.tokens[at][2] in ("are", "is")), default=0)
        at += self._is(at, "{")
        while at < end:
            value, at = self._expression(at)
            if value is None:
                return []
            found.append(value)
            while self._is_separator(at) or self._is(at, "}."):
                at += 1
        return found

    def _expression(self, at: int, depth: int = 0) -> tuple[LinearExpression | None, int]:
        """Read TERM + TERM - TERM ... Return None if there is none, and the place after it."""
        total: LinearExpression | None = None
        while True:
            sign, after = 1, at
            while self._is(after, "+-"):
                sign, after = (-sign if self._is(after, "-") else sign), after + 1
            if total is not None and after == at:
                return total, at
            term, end = self._term(after, depth)
            if term is None:
                return total, at
            term = term.times(Fraction(sign))
            total, at = (term if total is None else total + term), end

    def _term(self, at: int, depth: int) -> tuple[LinearExpression | None, int]:
        """Read a product of factors, of which at most one is not a number."""
        total, at = self._factor(at, depth)
        while total is not None:
            divides = self._is(at, "/")
            after = at + (divides or self._is(at, "*"))
            if after == at and not self._is_product(at):
                return total, at
            factor, end = self._factor(after, depth)
            if factor is None:
                return total, at
            if divides and (not factor.is_constant or not factor.constant):
                raise UnreadableAnswer("divides by what is not a number, or by zero")
            if not (factor.is_constant or total.is_constant):
                raise UnreadableAnswer("has a product of two unknown numbers")
            if divides:
                total = total.times(1 / factor.constant)
            else:
                total = total.times(factor.constant) if factor.is_constant else factor.times(total.constant)
            at = end
        return None, at

    def _is_product(self, at: int) -> bool:
        """Return whether a factor without a sign follows: a parenthesis, or a name that begins no equation. In
        "x = 2y = 4" it begins none, in "x = 2 y = 4" it does.
        """
        begins = self._is(at + 1, "=∈") and self.spaced[at]
        return (self._name(at) is not None and not begins) or self._is(at, "(")

    def _factor(self, at: int, depth: int) -> tuple[LinearExpression | None, int]:
        if at >= len(self.tokens):
            return None, at
        if (number := self.tokens[at][0]) is not None:
            return LinearExpression(_fraction(number)), at + 1
        if (name := self._name(at)) is not None:
            return variable(name), at + 1
        if depth + self._heights.get(at, DEPTH + 1) <= DEPTH and not self._is_remark(at):
            value, end = self._expression(at + 1, depth + 1)
            if value is not None and self._is(end, ")"):
                return value, end + 1
        return None, at
