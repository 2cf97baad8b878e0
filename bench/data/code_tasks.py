"""Generate programming tasks with a reference solution, in three topics and three grades.

The label is the grade, the highest structure that the solution needs: 1, a composition of operations on the input; 2,
nested control flow (a loop in a loop, or a loop whose branches change a state); 3, a data structure that is built while
the input is read (a stack, a queue, a dictionary, a heap, a table of subproblems, a disjoint set).

Drawn independently of the grade: names, the story around the task, and the lengths to which sentences, comments,
checks of the input and remarks fill up the prompt and the solution. Grade 1 has up to eight operations, so its
solutions are not shorter by nature.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

from bench.data.maths import Wording, padded
from bench.data.problems import Problem

GRADES = 3
_WRITTEN = Path(__file__).with_name("code_tasks.toml")
"""Tasks of grades 2 and 3: in Wording, what is asked and the body of the solution."""
_OPERATIONS = {
    "numbers": (
        ("keep only the even @t", "@x = [n for n in @x if n % 2 == 0]"),
        ("drop every one below @a", "@x = [n for n in @x if n >= @a]"),
        ("add @a to each", "@x = [n + @a for n in @x]"),
        ("multiply each by @b", "@x = [n * @b for n in @x]"),
        ("sort the @t from small to large", "@x = sorted(@x)"),
        ("put the @t in reverse order", "@x = @x[::-1]"),
        ("leave out the first @a", "@x = @x[@a:]"),
        ("take every second one", "@x = @x[::2]"),
        ("replace each by its square", "@x = [n * n for n in @x]"),
        ("append the sum of all", "@x = [*@x, sum(@x)]"),
        ("take each modulo @b", "@x = [n % @b for n in @x]"),
        ("subtract the smallest from each", "@x = [n - min(@x) for n in @x]"),
    ),
    "text": (
        ("turn all letters into capitals", "@x = @x.upper()"),
        ("remove blanks at both ends", "@x = @x.strip()"),
        ("replace every 'a' by 'o'", '@x = @x.replace("a", "o")'),
        ("reverse the order of the characters", "@x = @x[::-1]"),
        ("keep only the first @b characters", "@x = @x[:@b]"),
        ("drop all digits", '@x = "".join(c for c in @x if not c.isdigit())'),
        ("put a dash between the words", '@x = "-".join(@x.split())'),
        ("write it @a times in a row", "@x = @x * @a"),
        ("sort its characters", '@x = "".join(sorted(@x))'),
        ("capitalise each word", "@x = @x.title()"),
        ("pad it with dots to a width of @b", '@x = @x.ljust(@b, ".")'),
    ),
    "tables": (
        ("drop the first row", "@x = @x[1:]"),
        ("keep rows whose first entry is above @a", "@x = [row for row in @x if row and row[0] > @a]"),
        ("turn each row around", "@x = [row[::-1] for row in @x]"),
        ("exchange rows and columns", "@x = [list(row) for row in zip(*@x)]"),
        ("add @a to each entry", "@x = [[n + @a for n in row] for row in @x]"),
        ("sort the rows by their sums", "@x = sorted(@x, key=sum)"),
        ("append to each row its sum", "@x = [[*row, sum(row)] for row in @x]"),
        ("leave out the last column", "@x = [row[:-1] for row in @x]"),
        ("keep at most @b rows", "@x = @x[:@b]"),
        ("reverse the order of the rows", "@x = @x[::-1]"),
    ),
}
_JOINTS = (", then ", ", after that ", "; next, ", ", and ", "; then ")
TOPICS = tuple(_OPERATIONS)

_INPUTS = {
    "numbers": ("a list `@x` of @t", "`@x`, a list of @t (integers)", "the @t in the list `@x`"),
    "text": ("a string `@x`", "`@x`, a text", "one line of text, `@x`"),
    "tables": ("a table `@x`, a list of rows of integers", "`@x`, a list of equally long lists of integers"),
}
_NAMES = (
    "values",
    "data",
    "items",
    "xs",
    "given",
    "entries",
    "source",
    "line",
    "raw",
    "a_in",
    "measured_values",
    "arg",
)
_THINGS = ("numbers", "readings", "scores", "prices", "lengths", "ages", "counts", "levels", "weights", "distances")
_VERBS = ("process", "solve", "compute", "evaluate", "handle", "work_out", "answer", "run", "transform", "result_of")
_ASKED = ("Write a function `@f` that takes @i. It should @w.", "Given @i, @w. Name the function `@f`.",
          "Implement `@f`, which gets @i. Your task: @w.", "We have @i. In a function `@f`, @w.")  # fmt: skip
_IDLE = (
    "It is part of a small tool for a @p.", "The input has at most @{a}000 elements.", "Use Python @b or later.",
    "Do not print anything.", "No packages from outside are needed.", "It will be called once per @p.",
    "A colleague in the @p asked for it on Monday.", "Names of helpers are up to you.", "You need not optimise it.",
    "There are @a tests, none of which you can see.", "The caller does not use the input again.",
    "Please keep it readable.",
    "An older version of it, in another language, was lost.", "The result goes into a report of the @p.",
)  # fmt: skip
_PLACES = (
    "library",
    "bakery",
    "weather station",
    "school",
    "harbour",
    "workshop",
    "cinema",
    "hospital",
    "garden",
    "bank",
)
_COMMENTS = (
    "# as the task says", "# nothing else to do here", "# see above", "# this line does the work", "# keep the order",
    "# the usual case", "# works for empty input, too", "# ok", "# names are short on purpose", "# TODO: a better name",
    "# (checked by hand)", "# no surprise here",
)  # fmt: skip
_CHECKS = (
    "if @x is None:\n    raise ValueError('@x is missing')",
    "assert hasattr(@x, '__len__'), '@x has no length'",
    "size_at_start = len(@x)  # for the log",
    "label = '@f'  # for the log",
)
_AFTER = (
    "This follows the task word by word.", "The function returns its result and changes nothing outside.",
    "Names are short, but the task explains them.", "It was tried on a few inputs by hand.",
    "I did not add a main program.",
    "One could write it in other ways as well.", "The comments repeat what the code says.", "Hope this helps!",
)  # fmt: skip
_SLOTS = {"x": _NAMES, "t": _THINGS, "f": _VERBS, "p": _PLACES}
_LENGTHS = (0, 150, 250, 350, 500, 700)


def make_tasks(count: int, seed: int) -> list[Problem]:
    """Return `count` distinct tasks in random order, balanced over topics (`family`) and grades (`label`)."""
    chance = random.Random(f"code {seed}")
    written = tomllib.loads(_WRITTEN.read_text(encoding="utf-8"))
    found: dict[str, Problem] = {}
    number = 0
    while len(found) < count:
        topic, grade = TOPICS[number % len(TOPICS)], 1 + number // len(TOPICS) % GRADES
        if grade == 1:
            wanted, code = _composed(chance, topic)
        else:
            task = chance.choice(written[topic][str(grade)])
            wanted, code = task["wanted"], task["code"]
        words: dict[str, int | str] = {"a": chance.randint(2, 6), "b": chance.randint(7, 12)}
        words |= {key: chance.choice(many) for key, many in _SLOTS.items()}
        prompt = _prompt(chance, topic, wanted, words)
        if prompt not in found:
            found[prompt] = Problem(prompt, _answer(chance, code, words), float(grade), topic)
            number += 1
    tasks = list(found.values())
    chance.shuffle(tasks)
    return tasks


def _composed(chance: random.Random, topic: str) -> tuple[str, str]:
    """Return what a composition of one to eight operations does, and its code."""
    chosen = chance.sample(_OPERATIONS[topic], chance.choice([1, 2, 3, 4, 5, 6, 7, 8]))
    wanted = chosen[0][0] + "".join(chance.choice(_JOINTS) + what for what, _ in chosen[1:])
    return f"{wanted}, and return what you have", "\n".join([*(code for _, code in chosen), "return @x"])


def _prompt(chance: random.Random, topic: str, wanted: str, words: dict[str, int | str]) -> str:
    given = Wording(chance.choice(_INPUTS[topic])).substitute(words)
    task = Wording(wanted).substitute(words)
    sentences = [Wording(chance.choice(_ASKED)).substitute(words, i=given, w=task)]
    idle = [Wording(one).substitute(words) for one in _IDLE]
    return " ".join(padded(chance, sentences, idle, chance.choice(_LENGTHS)))


def _answer(chance: random.Random, code: str, words: dict[str, int | str]) -> str:
    """Return the code as a function, with comments, checks and remarks that say nothing of the grade."""
    body = Wording(code).substitute(words).split("\n")
    length = chance.choice(_LENGTHS)
    before = [Wording(one).substitute(words) for one in chance.sample(_CHECKS, chance.choice([0, 0, 1, 2, 4]))]
    for comment in chance.sample(_COMMENTS, len(_COMMENTS)):
        if sum(map(len, body)) >= length or chance.random() < 0.15:
            break
        line = chance.randrange(len(body))
        body[line] = f"{body[line]}  {comment}" if "#" not in body[line] else body[line]
    lines = "\n".join([*before, *body]).split("\n")
    text = "\n".join([f"def {words['f']}({words['x']}):", *(f"    {line}" for line in lines)])
    return "\n".join([f"```python\n{text}\n```", *padded(chance, [], _AFTER, chance.choice(_LENGTHS))])
