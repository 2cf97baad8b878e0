"""The examination of Python programs with unit tests: files in HumanEval's format, and a few problems of our own.

Source of the format: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (openai/human-eval).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from core.errors import ConfigError
from core.files import local_path, parse_json
from train.exam.base import Outcome, Question, Verdict
from train.exam.code import harness
from train.exam.code.proof import prove
from train.exam.code.sandbox import Limit, Limits, Sandbox, SandboxError, python_command
from train.exam.question_files import read_jsonl

PROGRAM_LIMITS = Limits()
OWN = Path(__file__).with_name("problems.jsonl")
_SHAPE = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
_STOPS = ("\nif __name__", "\nassert ", "\nprint(")
_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_STATEMENT = r"(?:async )?(?:def|class|if|elif|else|for|while|try|except|finally|with)\b.*[:([{]"
_TARGET = r"[A-Za-z_][\w.]*(?:\[[^]]*\])?(?:, *[A-Za-z_]\w*)*(?: *: *[\w.]+(?:\[.*?\])?)?"
_ASSIGNED = rf"{_TARGET} *(?:[-+@%&|^]|<<|>>|//?|\*\*?)?=[^=]"
_CODE = re.compile(rf"\s|$|[@#)\]}}]|import |from \S+ import |{_STATEMENT}|{_ASSIGNED}")
"""A line of a program, at its left margin or indented. `name: type` alone is none: it may be prose."""


@dataclass(frozen=True)
class ProgrammingProblem:
    """`prompt`: the beginning of a program. `test`: code with `check(candidate)`. Both run in the sandbox only."""

    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class Programs:
    """Programs that must pass all their tests (pass@1). The system's Python runs them.

    Raises `ConfigError` for a broken file and if the sandbox is missing, and `SandboxError` if a limit does not hold on
    this machine.
    """

    path: str = ""
    """A file in HumanEval's format; empty for the problems of our own."""
    limits: Limits = PROGRAM_LIMITS
    """What the program and its tests may use, each."""

    name: ClassVar[str] = "programs"
    version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        self.questions()
        _ = self._sandbox
        prove()

    @cached_property
    def _questions(self) -> list[Question]:
        return read_problems(local_path("path", self.path) if self.path else OWN)

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self.limits)

    def questions(self) -> Sequence[Question]:
        return self._questions

    def machine(self) -> Mapping[str, str]:
        return {"python": self._sandbox.version(python_command()[0])}

    def judge(self, question: Question, answer: str) -> Verdict:
        """Run the program of an answer against its tests. Raises `SandboxError` if the sandbox or the tests fail."""
        problem: ProgrammingProblem = question.reference
        code = program_of(problem, answer)
        if code is None:
            return Verdict(Outcome.unreadable, 0.0, "holds no code")
        failure = self._failure(problem, code)
        if not failure:
            return Verdict(Outcome.right, 1.0)
        return Verdict(Outcome.wrong, 0.0, " ".join(failure.split())[:300])

    def _failure(self, problem: ProgrammingProblem, code: str) -> str:
        """Return why a program fails its tests, or an empty string.

        Program and tests run in two sandboxes that are joined by two pipes. Only the tests can write the report.
        """
        program = json.dumps({"code": code, "entry_point": problem.entry_point})
        tests = json.dumps({"prompt": problem.prompt, "test": problem.test})
        source, python = Path(harness.__file__).read_bytes(), python_command()
        calls, replies = os.pipe(), os.pipe()
        ends = {*calls, *replies}

        def start(role: str, task: str, stdin: int, stdout: int) -> Any:
            files = {"/harness.py": source, "/task.json": task.encode()}
            running = self._sandbox.start([*python, "/harness.py", role], files, stdin, stdout)
            for descriptor in (stdin, stdout):  # a pipe closes when the sandboxes alone hold it
                os.close(descriptor)
                ends.remove(descriptor)
            return running

        try:
            with (
                start("program", program, calls[0], replies[1]) as answering,
                start("tests", tests, replies[0], calls[1]) as testing,
            ):
                outcome = testing.finish()
                if outcome.limit is None and outcome.exit_code == 0:
                    failure = str(parse_json(outcome.stderr)["failure"])
                    return _limit(answering.limit) if failure and answering.limit else failure
                ended = answering.limit or outcome.limit
        finally:
            for descriptor in ends:
                os.close(descriptor)
        if ended is None:
            raise SandboxError(f"the tests failed: {outcome.stderr[-300:].decode(errors='replace')}")
        return _limit(ended)


