"""Generate problems whose difficulty is known: it is the number of steps to the answer.

There are four families: a story about an amount, an expression, ages that depend on each other, and a program to trace.
Each problem has one to eight steps. The size of the numbers, the irrelevant sentences and the style of the response are
drawn independently of the number of steps, so problems of equal length differ in difficulty. `read_problems` reads
problems from a file instead.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import DataError
from data.filter.input.records import Record

MAX_STEPS = 8
_LARGEST = {"small": 12, "medium": 90, "large": 900}
_SIGNS = {"+": "plus", "-": "minus", "*": "times", "//": "divided by"}
_NAMES = [
    "Ada",
    "Ben",
    "Chloe",
    "Dmitri",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kavya",
    "Liam",
    "Maya",
    "Noor",
    "Oscar",
    "Priya",
]
_THINGS = ["apples", "stamps", "marbles", "books", "coins", "tickets", "eggs", "shells", "pencils", "tiles"]
_PLACES = ["at the market", "in the school hall", "at the harbour", "in the workshop", "at the fair", "in the library"]
_ASIDES = (
    "The weather is {weather} that day.",
    "{friend}, who is {n} years old, is watching.",
    "The shop next door closes at {hour} o'clock.",
    "There are {n} chairs in the room, which nobody needs.",
    "Last year {friend} did the same and was done in {n} minutes.",
    "The bus home takes {n} minutes.",
    "A sign on the wall says that the place was built in 19{two}.",
    "{friend} likes the colour {colour} best.",
)
_EVENTS = {
    "+": ("{who} gets {n} more {things}", "{friend} brings {who} {n} {things}", "{who} finds another {n} {things}"),
    "-": ("{who} gives {n} of them to {friend}", "{n} {things} are lost", "{who} sells {n} {things}"),
    "*": ("the number of {things} grows to {n} times what it was", "{who} ends up with {n} times as many {things}"),
    "//": (
        "{who} shares the {things} equally among {n} people and goes on with one share",
        "the {things} are put into {n} equal boxes and {who} keeps one box",
    ),
}
_AGES = {
    "+": "{a} is {n} years older than {b}",
    "-": "{a} is {n} years younger than {b}",
    "*": "{a} is {n} times as old as {b}",
    "//": "{b} is {n} times as old as {a}",
}
_OPENINGS = ("", "", "Let's work it out.\n", "We take it one step at a time.\n", "Here is how to find it.\n")
_WORKED = (
    "{a} {sign} {n} is {b}.",
    "Now {a} {word} {n} makes {b}.",
    "Next, {a} {sign} {n} = {b}.",
    "So we have {a} {word} {n}, which gives {b}.",
)
_REMARKS = (
    "We keep that number for the next line.",
    "This is what we go on with.",
    "The rest of the text does not change this.",
    "It is worth checking this once more before going on.",
)
_CLOSINGS = (
    "{n}",
    "The answer is {n}.",
    "Answer: {n}",
    "So the result is {n}.",
    "Therefore we end up with {n} in total.",
)
_CHECKS = (
    "",
    "",
    "\nGoing through the lines again, nothing was left out and nothing was counted twice.",
    "\nThe other numbers in the question play no part, so we do not use them here.",
)


@dataclass(frozen=True)
class Problem:
    """`label`: difficulty, higher is harder; the number of steps of a generated problem. `family`: kind of problem."""

    prompt: str
    response: str
    label: float
    family: str = "given"

    def record(self, number: int) -> Record:
        """Return the filter's record; `number` is the index in the set."""
        text = f"{self.prompt}\n{self.response}"
        return Record(str(number), self.family, f"problems:{number}", text, answer_start=len(self.prompt) + 1)


@dataclass(frozen=True)
class _Step:
    before: int
    sign: str
    operand: int
    after: int


