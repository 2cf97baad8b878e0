r"""Generate mathematics with worked solutions in LaTeX, in six domains and at five levels.

The label is the level: the sum of the costs of the reasoning moves that lead to the answer. A move takes a number to a
number. It costs 1 if a formula is evaluated once; 2 if an equation is solved, or two operations or a known theorem
are needed; 3 if the idea has to be found (a complement, a cycle, cases, an inversion). Level 3 is one move of cost 3,
or moves of costs 1 and 2, or three of cost 1.

Drawn independently of the level: the size of the first number, the wording, the detail of the solution, and the
lengths to which sentences without content fill up the prompt and the solution.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template

from bench.data.problems import Problem

LEVELS = 5
_MOST = 5000
"""Largest result of a move."""


class Wording(Template):
    """Text in which @name is replaced. Braces and dollar signs, of which LaTeX is full, stand for themselves."""

    delimiter = "@"


@dataclass(frozen=True)
class _Move:
    domain: str
    cost: int
    lowest: int
    highest: int
    """Range of the number that the move takes, `@s` in the wordings."""
    result: Callable[[int, int, int, int], int | None]
    """Returns the result from that number and three drawn from 2 to 9: `@a`, `@b` and `@c`. None: not for these."""
    asked: tuple[str, ...]
    short: str
    long: str


def _powers(base: int, exponent: int, modulus: int) -> int:
    return pow(base, exponent, modulus)


def _divisors(n: int) -> int:
    return sum(n % d == 0 for d in range(1, n + 1))


def _reduced(part: int, whole: int) -> int:
    return (part + whole) // math.gcd(part, whole)


def _iterate(value: int, factor: int, shift: int, times: int) -> int:
    for _ in range(times):
        value = factor * value - shift
    return value


_MOVES = (
    _Move("algebra", 1, 1, 400, lambda s, a, b, c: a * s + b,
          ("the value of $@{a}x + @b$ when $x = @s$", "$@a \\cdot @s + @b$",
          "what $f(@s)$ equals if $f(x) = @{a}x + @b$"),
          "$@a \\cdot @v + @b = @r$", "Substituting gives $@a \\cdot @v + @b$, that is, $@r$."),
    _Move("algebra", 1, 2, 900, lambda s, a, b, c: s + b - c if s + b > c else None,
          ("the number $y$ with $y - @b + @c = @s$", "the solution of $y + @c = @s + @b$"),
          "$y = @v + @b - @c = @r$", "Moving the constants to the other side, we find $y = @v + @b - @c = @r$."),
    _Move("algebra", 2, 2, 300, lambda s, a, b, c: max(a, b) + c if a != b else None,
          ("the larger root of $(x - @c)^2 - (@a + @b)(x - @c) + @a \\cdot @b + @s = @s$",
           "the greatest real number with $(x - @c - @a)(x - @c - @b) + @s = @s$"),
          "$(x - @c - @a)(x - @c - @b) = 0$, so $x = @r$",
          "The constant cancels and the quadratic factors as $(x - @c - @a)(x - @c - @b)$; its larger zero is $@r$."),
    _Move("algebra", 2, 2, 60, lambda s, a, b, c: a * (a * s - b) - b,
          ("$f(f(@s))$, where $f(t) = @{a}t - @b$", "the result of applying $g(t) = @{a}t - @b$ twice to $@s$"),
          "$@a(@a \\cdot @v - @b) - @b = @r$",
          "The inner value is $@a \\cdot @v - @b$, and the outer one is then $@r$."),
    _Move("algebra", 3, 4, 60, lambda s, a, b, c: s * s - 2 * a if s * s > 4 * a else None,
          ("the sum of the squares of the roots of $x^2 - @{s}x + @a = 0$",
           "$p^2 + q^2$ for real numbers with $p + q = @s$ and $pq = @a$"),
          "$@v^2 - 2 \\cdot @a = @r$",
          "By Vieta, $p + q = @v$ and $pq = @a$; hence $p^2 + q^2 = (p + q)^2 - 2pq = @v^2 - 2 \\cdot @a = @r$."),
    _Move("algebra", 3, 2, 200, lambda s, a, b, c: 2 * s - 1 + a,
          ("the number of integers $x$ with $|x - @b| < @s$, plus $@a$",
           "$@a$ more than the count of integers that satisfy $|x + @b| < @s$"),
          "$2 \\cdot @v - 1 + @a = @r$",
          "Either sign of the absolute value gives $@v - 1$ integers, and zero one more, so $2 \\cdot @v - 1 + @a = "
          "@r$."),
    _Move("counting", 1, 1, 300, lambda s, a, b, c: s * a,
          ("the number of outfits from $@s$ shirts and $@a$ hats", "how many pairs have a first part out of $@s$ and a "
           "second out of $@a$", "the number of dinners if there are $@s$ dishes and $@a$ desserts"),
          "$@v \\cdot @a = @r$", "Each of the $@v$ choices goes with each of the $@a$ others: $@r$."),
    _Move("counting", 1, 1, 400, lambda s, a, b, c: s + a + b,
          ("the number of toys in boxes of $@s$, $@a$ and $@b$",
          "how many guests come if groups of $@s$, $@a$ and $@b$ do"),
          "$@v + @a + @b = @r$", "The groups are disjoint, so we add: $@v + @a + @b = @r$."),
    _Move("counting", 2, 3, 90, lambda s, a, b, c: s * (s - 1) // 2,
          ("the number of ways to choose two of $@s$ books", "how many handshakes $@s$ people exchange",
           "$\\binom{n}{2}$ for $n = @s$"),
          "$\\binom{@v}{2} = @r$", "Order plays no role, so there are $\\frac{@v(@v - 1)}{2} = @r$."),
    _Move("counting", 2, 2, 60, lambda s, a, b, c: s * s * a,
          ("the number of codes of two letters out of $@s$ and a digit out of $@a$",
           "how many flags have two stripes in any of $@s$ colours and one of $@a$ emblems"),
          "$@v^2 \\cdot @a = @r$", "The places are independent: $@v \\cdot @v \\cdot @a = @r$."),
    _Move("counting", 3, 3, 16, lambda s, a, b, c: s**3 - (s - 1) ** 3,
          ("the number of words of three letters over an alphabet of $@s$ that have at least one A",
           "how many throws of three dice with $@s$ faces show a one somewhere"),
          "$@v^3 - (@v - 1)^3 = @r$",
          "It is easier to count the opposite: $(@v - 1)^3$ have none, which leaves $@v^3 - (@v - 1)^3 = @r$."),
    _Move("counting", 3, 3, 60, lambda s, a, b, c: (s + a) * (s + a - 1) // 2 - a * (a - 1) // 2,
          ("the number of handshakes among $@s$ guests and $@a$ hosts if no two hosts shake hands",
           "how many games $@s$ players and $@a$ referees play if everybody meets once, but referees never each other"),
          "$\\binom{@v + @a}{2} - \\binom{@a}{2} = @r$",
          "All pairs without the forbidden ones: $\\binom{@v + @a}{2} - \\binom{@a}{2} = @r$."),
    _Move("geometry", 1, 1, 400, lambda s, a, b, c: 2 * (s + a),
          ("the perimeter of a rectangle with sides $@s$ and $@a$",
          "the length of a fence round a field of $@s$ by $@a$"),
          "$2(@v + @a) = @r$", "Opposite sides are equal, hence $2(@v + @a) = @r$."),
    _Move("geometry", 1, 1, 400, lambda s, a, b, c: s * a,
          ("the area of a parallelogram with base $@s$ and height $@a$", "the area of a rectangle of $@s$ by $@a$"),
          "$@v \\cdot @a = @r$", "Base times height is $@v \\cdot @a = @r$."),
    _Move("geometry", 2, 1, 300, lambda s, a, b, c: 5 * s + a,
          ("the hypotenuse of a right triangle with legs $3 \\cdot @s$ and $4 \\cdot @s$, lengthened by $@a$",
           "$@a$ plus the diagonal of a rectangle with sides $3 \\cdot @s$ and $4 \\cdot @s$"),
          "$\\sqrt{9 + 16} \\cdot @v + @a = @r$", "Pythagoras gives $5 \\cdot @v$, and with $@a$ more it is $@r$."),
    _Move("geometry", 2, 4, 90, lambda s, a, b, c: s * (s - 3) // 2,
          ("the number of diagonals of a convex polygon with $@s$ sides",
          "how many diagonals a regular $n$-gon has, $n = @s$"),
          "$\\frac{@v(@v - 3)}{2} = @r$", "Each vertex sends out $@v - 3$, each counted twice: $@r$."),
    _Move("geometry", 3, 1, 18, lambda s, a, b, c: 12 * s * s,
          ("the area of a rectangle with diagonal $5 \\cdot @s$ and one side $3 \\cdot @s$",
           "twice the area of a right triangle with hypotenuse $5 \\cdot @s$ and a leg $3 \\cdot @s$"),
          "$3 \\cdot @v \\cdot 4 \\cdot @v = @r$",
          "The missing side is $\\sqrt{25 - 9} \\cdot @v = 4 \\cdot @v$, so the product is $12 \\cdot @v^2 = @r$."),
    _Move("geometry", 3, 1, 60, lambda s, a, b, c: (s + 2 * a) ** 2 - s * s,
          ("the area of a path of width $@a$ round a square garden of side $@s$",
           "the area between two squares with the same centre, the inner of side $@s$, at distance $@a$"),
          "$(@v + 2 \\cdot @a)^2 - @v^2 = @r$",
          "The outer square has side $@v + 2 \\cdot @a$, since the strip lies on both sides; the difference is $@r$."),
    _Move("number theory", 1, 9, 900, lambda s, a, b, c: s % a + b,
          ("$@b$ more than the remainder of $@s$ on division by $@a$", "$(@s \\bmod @a) + @b$"),
          "$@v \\bmod @a + @b = @r$", "Dividing $@v$ by $@a$ and adding $@b$ to the remainder we get $@r$."),
    _Move("number theory", 1, 4, 900, lambda s, a, b, c: math.gcd(s, a * b),
          ("the greatest common divisor of $@s$ and $@a \\cdot @b$", "$\\gcd(@s, @a \\cdot @b)$"),
          "$\\gcd(@v, @a \\cdot @b) = @r$", "The common divisors of both are those of $@r$."),
    _Move("number theory", 2, 4, 900, lambda s, a, b, c: _divisors(s) + a,
          ("the number of positive divisors of $@s$, plus $@a$", "$\\tau(@s) + @a$, where $\\tau$ counts divisors"),
          "$\\tau(@v) + @a = @r$",
          "From the prime factorisation of $@v$ we read off the divisors; with $@a$ it makes $@r$."),
    _Move("number theory", 2, 2, 200, lambda s, a, b, c: math.lcm(s, a) + b,
          ("the least common multiple of $@s$ and $@a$, plus $@b$", "$\\mathrm{lcm}(@s, @a) + @b$"),
          "$\\frac{@v \\cdot @a}{\\gcd(@v, @a)} + @b = @r$", "We divide the product by the gcd and add $@b$: $@r$."),
    _Move("number theory", 3, 3, 900, lambda s, a, b, c: _powers(a, s, b * c + 1) + a,
          ("$@a$ more than the remainder when $@a^{@s}$ is divided by $@b \\cdot @c + 1$",
           "$@a + (@a^{@s} \\bmod m)$ with $m = @b \\cdot @c + 1$"),
          "$@a^{@v} + @a \\to @r$",
          "The powers of $@a$ repeat with a period, so only $@v$ modulo that period counts; in all we have $@r$."),
    _Move("number theory", 3, 3, 900,
          lambda s, a, b, c: next(n for n in range(1, 64) if n % 7 == s % 7 and n % 9 == a % 9),
          ("the smallest positive integer congruent to $@s$ modulo $7$ and to $@a$ modulo $9$",
           "the least $n > 0$ for which $7 \\mid n - @s$ and $9 \\mid n - @a$"),
          "$n \\equiv @v \\pmod 7$, $n \\equiv @a \\pmod 9$, so $n = @r$",
          "We run through the numbers $@a, @a + 9, \\dots$ until one fits $@v$ modulo $7$; the first is $@r$."),
    _Move("sequences", 1, 1, 600, lambda s, a, b, c: s + (a - 1) * b,
          ("term number $@a$ of the arithmetic sequence $@s, @s + @b, \\dots$",
           "$a_{@a}$ if $a_1 = @s$ and the common difference is $@b$"),
          "$@v + (@a - 1) \\cdot @b = @r$", "Each of $@a - 1$ steps adds $@b$, which leads to $@r$."),
    _Move("sequences", 1, 1, 400, lambda s, a, b, c: s * a,
          ("the term that follows $@s$ in a geometric sequence of ratio $@a$",
          "$a_2$ for $a_n = @s \\cdot @a^{n - 1}$"),
          "$@v \\cdot @a = @r$", "One multiplication by the ratio gives $@r$."),
    _Move("sequences", 2, 2, 90, lambda s, a, b, c: s * (s + 1) // 2,
          ("the sum of the first $@s$ positive integers", "$1 + 2 + \\dots + n$ for $n = @s$",
          "the $n$th triangular number, $n = @s$"),
          "$\\frac{@v(@v + 1)}{2} = @r$", "Pairing first and last terms we obtain $\\frac{@v(@v + 1)}{2} = @r$."),
    _Move("sequences", 2, 1, 100, lambda s, a, b, c: _iterate(s, a, b, 2),
          ("$a_3$ if $a_1 = @s$ and $a_{n+1} = @{a}a_n - @b$",
          "the third term of $a_{n+1} = @{a}a_n - @b$ with $a_1 = @s$"),
          "$@a(@a \\cdot @v - @b) - @b = @r$", "The second term is $@a \\cdot @v - @b$ and the third $@r$."),
    _Move("sequences", 3, 1, 600, lambda s, a, b, c: s + (a * a + a) // 2 * b,
          ("the number in place $@a + 1$ of a sequence that begins with $@s$ and whose differences are $@b, 2 "
          "\\cdot @b, \\dots$",
           "$a_{@a}$ if $a_0 = @s$ and $a_n = a_{n-1} + @{b}n$"),
          "$@v + @b \\cdot \\frac{@a(@a + 1)}{2} = @r$",
          "The differences telescope, and their sum is $@b(1 + \\dots + @a)$. We arrive at $@r$."),
    _Move("sequences", 3, 2, 600,
          lambda s, a, b, c: (s - 1) // a + (s - 1) // b - (s - 1) // math.lcm(a, b) if a != b else None,
          ("how many positive integers below $@s$ are multiples of $@a$ or $@b$",
           "the number of terms below $@s$ that occur in $@a, 2 \\cdot @a, \\dots$ or in $@b, 2 \\cdot @b, \\dots$"),
          "inclusion and exclusion below $@v$: $@r$",
          "We add both counts and take away what was counted twice, the multiples of the lcm of $@a$ and $@b$: $@r$."),
    _Move("probability", 1, 1, 300, lambda s, a, b, c: s + a,
          ("the number of balls in a bag with $@s$ red and $@a$ blue ones",
          "how many tickets there are if $@s$ lose and $@a$ win"),
          "$@v + @a = @r$", "There are $@v + @a = @r$ equally likely cases."),
    _Move("probability", 1, 1, 300, lambda s, a, b, c: s * a,
          ("how often we expect a prize in $@s \\cdot @a \\cdot @b$ draws of chance $\\frac{1}{@b}$",
           "the mean of $@s$ turns that bring $@a$ points each"),
          "$@v \\cdot @a = @r$", "By linearity the expectation is $@v \\cdot @a = @r$."),
    _Move("probability", 2, 2, 300, lambda s, a, b, c: _reduced(a, s + a),
          ("$m + n$ if $\\frac{m}{n}$, in lowest terms, is the chance to draw red from $@s$ blue and $@a$ red balls",
           "the sum of numerator and denominator of the reduced probability of a win, if $@a$ win and $@s$ lose"),
          "$\\frac{@a}{@v + @a}$, reduced; sum $@r$",
          "Of $@v + @a$ cases $@a$ are good; after reduction the sum is $@r$."),
    _Move("probability", 2, 2, 60, lambda s, a, b, c: s * s - s,
          ("how many of the outcomes of two spins of a wheel with $@s$ fields show different fields",
           "the number of ordered draws of two of $@s$ cards without replacement"),
          "$@v(@v - 1) = @r$", "The second spin must avoid the first: $@v(@v - 1) = @r$."),
    _Move("probability", 3, 3, 60, lambda s, a, b, c: _reduced(2 * s - 1, s * s),
          ("$m + n$ if $\\frac{m}{n}$ is the reduced chance that at least one of two spins of $@s$ fields shows the "
          "first field",
           "the sum of numerator and denominator of $1 - (1 - \\frac{1}{n})^2$ in lowest terms, for $n = @s$"),
          "$1 - \\left(\\frac{@v - 1}{@v}\\right)^2 \\to @r$",
          "We take the complement, that both miss, and reduce $\\frac{2 \\cdot @v - 1}{@v^2}$; the sum is $@r$."),
    _Move("probability", 3, 2, 200, lambda s, a, b, c: _reduced(s, s + a * b),
          ("$m + n$ if $\\frac{m}{n}$ is the reduced chance that a faulty lamp is of the first of two makers, with "
          "$@s$ and "
           "$@a \\cdot @b$ faulty lamps",
           "the reduced numerator plus denominator of Bayes' posterior with weights $@s$ and $@a \\cdot @b$"),
          "$\\frac{@v}{@v + @a \\cdot @b} \\to @r$",
          "By Bayes the posterior is the weight over the sum of weights, $\\frac{@v}{@v + @a \\cdot @b}$, so we get "
          "$@r$."),
)  # fmt: skip
DOMAINS = tuple(dict.fromkeys(move.domain for move in _MOVES))

_LETTERS = ("k", "m", "N", "p", "q", "u", "w", "A", "B", "K", "T", "\\alpha", "\\lambda", "\\mu")
_FIRST = (
    "Let $@n$ be @w.",
    "Denote by $@n$ @w.",
    "We write $@n$ for @w.",
    "Suppose that $@n$ is @w.",
    "Define $@n$ as @w.",
)
_LAST = ("Find @w.", "What is @w?", "Determine @w.", "Compute @w.", "Give @w as an integer.")
_TURNED = ("Find @w, where $@n$ is @u.", "What is @w, if $@n$ denotes @u?", "Determine @w; here $@n$ is @u.")
_IDLE = (
    "All letters denote integers unless we say otherwise.", "No calculator is needed.", "A diagram is not given.",
    "This question is number @a of a collection from the year 19@a@b.", "As usual, $\\mathbb{N}$ has no zero.",
    "The class of @a@b pupils had @b minutes for it.",
    "Fractions such as $\\frac{@a}{@b}$ are written in lowest terms.",
    "Recall that $\\sqrt{x}$ is never negative.", "Lena found it in a notebook of her grandfather.",
    "The figures $@a$, $@b$ and $@c$ on the margin have nothing to do with it.", "Round nothing.", "Show your work.",
)  # fmt: skip
_BEGIN = ("", "", "Solution. ", "We proceed directly. ", "Let us see. ", "We go through it in order. ")
_NEXT = ("", "Then ", "Next: ", "Now ", "From this, ", "Thus ")
_REMARKS = (
    "This is worth a second look, but it is right.", "Nothing else enters here.", "The rest is routine.",
    "A picture may help, though we do without.", "The letters stand for what the statement says.",
    "One may also verify this by hand.", "We keep the number for later.", "That settles this part.",
    "The remark on the margin is of no use to us.", "There are other ways; this one is quick.",
)  # fmt: skip
_END = (
    "The answer is $\\boxed{@r}$.",
    "$\\boxed{@r}$",
    "Hence we have $\\boxed{@r}$.",
    "So the result is $\\boxed{@r}$.",
)


@dataclass(frozen=True)
class _Done:
    move: _Move
    words: dict[str, int | str]


def make_maths(count: int, seed: int) -> list[Problem]:
    """Return `count` distinct problems in random order, balanced over domains (`family`) and levels (`label`)."""
    chance = random.Random(f"maths {seed}")
    found: dict[str, Problem] = {}
    number = 0
    while len(found) < count:
        domain, level = DOMAINS[number % len(DOMAINS)], 1 + number // len(DOMAINS) % LEVELS
        chain = _chain(chance, domain, level)
        if chain is None or (prompt := _prompt(chance, chain)) in found:
            continue
        found[prompt] = Problem(prompt, _solution(chance, chain), float(level), domain)
        number += 1
    problems = list(found.values())
    chance.shuffle(problems)
    return problems


def _chain(chance: random.Random, domain: str, level: int) -> list[_Done] | None:
    """Return moves whose costs add up to `level`; None if a draw leads to a number that no move takes."""
    value = chance.randint(2, chance.choice([9, 30, 200]))
    names, name, chain = chance.sample(_LETTERS, LEVELS), str(value), []
    while level:
        cost = chance.randint(1, min(3, level))
        fits = [m for m in _MOVES if m.domain == domain and m.cost == cost and m.lowest <= value <= m.highest]
        if not fits:
            return None
        move, (a, b, c) = chance.choice(fits), chance.sample(range(2, 10), 3)
        result = move.result(value, a, b, c)
        if result is None or not 0 < result <= _MOST:
            return None
        new = names.pop()
        chain.append(_Done(move, {"a": a, "b": b, "c": c, "s": name, "v": value, "r": result, "n": new}))
        value, name, level = result, new, level - cost
    return chain


def _prompt(chance: random.Random, chain: Sequence[_Done]) -> str:
    wanted = [Wording(chance.choice(one.move.asked)).substitute(one.words) for one in chain]
    names = [one.words["n"] for one in chain]
    if len(chain) > 1 and chance.random() < 0.5:
        turned = Wording(chance.choice(_TURNED)).substitute(w=wanted.pop(), u=wanted[-1], n=names[-2])
        sentences, wanted = [turned], wanted[:-1]
    else:
        sentences = [Wording(chance.choice(_LAST)).substitute(w=wanted.pop())]
    first = [Wording(chance.choice(_FIRST)).substitute(n=n, w=w) for n, w in zip(names, wanted, strict=False)]
    sentences = first + sentences
    return " ".join(_padded(chance, sentences, _IDLE, 0))


def _solution(chance: random.Random, chain: Sequence[_Done]) -> str:
    style = chance.choice(["answer", "short", "long", "mixed"])
    end = Wording(chance.choice(_END)).substitute(r=chain[-1].words["r"])
    if style == "answer":
        return end
    lines = []
    for one in chain:
        short = style == "short" or (style == "mixed" and chance.random() < 0.5)
        text = Wording(one.move.short if short else one.move.long).substitute(one.words)
        lines.append(chance.choice(_NEXT) + text + ("." if short else "") if style != "short" else text)
    if style != "short":
        lines = _padded(chance, lines, _REMARKS, 1)
    return chance.choice(_BEGIN) + chance.choice([" ", "\n", "\n\n"]).join([*lines, end])


def _padded(chance: random.Random, sentences: Sequence[str], idle: Sequence[str], first: int) -> list[str]:
    length = chance.choice([0, 120, 200, 300, 400, 500])
    a, b, c = chance.sample(range(2, 10), 3)
    return padded(chance, sentences, [Wording(one).substitute(a=a, b=b, c=c) for one in idle], length, first)


def padded(
    chance: random.Random, sentences: Sequence[str], idle: Sequence[str], length: int, first: int = 0
) -> list[str]:
    """Insert idle sentences, from place `first` on, until the text has `length` characters."""
    found = list(sentences)
    for one in chance.sample(idle, len(idle)):
        if sum(map(len, found)) >= length:
            break
        found.insert(chance.randint(first, len(found)), one)
    return found
