"""Pages in headless Chromium: each right page passes, each wrong one fails for its own reason."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from train.exam.base import Outcome
from train.exam.code.browser import PAGE_LIMITS, Browser
from train.exam.code.pages import PAGE_TASKS, Pages
from train.exam.config import ExamConfig
from train.exam.registry import make_exam

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent / "pages"
WRONG = [
    ("snake", "next = wanted;", ";", "does not turn at ArrowDown"),
    ("snake", "ArrowLeft: [-1, 0]", "ArrowLeft: [1, 0]", "does not turn at ArrowLeft"),
    ("snake", "way = next;", "way = nextt;", "throws ReferenceError: nextt is not defined"),
    ("snake", "draw();\nconst", "draw(;\nconst", "throws SyntaxError"),
    ("snake", "const timer = setInterval(move, 100);", "", "does not move"),
    ("snake", "else snake.pop();", "snake.pop();", "does not grow"),
    ("snake", "++score", "score", "does not count the food"),
    ("snake", "x < 0 || y < 0 || x > 19 || y > 19 || ", "", "does not end at the wall"),
    ("snake", '"game" width="400"', '"game" width="300"', "has no canvas"),
    ("counter", "Math.max(0, count.textContent - 1)", "count.textContent - 1", "shows '-2' and not 0"),
    ("counter", "+count.textContent + 1", "count.textContent + 1", "shows '0111' and not 3"),
    ("counter", 'id="down"', 'id="minus"', "throws TypeError"),
    ("todo", "item.textContent = text", "item.innerHTML = text", "does not show HTML as it was typed"),
    ("todo", "if (!text) return;", "", "adds an empty text"),
    ("todo", 'input.value = "";', "", "does not empty the input"),
    ("todo", 'if (event.key === "Enter") add();', "", "does not add the text at Enter"),
    ("todo", "classList.toggle", "classList.add", "marks [True, False] as done"),
    ("stopwatch", "before = now(); since = null; show();", "before = now(); show();", "and not 2.5"),
    ("stopwatch", "before = 0; since = null;", "", "and not 0.0"),
    ("stopwatch", "toFixed(1)", "toFixed(2)", "and not seconds like 2.5"),
    ("ball", "if (x > 290) { x = 580 - x; dx = -dx; }", "", "red pixels and not the 314"),
    ("ball", "dx = 200", "dx = 800", "jumps or is too fast"),
    ("ball", "dx = 200, dy = 120", "dx = 0, dy = 0", "turns 0 times at the sides"),
    ("form", "event.preventDefault();", "", "left its address"),
    ("form", "+age >= 18 && ", "", "takes 'ann@example.org', '17' for valid"),
    ("form", r"\.[^@\s]+$/", "$/", "takes 'ann@example', '30' for valid"),
]
SHORT = replace(PAGE_LIMITS, wall_s=20)
"""For hostile pages, which end at a limit even on a quiet machine."""
ATTACKS = {
    "busy": ("<script>while (true);</script>", "was ended at its limit of wall time"),
    "redirect": (
        "<script>location.href = 'file:///page.html?' + Math.random()</script>",
        "did not load within 10 s|limit of wall",
    ),
    "reload": ("<script>setTimeout(() => location.reload(), 1)</script>", ""),
    "refresh": ("<meta http-equiv=refresh content=0>wait", ""),
    "alerts": ("<script>for (;;) alert(1)</script>", "was ended at its limit of wall time"),
    "memory": ("<script>const a = []; for (;;) a.push(new Uint8Array(1e7).fill(1))</script>", "limit of memory"),
    "console": ("<script>for (;;) console.log('x'.repeat(1e6))</script>", "limit of"),
    "windows": ("<script>setInterval(() => open('file:///page.html'), 1)</script>", "has no canvas"),
    "workers": (
        "<script>const url = URL.createObjectURL(new Blob(['for (;;);']));"
        "for (let n = 0; n < 500; n++) new Worker(url)</script>",
        "",
    ),
    "network": (
        "<script>const x = new XMLHttpRequest(); x.open('GET', 'http://192.0.2.1/', false); x.send()</script>",
        "throws NetworkError",
    ),
    "files": (
        "<script>const x = new XMLHttpRequest(); x.open('GET', '/usr/lib/os-release', false); x.send()</script>",
        "throws NetworkError",
    ),
    "success_word": ("<script>document.title = '{\"score\": 1}'; console.log('right')</script>", "has no canvas"),
}


@pytest.fixture(scope="module")
def exam() -> Pages:
    return Pages()


def judged(exam: Pages, name: str, html: str):
    question = next(question for question in exam.questions() if question.id == name)
    return exam.judge(question, html)


def page(name: str, old: str = "", new: str = "") -> str:
    text = (FOLDER / f"{name}.html").read_text()
    assert old in text
    return text.replace(old, new) if old else text


@pytest.mark.parametrize("name", [task.name for task in PAGE_TASKS])
def test_a_right_page_passes(exam, name):
    verdict = judged(exam, name, f"Here it is:\n```html\n{page(name)}```\n")
    assert (verdict.outcome, verdict.note) == (Outcome.right, "")


@pytest.mark.parametrize(("name", "old", "new", "note"), WRONG, ids=[f"{row[0]}_{row[3][:20]}" for row in WRONG])
def test_a_wrong_page_fails_for_its_reason(exam, name, old, new, note):
    verdict = judged(exam, name, page(name, old, new))
    assert verdict.outcome is Outcome.wrong
    assert note in verdict.note


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_page_ends_at_its_limit(exam, name):
    html, note = ATTACKS[name]
    started = time.monotonic()
    verdict = judged(exam if name == "memory" else Pages(SHORT), "snake", html)
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.1f} s, {verdict.note}")
    assert verdict.outcome is Outcome.wrong
    assert re.search(note, verdict.note)
    assert seconds < PAGE_LIMITS.wall_s + 30


def test_any_green_snake_and_red_food_will_do(exam):
    assert judged(exam, "snake", page("snake", '"#00ff00"', '"green"').replace('"#ff0000"', '"crimson"')).score == 1
    wrong = judged(exam, "snake", page("snake", '"#00ff00"', '"yellow"'))
    assert wrong.score == 0 and "shows 0 green cells" in wrong.note


def test_a_suite_gives_pages_the_limits_of_pages():
    made = make_exam(ExamConfig("pages", {"tasks": ["counter", "snake"]}))
    assert isinstance(made, Pages) and made.limits == PAGE_LIMITS
    assert [question.id for question in made.questions()] == ["snake", "counter"]
    assert made.machine()["chromium"].startswith("Chromium")
    assert judged(made, "counter", page("counter")).score == 1


def test_an_alert_does_not_stop_a_page(exam):
    over = 'document.getElementById("state").textContent = "Game over";'
    assert judged(exam, "snake", page("snake", over, over + ' alert("Game over");')).score == 1


def test_an_answer_without_a_page_is_unreadable(exam):
    assert judged(exam, "snake", "I would draw a snake.").outcome is Outcome.unreadable


def test_time_and_chance_in_a_page_are_virtual():
    html = "<script>let n = 0; setInterval(() => n++, 100); document.title = Math.random()</script><p id=p>x</p>"
    seen = []
    for _ in range(2):
        with Browser().opened(html) as opened:
            opened.advance(60_000)
            seen.append(opened.evaluate("[document.title, Math.round(performance.now() / 1000)]"))
            with pytest.raises(Exception, match="has no element with the id q"):
                opened.text("q")
    assert seen[0] == seen[1] and seen[0][1] == 60
