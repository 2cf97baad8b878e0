"""What `leviathan watch` shows of runs in every state, and what a hostile file can do to the terminal: nothing."""

from __future__ import annotations

import json
import os
import re
import time
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from rich.console import Console

from launch.watch.curve import CurvePoint
from launch.watch.plot import PlotSeries, bars, plot
from launch.watch.run import RunState, WatchedRun
from launch.watch.screen import plain_frame
from launch.watch.view import describe, duration
from tests.launch.hostile.damage import DAMAGES, cleared
from tests.launch.watch.runs import EVENT, append, frame, logged, make_running, viewed
from tests.train.report.runs import make_run
from train.config import TrainConfig
from train.run_directory import DIVERGED, load_config


@pytest.fixture(autouse=True)
def configurations(monkeypatch):
    """Read equal configurations once: each takes a sixth of a second."""
    monkeypatch.setattr(
        "launch.watch.run.load_config", lambda directory: _read((directory / "config.yaml").read_text())
    )


@cache
def _read(text: str) -> TrainConfig:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(text)
        return load_config(Path(folder))


@pytest.fixture
def run(tmp_path):
    return make_running(tmp_path / "first")


def test_a_frame_shows_what_goes_on(run):
    append(run, "recovery.jsonl", EVENT)
    append(
        run,
        "metrics.jsonl",
        logged(52, loss=4.0625, slow_ranks=[{"rank": 3, "host": "n7", "kind": "matmuls", "times_the_median": 2.5}]),
    )
    (run / "log.txt").write_text("2026-01-01 00:00:00 step 52/60\n")
    text = frame(run, width=200)
    for words in (
        "running first",
        "step 52 of 60  87%",
        "4.0625",
        "7,000",
        "1.00e-03",
        "0.65 GiB",
        "4.2500",
        "! rank 3 on n7 is slow: matmuls take 2.5 times the",
        "step 30: spike, loss_mad (loss 9.31, limit 4.2); verdict: data",
        "verdict: data",
        "alarms: 1, ledger: 1",
        "step 52/60",
        "x an expert without a token",
    ):
        assert words in text, words
    left = 8 * 2048 / 7000
    assert f"0:0{int(left)} left" in text
    assert len(text.splitlines()) == 40 and max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize("width, height", [(20, 5), (1, 1), (60, 60), (79, 24), (120, 40), (400, 120)])
def test_any_size_of_terminal_will_do(run, width, height):
    for runs in ([run], [run, run]):
        lines = frame(*runs, width=width, height=height).splitlines()
        assert len(lines) <= height and max(map(len, lines)) <= width


def test_the_curve_has_the_values_where_they_are():
    """A line from 4 down to 1 with a spike of 9 in the middle, drawn in 6 lines; the spike is one column."""
    points = [
        CurvePoint(step, step, value, value) for step, value in zip((1, 2, 3, 4, 5), (4, 3, 9, 2, 1), strict=True)
    ]
    text = plot([PlotSeries(points, "red", "*")], 29, 7, True, False).plain.splitlines()
    assert [line[:9].strip() for line in text[:6]] == ["9┤", "│", "5.8┤", "│", "│", "1┤"]
    rows = [line[9:] for line in text[:6]]
    assert {place for place, one in enumerate(rows[0]) if one != " "} <= set(range(8, 13)) and rows[0].strip()
    assert rows[5].strip() and rows[5][:10].isspace() and len(rows[5].rstrip()) == 20
    assert text[6].split() == ["step", "1", "5"]
    plain = plot([PlotSeries(points, "red", "1"), PlotSeries(points[:1], "", "2")], 29, 7, False, False).plain
    assert "1" in plain.splitlines()[0][9:] and "2" in "".join(line[9:] for line in plain.splitlines()[:6])


def test_bars_go_from_the_lowest_to_the_highest():
    points = [CurvePoint(step, step, value, value) for step, value in enumerate((5.0, 1.0, 2.0, 3.0))]
    assert bars(points, 3, False) == "▁▅█" and bars(points, 0, False) == bars([], 3, False) == ""
    assert bars(points[:1], 3, False) == "▄"


def test_the_heat_map_moves_and_marks_dead_experts(run):
    line = {"expert_load": [{"max_over_mean": 1.0, "dead": 0}] * 2 + [{"max_over_mean": 9.0, "dead": 0}] * 2}
    line["expert_load"][3] = {"max_over_mean": 9.0, "dead": 2}
    before = frame(run, width=60, height=60)
    append(run, "metrics.jsonl", logged(52, **line))
    after = frame(run, width=60, height=60)
    last = [re.search(rf"^│ L{layer} +(\S+) +│", after, re.MULTILINE) for layer in (1, 3, 5, 7)]
    assert [found and found[1][-1] for found in last] == ["·", "·", "█", "x"]
    assert "experts without a token: 2 in layer 7" in after and "busiest expert gets 9.0 times" in after
    assert "no alarms" in before and "no alarms" not in after


