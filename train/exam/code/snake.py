"""The snake game: what is asked for, and its judge, which plays it."""

from __future__ import annotations

from dataclasses import dataclass

from train.exam.code.browser import Page

SNAKE = """Write a web page with a snake game.
- A canvas, #game, of 400 by 400 pixels has 20 by 20 cells: black, the snake green, one food red.
- The snake starts in the middle with 3 cells and moves right, a cell each 100 ms. Arrow keys turn it.
- Eating adds a cell, and 1 to the element #score (at first 0). New food is put in a random empty cell.
- At a wall or itself it stops, and the element #state says Game over."""
"""Short: with the tokenizer of the smoke run, the question has some 220 tokens. The judge takes any green and red."""

CELLS, PIXELS = 20, 20
SLOWEST_MS, LOOK_MS = 400, 20
"""Milliseconds in which the snake must move, and between two looks at it."""
MOST_MOVES = 80
"""Moves within which the food must be reached. The longest way has 38."""
_ARROWS = {(1, 0): "ArrowRight", (-1, 0): "ArrowLeft", (0, 1): "ArrowDown", (0, -1): "ArrowUp"}
_READ = f"""(canvas => {{
  if (!(canvas instanceof HTMLCanvasElement) || canvas.width !== {CELLS * PIXELS} || canvas.height !== {CELLS * PIXELS})
    return null;
  const {{data}} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height), found = [];
  for (let y = 0; y < {CELLS}; y++) for (let x = 0; x < {CELLS}; x++) {{
    const at = 4 * ((y * {PIXELS} + {PIXELS // 2}) * canvas.width + x * {PIXELS} + {PIXELS // 2});
    const [r, g, b] = data.slice(at, at + 3);
    if (g > r + 60 && g > b + 60) found.push([x, y, 1]);
    if (r > g + 60 && r > b + 60) found.push([x, y, 2]);
  }}
  return found;
}})(document.getElementById('game'))"""

Cell = tuple[int, int]


@dataclass(frozen=True)
class Field:
    """What the canvas shows."""

    snake: frozenset[Cell]
    food: frozenset[Cell]


def judge_snake(page: Page) -> None:
    """Play: watch it move, turn it around, eat once, run into a wall. Raises `PageError` at what it does not do."""
    for _ in range(0, SLOWEST_MS, LOOK_MS):  # the first picture may come with the first move
        if _look(page).snake:
            break
        page.advance(LOOK_MS)
    start = _look(page)
    page.expect(len(start.snake) == 3, f"shows {len(start.snake)} green cells and not a snake of 3")
    page.expect(len(start.food) == 1, f"shows {len(start.food)} cells of food and not one")
    page.expect(_number(page) == 0, "does not start with a score of 0")
    heading, head = (1, 0), _move(page, start)
    page.expect((head[0] - 1, head[1]) in start.snake, "does not move to the right at the start")
    for heading in ((0, 1), (-1, 0), (0, -1)):
        head = _turn(page, head, heading)
        head = _move(page, _look(page))
    _eat(page, head, heading)
    for _ in range(CELLS + 5):
        if "over" in page.text("state").lower():
            break
        page.advance(100)
    page.expect("over" in page.text("state").lower(), "does not end at the wall")
    last = _look(page)
    page.advance(1000)
    page.expect(_look(page) == last, "goes on after the end")


def _look(page: Page) -> Field:
    found = page.evaluate(_READ)
    page.expect(isinstance(found, list), f'has no canvas with the id "game" of {CELLS * PIXELS} by {CELLS * PIXELS}')
    cells = {kind: frozenset((x, y) for x, y, which in found if which == kind) for kind in (1, 2)}
    return Field(cells[1], cells[2])


def _move(page: Page, before: Field) -> Cell:
    """Wait for the next move and return the cell of the head."""
    for _ in range(0, SLOWEST_MS, LOOK_MS):
        page.advance(LOOK_MS)
        new = _look(page).snake - before.snake
        if new:
            page.expect(len(new) == 1, "moves by more than one cell at once")
            return next(iter(new))
    page.expect(False, "shows a snake that does not move")
    raise AssertionError


def _turn(page: Page, head: Cell, heading: Cell) -> Cell:
    """Press a key and return the head after the turn, which may come one move late."""
    page.press(_ARROWS[heading])
    for _ in range(2):
        new = _move(page, _look(page))
        if (new[0] - head[0], new[1] - head[1]) == heading:
            return new
        head = new
    page.expect(False, f"shows a snake that does not turn at {_ARROWS[heading]}")
    raise AssertionError


def _eat(page: Page, head: Cell, heading: Cell) -> None:
    """Steer to the food and check what eating it does."""
    score, length = _number(page), len(_look(page).snake)
    for _ in range(MOST_MOVES):
        field = _look(page)
        if _number(page) > score:
            break
        page.expect(len(field.food) == 1, f"shows {len(field.food)} cells of food and not one")
        wanted = _way(head, heading, next(iter(field.food)))
        if wanted != heading:
            page.press(_ARROWS[wanted])
            heading = wanted
        head = _move(page, field)
    page.expect(_number(page) == score + 1, "does not count the food that the snake reached")
    page.advance(100)
    page.expect(len(_look(page).snake) == length + 1, "does not grow when the snake eats")
    page.expect(len(_look(page).food) == 1, "has no new food after the first")


def _way(head: Cell, heading: Cell, food: Cell) -> Cell:
    """Return where to go next: towards the food, and never back into the neck."""
    across, down = food[0] - head[0], food[1] - head[1]
    steps = [(1 if across > 0 else -1, 0)] * bool(across) + [(0, 1 if down > 0 else -1)] * bool(down)
    back = (-heading[0], -heading[1])
    for step in steps:
        if step != back:
            return step
    # the food is behind: turn aside, away from the nearer wall
    inward = tuple(1 if place < CELLS // 2 else -1 for place in head)
    return (0, inward[1]) if heading[0] else (inward[0], 0)


def _number(page: Page) -> int:
    digits = "".join(filter(str.isdecimal, page.text("score")))
    page.expect(0 < len(digits) < 10, "shows no number in the element with the id score")
    return int(digits)
