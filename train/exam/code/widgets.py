"""Five small pages: what is asked for, and their judges. A judge raises `PageError` at what the page does not do."""

from __future__ import annotations

import re
from itertools import pairwise

from train.exam.code.browser import Page

COUNTER = """Write a web page with a counter.
- The element with the id "count" shows 0 at the start.
- The button with the id "up" adds 1. The button with the id "down" subtracts 1, but never goes below 0."""

TASK_LIST = """Write a web page with a list of things to do.
- A text input with the id "text", a button with the id "add", and an empty list (ul) with the id "list".
- A click on the button, or Enter in the input, adds the text as a new item (li) at the end and empties the input.
- Nothing is added for an empty text or one of spaces only. A text with HTML in it is shown as it was typed.
- A click on an item gives it the class "done". Another click takes it away."""

STOPWATCH = """Write a web page with a stopwatch.
- The element with the id "time" shows seconds with one decimal and nothing else, at first 0.0.
- The button with the id "start" starts it, the button with the id "stop" stops it, and another start goes on from the
  time shown. The button with the id "reset" sets it to 0.0 and stops it.
- The time shown is exact to a tenth of a second."""

BALL = """Write a web page with a bouncing ball.
- A canvas with the id "field", 300 pixels wide and 200 high, with a white background.
- A red (#ff0000) ball of 10 pixels radius starts by itself at the centre. It moves 200 pixels a second to the right and
  120 pixels a second down.
- It bounces off all four walls and never leaves the canvas."""

FORM = """Write a web page with a form.
- Text inputs with the ids "email" and "age", a button with the id "send", and empty elements with the ids "error" and
  "done".
- A click on the button checks both: the email must have one @ with text on both sides and a dot after it, and the age
  must be a whole number from 18 to 120.
- If one is not valid, "error" shows a message and "done" stays empty. If both are valid, "done" shows "sent" and
  "error" is empty. The page is not left or loaded again."""


def judge_counter(page: Page) -> None:
    for clicks, wanted in (("", "0"), ("up up up", "3"), ("down", "2"), ("down down down down", "0"), ("up", "1")):
        for button in clicks.split():
            page.click(button)
        shown = page.text("count")
        page.expect(shown == wanted, f"shows {shown[:20]!r} and not {wanted} after: {clicks or 'the start'}")


def judge_todo(page: Page) -> None:
    items = "Array.from(document.querySelectorAll('#list li'))"
    page.expect(_items(page) == [], "has items at the start")
    page.fill("text", "milk")
    page.click("add")
    page.expect(_items(page) == ["milk"], "does not add the text when the button is clicked")
    page.expect(page.text("text") == "", "does not empty the input")
    page.fill("text", "<b>bread</b>")
    page.press("Enter")
    page.expect(len(_items(page)) == 2, "does not add the text at Enter")
    page.expect(_items(page)[1] == "<b>bread</b>", "does not show HTML as it was typed, or not at the end")
    page.click("add")
    page.fill("text", "  ")
    page.click("add")
    page.expect(len(_items(page)) == 2, "adds an empty text")
    for wanted in ([True, False], [False, False]):
        page.click_on(f"{items}[0]", "shows no items")
        done = page.evaluate(f"{items}.map(item => item.classList.contains('done'))")
        page.expect(done == wanted, f"marks {done} as done and not {wanted}")


def _items(page: Page) -> list[str]:
    found = page.evaluate("Array.from(document.querySelectorAll('#list li')).map(item => item.textContent.trim())")
    return [str(item) for item in found]


def judge_stopwatch(page: Page) -> None:
    steps = (
        ("", 500, 0.0),
        ("start", 2500, 2.5),
        ("stop", 1000, 2.5),
        ("start", 1000, 3.5),
        ("reset", 1000, 0.0),
        ("start", 700, 0.7),
    )
    for button, milliseconds, wanted in steps:
        if button:
            page.click(button)
        page.advance(milliseconds)
        shown = page.text("time")
        page.expect(re.fullmatch(r"\d{1,6}\.\d", shown) is not None, f"shows {shown[:20]!r} and not seconds like 2.5")
        near = abs(float(shown) - wanted) < (0.15 if wanted else 0.05)
        page.expect(near, f"shows {shown} and not {wanted}, {milliseconds} ms after: {button or 'the load'}")


def judge_ball(page: Page) -> None:
    """Watch the ball for 6 s, 20 times a second: it meets the sides 4 times, top and bottom 3 or 4 times."""
    places = []
    for _ in range(120):
        page.advance(50)
        places.append(_ball(page))
    turns = [0, 0]
    for axis, size in ((0, 300), (1, 200)):
        steps = [after[axis] - before[axis] for before, after in pairwise(places)]
        fastest = 1.6 * (10, 6)[axis]
        page.expect(all(abs(step) <= fastest for step in steps), "shows a ball that jumps or is too fast")
        for number, (before, after) in enumerate(pairwise(steps)):
            if before * after < 0:
                turns[axis] += 1
                near = min(places[number + 1][axis], size - places[number + 1][axis])
                page.expect(near < 30, "shows a ball that turns away from the wall")
    page.expect(3 <= turns[0] <= 5, f"shows a ball that turns {turns[0]} times at the sides in 6 s and not 4 times")
    page.expect(2 <= turns[1] <= 5, f"shows a ball that turns {turns[1]} times at top and bottom and not 4 times")


def _ball(page: Page) -> tuple[float, float]:
    """Return the centre of the red pixels."""
    found = page.evaluate(
        """(canvas => {
        if (!(canvas instanceof HTMLCanvasElement) || canvas.width !== 300 || canvas.height !== 200) return null;
        const {data} = canvas.getContext('2d').getImageData(0, 0, 300, 200);
        let count = 0, across = 0, down = 0;
        for (let at = 0; at < 60000; at++)
          if (data[4 * at] > 200 && data[4 * at + 1] < 100 && data[4 * at + 2] < 100 && data[4 * at + 3] > 128)
            { count++; across += at % 300; down += Math.floor(at / 300); }
        return [count, across / count, down / count];
        })(document.getElementById('field'))"""
    )
    page.expect(isinstance(found, list), 'has no canvas with the id "field" of 300 by 200')
    count, across, down = found
    page.expect(240 <= count <= 360, f"shows {count} red pixels and not the 314 of a whole ball")
    return float(across), float(down)


def judge_form(page: Page) -> None:
    cases = (
        ("ann@example.org", "30", True),
        ("ann.example.org", "30", False),
        ("ann@example", "30", False),
        ("@example.org", "30", False),
        ("ann@example.org", "17", False),
        ("ann@example.org", "121", False),
        ("ann@example.org", "18.5", False),
        ("ann@example.org", "", False),
        ("bob@mail.example.org", "18", True),
    )
    page.expect(page.text("error") == "" == page.text("done"), "shows a message at the start")
    for email, age, valid in cases:
        page.fill("email", email)
        page.fill("age", age)
        page.click("send")
        page.advance(50)
        error, done = page.text("error"), page.text("done")
        fits = (error == "" and "sent" in done.lower()) if valid else (error != "" and done == "")
        page.expect(fits, f"takes {email!r}, {age!r} for {'wrong' if valid else 'valid'}")