def test_the_states_of_a_run(tmp_path, run, monkeypatch):
    watched = WatchedRun(run)
    watched.poll()
    assert watched.state is RunState.running
    later = time.time() + 300
    monkeypatch.setattr("launch.watch.run.time.time", lambda: later)
    assert watched.state is RunState.silent and "wrote nothing for 5:" in frame(run)
    (run / "summary.json").write_text('{"steps": 20}')
    watched.poll()
    assert watched.state is RunState.silent, "the summary is older than an added phase"
    (run / "summary.json").write_text('{"steps": 60}')
    watched.poll()
    assert watched.state is RunState.finished
    (run / DIVERGED).write_text('{"step": 52, "reason": "the loss after step 52 is nan"}')
    assert "diverged first" in (text := frame(run)) and "! diverged: the loss after step 52 is nan" in text
    (run / DIVERGED).write_text('{"step": 20, "reason": "x"}')
    assert "finished first" in frame(run), "the run has been mended since"


def test_a_run_that_appears_later(tmp_path):
    watched = WatchedRun(tmp_path / "later")
    watched.poll()
    assert watched.state is RunState.missing and "no such directory yet" in frame(tmp_path / "later")
    (tmp_path / "later").mkdir()
    assert "no step logged yet" in frame(tmp_path / "later")
    (tmp_path / "later" / ".lock").touch()
    WatchedRun(tmp_path / "later")
    (tmp_path / "later" / ".lock").unlink()
    (tmp_path / "later").rmdir()
    make_running(tmp_path / "later")
    watched.poll()
    assert watched.step == 50 and watched.steps == 60 and watched.layers == [1, 3, 5, 7]


def test_a_resumed_run_goes_back(run):
    """On resume, metrics.jsonl is replaced by its lines up to the checkpoint. A rewind may also append older steps."""
    watched = WatchedRun(run)
    watched.poll()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "new").write_text("".join(lines[:10]))
    os.replace(run / "new", run / "metrics.jsonl")
    watched.poll()
    assert watched.step == 20 and len(watched.loads) == 10 and watched.held_out.points == []
    append(run, "metrics.jsonl", logged(22), logged(24), logged(22, loss=3.0))
    watched.poll()
    assert watched.step == 22 and [point.last for point in watched.curves["loss"].points][-2:] == [20, 22]
    assert watched.curves["loss"].value == 3.0
    (run / "new").write_text("")
    os.replace(run / "new", run / "metrics.jsonl")
    watched.poll()
    assert watched.step == 0 and not watched.loads and not watched.curves["loss"].points, "it starts over"


def test_a_jump_of_the_loss_is_an_alarm_and_its_end_is_told(run):
    append(run, "metrics.jsonl", logged(52, loss=9.0))
    watched = WatchedRun(run)
    watched.poll()
    assert watched.alarms() == ["the loss jumped from about 4.95 to 9.00 at step 52"]
    append(run, "metrics.jsonl", logged(54, loss=4.5))
    watched.poll()
    assert watched.alarms() == ["the loss jumped from about 4.95 to 9.00 at step 52, and was back at step 54"]
    append(run, "metrics.jsonl", logged(40, loss=4.5))
    watched.poll()
    assert watched.alarms() == [], "a rewind"


def test_values_that_are_no_numbers(run):
    line = json.dumps(logged(52, tokens_per_second="fast", gradient_norm=10**400, expert_load=[{}], slow_ranks="all"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            line.replace("4.0", "NaN", 1) + "\n" + json.dumps(logged(-1)) + "\n" + json.dumps(logged("5")) + "\n"
        )
    text = frame(run)
    assert "! the loss at step 52 is NaN or infinite" in text and "damaged lines ignored: 2" in text
    assert "gradient norm         -" not in text, "a value that is unknown has no row"


HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/] \u202ecod.exe \x9b31m\udc80 :warning:"


def hostile_run(tmp_path):
    run = make_running(tmp_path / f"a[red]{HOSTILE[:9]}")
    event = {key: HOSTILE for key in EVENT} | {"statistics": {HOSTILE: [HOSTILE, {HOSTILE: None}]}, "step": HOSTILE}
    append(run, "recovery.jsonl", event, {"event": [[[["x"] * 50] * 50] * 50], "time": 1e30, "step": True})
    append(run, "metrics.jsonl", logged(52, slow_ranks=[{"rank": HOSTILE, "host": HOSTILE}, 3]))
    (run / "log.txt").write_bytes(HOSTILE.encode(errors="surrogateescape") * 3 + b"\n")
    (run / DIVERGED).write_text(json.dumps({"step": 52, "reason": HOSTILE}))
    return run