def make_problems(count: int, seed: int) -> list[Problem]:
    """Return `count` distinct problems in random order, balanced over families and numbers of steps."""
    chance = random.Random(f"problems {seed}")
    families: Sequence[Callable[[random.Random, int], tuple[str, list[_Step]]]] = (_story, _expression, _ages, _program)
    found: dict[str, Problem] = {}
    number = 0
    while len(found) < count:
        family, steps = families[number % len(families)], 1 + number // len(families) % MAX_STEPS
        prompt, chain = family(chance, steps)
        assert len(chain) == steps
        if prompt not in found:
            found[prompt] = Problem(prompt, _response(chance, chain), float(steps), family.__name__.lstrip("_"))
            number += 1
    problems = list(found.values())
    chance.shuffle(problems)
    return problems


def read_problems(path: Path) -> list[Problem]:
    """Read JSON lines with `prompt`, `response`, a number `label` (higher is harder) and optionally `domain`. Raises
    `DataError` with the number of a malformed line.
    """
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = float(row["label"])
            problems.append(Problem(str(row["prompt"]), str(row["response"]), label, str(row.get("domain", "given"))))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"needs prompt, response and a number as label ({type(error).__name__}: {error})"
            raise DataError(f"{path}:{number} {reason}") from None
    if not problems:
        raise DataError(f"{path} holds no problems")
    return problems


def records(problems: Iterable[Problem]) -> list[Record]:
    return [problem.record(number) for number, problem in enumerate(problems)]