def _limit(limit: Limit) -> str:
    return f"was ended at its limit of {limit.value}"


def read_problems(path: Path) -> list[Question]:
    """Read a file in HumanEval's format: JSON lines with task_id, prompt, entry_point and test.

    Raises `ConfigError` that names the first broken line, a repeated task_id or an entry point that is not a name.
    """
    questions = []
    for where, row in read_jsonl(path, _SHAPE, "task_id"):
        if not row["entry_point"].isidentifier():
            raise ConfigError("path", None, f"{where}: entry_point {row['entry_point'][:50]!r} is not a name")
        reference = ProgrammingProblem(row["prompt"], row["entry_point"], row["test"])
        questions.append(Question(row["task_id"], row["prompt"], reference, max_tokens=512, stops=_STOPS))
    return questions


def program_of(problem: ProgrammingProblem, answer: str) -> str | None:
    """Return the program in an answer, or None: the first fenced block that defines the function, with the other blocks
    that it needs, in their order; or the answer's own definition of it with the code before and after; or the prompt
    continued. What the prompt imports and defines before the function comes first.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", re.MULTILINE)
    begin = list(definition.finditer(problem.prompt))
    preamble = problem.prompt[: begin[-1].start()] if begin else problem.prompt
    blocks = [match[1] for match in _FENCE.finditer(answer)]
    defining = [place for place, block in enumerate(blocks) if definition.search(block)]
    if defining:
        others = [place for place in range(len(blocks)) if place not in defining]
        needed = _needed_blocks(blocks, defining[0], others)
        return "\n".join([preamble, *(blocks[place] for place in needed), ""])
    text = blocks[0] if blocks else answer
    if found := definition.search(text):
        return f"{preamble}\n{_without_prose(text[: found.start()])}\n{_until_prose(text[found.start() :])}\n"
    if not re.search(r"^[ \t]+\S", text, re.MULTILINE):  # the body of a function is indented
        return None
    return f"{problem.prompt}{_until_prose(text)}\n"


def _needed_blocks(blocks: Sequence[str], main: int, others: Sequence[int]) -> list[int]:
    """Return the places of the block `main` and of those of `others` that define a name which it, or a block that it
    needs, uses. So examples and tests of a function stay out.
    """
    chosen = {main}
    while True:
        used = {name for place in chosen for name in re.findall(r"\w+", blocks[place])}
        more = {place for place in others if place not in chosen and used & _defined_names(blocks[place])}
        if not more:
            return sorted(chosen)
        chosen |= more


def _defined_names(block: str) -> set[str]:
    """Return the functions, classes, imports and constants (in capitals) that a block defines at its left margin."""
    names = re.findall(r"^(?:(?:async )?def|class) +(\w+)|^([A-Z][A-Z0-9_]*)\b[^=\n]*=(?!=)", block, re.MULTILINE)
    imported = re.findall(r"^(?:from \S+ )?import +(.+)", block, re.MULTILINE)
    last = (part.split() for line in imported for part in line.strip("()").split(","))
    return {name for pair in names for name in pair if name} | {words[-1].split(".")[0] for words in last if words}


def _without_prose(text: str) -> str:
    """Return the lines that look like code, each with what is indented below it."""
    kept, code = [], False
    for line in text.split("\n"):
        if line and line[0] not in " \t)]}":
            code = bool(_CODE.match(line))
        if code:
            kept.append(line)
    return "\n".join(kept)


def _until_prose(text: str) -> str:
    """Return the lines before the first that neither is indented nor looks like code."""
    lines = text.split("\n")
    end = next((number for number, line in enumerate(lines) if number and not _CODE.match(line)), len(lines))
    return "\n".join(lines[:end])
