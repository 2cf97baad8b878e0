"""Make short problems with a counted number of steps, and check answers.

A problem has a start and `MAX_STEPS` operations; the answer lists the state after each of them. A step is an operation
that changes the state. The other operations are idle, and both kinds are mixed at random, so all problems of a family
are equally long and length tells nothing about difficulty. States are few: digits modulo `MODULUS` or one letter of
`LETTERS`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from bench.data.problems import MAX_STEPS, Problem

MODULUS, LETTERS = 7, "abcd"
EASY_STEPS = 2
"""A problem with at most this many steps is easy."""
FAMILIES = ("sum", "program", "rewriting")
DIFFICULTIES = ((1, 2), (3, 4), (5, 6), (7, 8))
"""Steps of each group of problems in the tables."""


def draw_problem(chance: random.Random, family: str, steps: int) -> Problem:
    """Return a problem of a family. Its label is `steps`, the number of its operations that are not idle.

    `sum`: `3 +4 +0 ...`; adding 0 or `MODULUS` is idle. `program`: additions to the variables x and y, of which x is
    asked for. `rewriting`: rule `ab` replaces the letter a by b, and is idle if the letter is another.
    """
    counted = [True] * steps + [False] * (MAX_STEPS - steps)
    chance.shuffle(counted)
    state = chance.choice(LETTERS) if family == "rewriting" else str(chance.randrange(MODULUS))
    words = [f"x{state}" if family == "program" else state]
    for counts in counted:
        if family == "rewriting":
            old = state if counts else chance.choice([one for one in LETTERS if one != state])
            words.append(old + chance.choice([one for one in LETTERS if one != old]))
        elif family == "program":
            words.append(f"{'x' if counts else 'y'}{chance.randrange(1, MODULUS)}")
        else:
            words.append(f"+{chance.choice([one for one in range(10) if bool(one % MODULUS) is counts])}")
        state = _after(family, state, words[-1])
    prompt = " ".join(words)
    return Problem(prompt, solve(family, prompt), float(steps), family)


def states_of(family: str, prompt: str) -> list[str]:
    """Return the start and the state after each operation, from the text of a problem alone."""
    first, *operations = prompt.split()
    states = [first[-1]]
    for operation in operations:
        states.append(_after(family, states[-1], operation))
    return states


def solve(family: str, prompt: str) -> str:
    """Return the right answer: the states after each operation. An answer is right if it equals this."""
    return " ".join(f"={state}" for state in states_of(family, prompt)[1:])


def count_steps(family: str, prompt: str) -> int:
    """Return the number of operations that change the state."""
    states = states_of(family, prompt)
    return sum(one != other for one, other in pairwise(states))


def _after(family: str, state: str, operation: str) -> str:
    kind, operand = operation[0], operation[1]
    if family == "rewriting":
        return operand if kind == state else state
    return state if kind == "y" else str((int(state) + int(operand)) % MODULUS)


def draw_steps(chance: random.Random, easy: float) -> int:
    """Return a number of steps from a mix: easy with probability `easy`, and uniform among easy and among others."""
    return chance.randint(1, EASY_STEPS) if chance.random() < easy else chance.randint(EASY_STEPS + 1, MAX_STEPS)


def draw_mix(chance: random.Random, count: int, easy: float, without: Sequence[Problem] = ()) -> list[Problem]:
    """Return `count` distinct problems of a mix, none of them in `without`; families take turns."""
    seen, found = {one.prompt for one in without}, list[Problem]()
    while len(found) < count:
        problem = draw_problem(chance, FAMILIES[len(found) % len(FAMILIES)], draw_steps(chance, easy))
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            found.append(problem)
    return found


def draw_exam(chance: random.Random, each: int) -> list[Problem]:
    """Return distinct held-out problems: `each` for every family and number of steps."""
    found: dict[str, Problem] = {}
    for family in FAMILIES:
        for steps in range(1, MAX_STEPS + 1):
            wanted = len(found) + each
            while len(found) < wanted:
                problem = draw_problem(chance, family, steps)
                found.setdefault(problem.prompt, problem)
    return list(found.values())