def _chain(chance: random.Random, count: int, multiply: bool = True) -> list[_Step]:
    """Return a chain of `count` operations. Each result is at least one, and divisions leave no remainder."""
    largest = _LARGEST[chance.choice(list(_LARGEST))]
    value, steps = chance.randint(2, largest), []
    for _ in range(count):
        signs = ["+", "+"]
        if value > 2:
            signs += ["-", "-"]
        if multiply and value * 2 <= 10 * largest:
            signs.append("*")
        divisors = [n for n in range(2, 10) if value % n == 0 and value > n]
        if multiply and divisors:
            signs.append("//")
        sign = chance.choice(signs)
        if sign == "+":
            operand, after = (n := chance.randint(1, largest)), value + n
        elif sign == "-":
            operand, after = (n := chance.randint(1, min(largest, value - 1))), value - n
        elif sign == "*":
            operand, after = (n := chance.randint(2, max(2, min(6, 10 * largest // value)))), value * n
        else:
            operand, after = (n := chance.choice(divisors)), value // n
        steps.append(_Step(value, sign, operand, after))
        value = after
    return steps


def _asides(chance: random.Random, friend: str) -> list[str]:
    """Return zero to five irrelevant sentences."""
    return [
        aside.format(
            friend=friend,
            n=chance.randint(2, 60),
            hour=chance.randint(1, 12),
            two=chance.randint(10, 99),
            weather=chance.choice(["fine", "cold", "rainy", "windy"]),
            colour=chance.choice(["green", "blue", "red", "yellow"]),
        )
        for aside in chance.sample(_ASIDES, chance.choice([0, 0, 1, 2, 3, 5]))
    ]


def _scatter(chance: random.Random, sentences: list[str], asides: list[str]) -> str:
    """Join the sentences in order, with the asides inserted at random places."""
    for aside in asides:
        sentences.insert(chance.randint(1, len(sentences)), aside)
    return " ".join(sentences)


def _story(chance: random.Random, count: int) -> tuple[str, list[_Step]]:
    chain = _chain(chance, count)
    who, friend = chance.sample(_NAMES, 2)
    things, place = chance.choice(_THINGS), chance.choice(_PLACES)
    sentences = [f"{who} has {chain[0].before} {things} {place}."]
    for step in chain:
        event = chance.choice(_EVENTS[step.sign]).format(who=who, friend=friend, things=things, n=step.operand)
        opening = chance.choice(["Then ", "After that, ", "Later ", "", "The next day "]) + event
        sentences.append(f"{opening[0].upper()}{opening[1:]}.")
    body = _scatter(chance, sentences, _asides(chance, friend))
    return f"{body} How many {things} does {who} have in the end?", chain


def _expression(chance: random.Random, count: int) -> tuple[str, list[_Step]]:
    """Return an expression to compute, with brackets that apply each operation to the result before it."""
    chain = _chain(chance, count)
    text = str(chain[0].before)
    for number, step in enumerate(chain):
        text = f"{f'({text})' if number else text} {step.sign.replace('//', '/')} {step.operand}"
    request = chance.choice(["Compute {}.", "What is {}?", "Work out the value of {}.", "Evaluate {} and explain."])
    body = _scatter(chance, [request.format(text)], _asides(chance, chance.choice(_NAMES)))
    return body, chain


def _ages(chance: random.Random, count: int) -> tuple[str, list[_Step]]:
    """Return a chain of relative ages. The sentences are shuffled, so the one age given as a number may come last."""
    chain = _chain(chance, count)
    people = chance.sample(_NAMES, count + 2)
    sentences = [f"{people[0]} is {chain[0].before} years old."]
    for number, step in enumerate(chain):
        sentences.append(_AGES[step.sign].format(a=people[number + 1], b=people[number], n=step.operand) + ".")
    chance.shuffle(sentences)
    body = _scatter(chance, sentences, _asides(chance, people[-1]))
    return f"In a tale the ages are not always human. {body} How old is {people[count]}?", chain


def _program(chance: random.Random, count: int) -> tuple[str, list[_Step]]:
    """Return a program with or without a loop. A step is an executed operation that affects the answer."""
    name = chance.choice(["x", "total", "count", "value", "n", "result"])
    if chance.random() < 0.3:
        chain, lines = _loop(chance, count, name)
    else:
        chain = _chain(chance, count)
        lines = [f"{name} = {chain[0].before}"]
        short = chance.random() < 0.5
        for step in chain:
            left = f"{name} {step.sign}= " if short else f"{name} = {name} {step.sign} "
            lines.append(left + str(step.operand))
    for number in range(chance.choice([0, 0, 1, 2, 4])):
        unused = f"{chance.choice(['width', 'limit', 'spare', 'offset'])}_{number} = {chance.randint(1, 500)}"
        comment = chance.choice(["# not used below", "# settings of an older version", "# see the notes"])
        place = chance.randint(0, 1)
        lines.insert(place, f"{unused}  {comment}" if chance.random() < 0.5 else unused)
    program = "\n".join([*lines, f"print({name})"])
    question = chance.choice(["What does this program print?", "Trace this code. What is its output?"])
    return f"{question}\n\n{program}\n", chain


def _loop(chance: random.Random, count: int, name: str) -> tuple[list[_Step], list[str]]:
    """Return a loop that adds a constant or the loop variable `count` times."""
    start = chance.randint(1, _LARGEST[chance.choice(list(_LARGEST))])
    constant = chance.randint(2, 20) if chance.random() < 0.5 else None
    value, chain = start, []
    for number in range(1, count + 1):
        operand = constant or number
        chain.append(_Step(value, "+", operand, value + operand))
        value += operand
    head = f"for i in range(1, {count + 1}):"
    return chain, [f"{name} = {start}", head, f"    {name} += {constant or 'i'}"]


def _response(chance: random.Random, chain: list[_Step]) -> str:
    """Return a response in a random style: only the answer, equations, or sentences with or without remarks."""
    style = chance.choice(["answer", "equations", "sentences", "remarks"])
    closing = chance.choice(_CLOSINGS).format(n=chain[-1].after)
    if style == "answer":
        return closing
    lines = []
    for step in chain:
        sign = step.sign.replace("//", "/")
        if style == "equations":
            lines.append(f"{step.before} {sign} {step.operand} = {step.after}")
            continue
        sentence = chance.choice(_WORKED)
        words = {"a": step.before, "n": step.operand, "b": step.after, "sign": sign, "word": _SIGNS[step.sign]}
        lines.append(sentence.format(**words))
        if style == "remarks" and chance.random() < 0.7:
            lines.append(chance.choice(_REMARKS))
    body = ("\n" if style == "equations" else chance.choice(["\n", " "])).join(lines)
    opening = chance.choice(_OPENINGS) if style != "equations" else ""
    return f"{opening}{body}\n{closing}{chance.choice(_CHECKS) if style == 'remarks' else ''}"
