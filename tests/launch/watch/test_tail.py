"""Lines are read once, whole, in bounded memory, whatever happens to the file."""

from __future__ import annotations

import json
import math
import os
import random

import pytest

from launch.watch import curve, tail
from launch.watch.curve import CurvePoint, MetricCurve
from launch.watch.tail import Tail


def rows(*numbers: int) -> str:
    return "".join(f'{{"step": {number}}}\n' for number in numbers)


def steps(lines) -> list[int]:
    return [line["step"] for line in lines]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_half_written_line_waits_for_its_end(path):
    reader = Tail(path)
    assert reader.poll() == []
    path.write_text(rows(1, 2) + '{"st')
    assert steps(reader.poll()) == [1, 2]
    assert reader.poll() == [] and reader.damaged == 0
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert steps(reader.poll()) == [3] and not reader.restarted


@pytest.mark.parametrize("change", ["replaced", "truncated", "written over", "gone"])
def test_another_file_starts_again(path, change):
    path.write_text(rows(1, 2, 3))
    reader = Tail(path)
    assert steps(reader.poll()) == [1, 2, 3]
    new = {"truncated": rows(1), "written over": rows(7, 8, 9, 10), "replaced": rows(1, 2, 3, 4), "gone": rows(5)}[
        change
    ]
    if change == "replaced":  # the same beginning: only the inode differs
        path.with_name("new").write_text(new)
        os.replace(path.with_name("new"), path)
    elif change == "gone":
        path.unlink()
        assert reader.poll() == [] and reader.restarted
        path.write_text(new)
    else:
        path.write_text(new)
    found = reader.poll()
    assert steps(found) == steps(map(json.loads, new.splitlines())) and reader.restarted == (change != "gone")
    assert reader.poll() == [] and not reader.restarted, "control: once only"


def test_damaged_lines_are_counted_and_left_out(path):
    deep = "[" * 100_000
    path.write_bytes(rows(1).encode() + b'{"step": \xff}\nnull\n[1]\n\n' + deep.encode() + b"\n" + rows(2).encode())
    reader = Tail(path)
    assert steps(reader.poll()) == [1, 2] and reader.damaged == 4


def test_a_long_file_is_read_in_blocks(path, monkeypatch):
    monkeypatch.setattr(tail, "BLOCK", 1000)
    path.write_text(rows(*range(500)))
    reader, found, calls = Tail(path), [], 0
    while calls == 0 or reader.behind:
        lines = reader.poll()
        assert len(lines) < 100, "a block at a time"
        found += steps(lines)
        calls += 1
    assert found == list(range(500)) and calls > 5


def test_a_line_without_an_end_takes_no_memory(path, monkeypatch):
    monkeypatch.setattr(tail, "BLOCK", 1000)
    monkeypatch.setattr(tail, "LONGEST", 500)
    path.write_text(rows(1) + "x" * 5_000 + "\n" + rows(2) + '{"a": "' + "y" * 600 + '"}\n' + rows(3))
    reader, found = Tail(path), []
    for _ in range(12):
        found += reader.poll()
    assert steps(found) == [1, 2, 3] and reader.damaged == 2 and not reader.behind


def test_what_is_no_file_is_a_problem_not_a_wait(path):
    os.mkfifo(path)
    reader = Tail(path)
    assert reader.poll() == [] and "named pipe" in reader.problem
    path.unlink()
    path.write_text(rows(1))
    assert steps(reader.poll()) == [1] and not reader.problem


def test_a_curve_keeps_the_extremes_in_few_points(monkeypatch):
    monkeypatch.setattr(curve, "LIMIT", 64)
    found, values = MetricCurve(), [random.Random(0).random() for _ in range(3_000)]
    values[1321], values[77] = 50.0, -50.0
    for step, value in enumerate(values, 1):
        found.add(step, value)
    assert len(found.points) <= 64 and found.value == values[-1]
    assert found.points[0].first == 1 and found.points[-1].last == 3_000
    assert all(a.last + 1 == b.first for a, b in zip(found.points, found.points[1:], strict=False))
    for point in found.points:
        part = values[point.first - 1 : point.last]
        assert (point.low, point.high) == (min(part), max(part))
    sizes = [point.last - point.first + 1 for point in found.points]
    assert len(set(sizes[:-1])) == 1, "old steps are drawn as finely as new ones"


def test_a_step_again_removes_what_came_after():
    found = MetricCurve()
    for step, value in [(1, 5.0), (2, 4.0), (3, math.nan), (4, 9.0), (3, 3.5)]:
        found.add(step, value)
    assert found.points == [CurvePoint(1, 1, 5.0, 5.0), CurvePoint(2, 2, 4.0, 4.0), CurvePoint(3, 3, 3.5, 3.5)]
    assert list(found.since(2)) == found.points[1:]
