"""The examination of HTML pages: six programs, judged by what happens in a browser.

With the tokenizer of the smoke run (1,024 tokens) each question fits a context of 256 tokens. An answer may have
`LONGEST_PAGE` tokens, and needs a context that is as much longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from core.errors import ConfigError
from train.exam.base import Outcome, Question, Verdict
from train.exam.code.browser import PAGE_LIMITS, Browser, Page, PageError
from train.exam.code.proof import prove
from train.exam.code.sandbox import Limits
from train.exam.code.snake import SNAKE, judge_snake
from train.exam.code.widgets import (
    BALL,
    COUNTER,
    FORM,
    STOPWATCH,
    TASK_LIST,
    judge_ball,
    judge_counter,
    judge_form,
    judge_stopwatch,
    judge_todo,
)

LONGEST_PAGE = 2048
"""Tokens of an answer."""
PAGE_PROMPT = """{task}
One file, no network.

```html
"""


@dataclass(frozen=True)
class PageTask:
    """`judge` raises `PageError` at the first thing that the page does not do."""

    name: str
    text: str
    judge: Callable[[Page], None]


PAGE_TASKS = (
    PageTask("snake", SNAKE, judge_snake),
    PageTask("counter", COUNTER, judge_counter),
    PageTask("todo", TASK_LIST, judge_todo),
    PageTask("stopwatch", STOPWATCH, judge_stopwatch),
    PageTask("ball", BALL, judge_ball),
    PageTask("form", FORM, judge_form),
)


@dataclass(frozen=True)
class Pages:
    """Pages that run in headless Chromium in the sandbox. An exception that the page does not catch makes it wrong.

    Raises `ConfigError` if the sandbox or the browser is missing, and `SandboxError` if a limit does not hold.
    """

    limits: Limits = PAGE_LIMITS
    """What a page and its browser may use."""
    tasks: list[str] = field(default_factory=list)
    """Ask only for these pages, such as snake; empty: all."""

    name: ClassVar[str] = "pages"
    version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        names = [task.name for task in PAGE_TASKS]
        for name in self.tasks:
            if name not in names:
                raise ConfigError("tasks", name, "no such page", names)
        _ = self._browser
        prove()

    @cached_property
    def _browser(self) -> Browser:
        return Browser(self.limits)

    def questions(self) -> Sequence[Question]:
        return [
            Question(
                task.name,
                PAGE_PROMPT.format(task=task.text),
                task.name,
                max_tokens=LONGEST_PAGE,
                stops=("\n```",),
                own_text=task.text,
            )
            for task in PAGE_TASKS
            if not self.tasks or task.name in self.tasks
        ]

    def machine(self) -> Mapping[str, str]:
        return {"chromium": self._browser.sandbox.version(self._browser.program)}

    def judge(self, question: Question, answer: str) -> Verdict:
        """Run the page of an answer. The verdict's `errors` counts the exceptions that the page did not catch."""
        html = page_of(answer)
        if html is None:
            return Verdict(Outcome.unreadable, 0.0, "holds no HTML")
        task = next(task for task in PAGE_TASKS if task.name == question.reference)
        errors: list[str] = []
        try:
            with self._browser.opened(html) as page:
                errors = page.errors
                task.judge(page)
        except PageError as problem:
            note = f"throws {errors[0]}" if errors else str(problem)
            return Verdict(Outcome.wrong, 0.0, note, {"errors": float(len(errors))})
        if errors:
            return Verdict(Outcome.wrong, 0.0, f"throws {errors[0]}", {"errors": float(len(errors))})
        return Verdict(Outcome.right, 1.0, figures={"errors": 0.0})


def page_of(answer: str) -> str | None:
    """Return the HTML in an answer: a fenced block of html, or the text from the first tag of a page."""
    fenced = re.search(r"```(?:html|HTML)?[ \t]*\n(.*?)(?:\n```|\Z)", answer, re.DOTALL)
    text = fenced[1] if fenced and "<" in fenced[1] else answer
    begin = re.search(
        r"<(?:!doctype|html|head|body|script|style|canvas|div|button|input|form|p|h1|title|meta)\b", text, re.I
    )
    if begin is None:
        return None
    end = re.search(r"</html\s*>", text, re.I)
    return text[begin.start() : end.end() if end else None]