def test_no_escape_of_a_file_reaches_the_terminal(tmp_path):
    run = hostile_run(tmp_path)
    for runs in ([run], [run, run]):
        view = viewed(*runs, jobs={str(run): HOSTILE}, note=HOSTILE)
        text = plain_frame(view, 150, 60)
        assert not set(text) & set("\x1b\x07\x9b\u202e\udc80") and "\\x1b" in text and "[bold red]x[/]" in text
        out = StringIO()
        console = Console(file=out, width=150, height=60, force_terminal=True, color_system="truecolor")
        console.print(view.frame(150, 60))
        coloured = out.getvalue()
        assert "\x1b[" in coloured, "control: colours are there"
        assert not set(re.sub(r"\x1b\[[\d;]*m", "", coloured)) & set("\x1b\x07\x9b\u202e\udc80")


def test_the_check_of_escapes_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.watch.view.printable", str)
    text = plain_frame(viewed(hostile_run(tmp_path)), 150, 60)
    assert "\x1b" in text


@pytest.mark.parametrize(
    "file",
    [
        "metrics.jsonl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("config.yaml", "summary.json", "log.txt", DIVERGED, "recovery.jsonl")
        ),
    ],
)
def test_damaged_files_are_named_or_left_out(run, file, monkeypatch):
    if file == "config.yaml":
        monkeypatch.setattr("launch.watch.run.load_config", load_config)
    append(run, "recovery.jsonl", EVENT)
    whole = (run / file).read_bytes() if (run / file).exists() else b'{"steps": 20, "step": 1}'
    noticed = 0
    for damage in DAMAGES.values():
        damage(run / file)
        text = frame(run)
        assert "first" in text and len(text.splitlines()) == 40
        noticed += f"! {file}" in text
        cleared(run / file).write_bytes(whole)
    assert noticed > 3 or file == "log.txt"
    assert f"! {file}" not in frame(run), "control"


def test_a_terminal_without_unicode_gets_ascii(run):
    append(run, "metrics.jsonl", logged(52))
    text = plain_frame(viewed(run), 120, 40, encoding="ascii")
    assert text.isascii() and "step 52 of 60" in text and "1" in text
    assert not plain_frame(viewed(run), 120, 40).isascii(), "control"


def test_several_runs_side_by_side(tmp_path, run):
    other = make_run(tmp_path / "second", "model=smoke", loss=lambda step: 6 - step / 20)
    view = viewed(run, other, tmp_path / "third", jobs={str(run): "job 17 RUNNING"})
    text = plain_frame(view, 140, 45)
    assert "3 runs: 1 running, 1 finished, 1 no such directory yet" in text
    assert re.search(r"> +1 +first +running +50 of 60 +4.5000 +4.2500 +7,000 .* job 17 RUNNING", text)
    assert re.search(r"2 +second +finished +60 of 60 +3.0000", text)
    plotted = "".join(line[10:] for line in text.splitlines() if "┤" in line)
    assert "1" in plotted and "2" in plotted, "curves differ without colours"
    assert view.press("down") and re.search("^> +2 +second", plain_frame(view, 140, 45), re.MULTILINE)
    assert "mean, second" in plain_frame(view, 140, 45)
    assert view.press("1") and "running first" in plain_frame(view, 140, 45)
    assert view.press("enter") and "3 runs" in plain_frame(view, 140, 45)
    assert view.press("z") and "its last half" in plain_frame(view, 140, 45)
    assert view.press("7") and view.press("?") and "3 runs" in plain_frame(view, 140, 45)
    assert not view.press("q")


def test_more_runs_than_lines(tmp_path, run):
    view = viewed(*[run] * 40)
    for _ in range(35):
        view.press("down")
    text = plain_frame(view, 140, 45)
    rows = re.findall(r"^(>?) +\w +first +running", text, re.MULTILINE)
    assert "40 runs" in text and len(text.splitlines()) == 45 and len(rows) == 15 and rows.count(">") == 1


def test_times_and_events_are_for_people():
    assert [duration(s) for s in (42, 3700, 200_000, float("nan"))] == ["0:42", "1 h 01 min", "2 d 7 h", "-"]
    assert describe({}) == "-: " and describe(EVENT).endswith("; verdict: data; action: rewind to step 20")
