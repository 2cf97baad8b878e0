"""A report of several runs: what differs between their configurations, and plots of MoE layers on one scale."""

from __future__ import annotations

import json
import re

import pytest

from tests.train.report.runs import make_run
from train.report import plots
from train.report.page import _compared, write_report
from train.report.run import RunData


def table(text: str) -> dict[str, list[str]]:
    """Return the table of differences in a page."""
    section = text.partition("Differences between")[2].partition("<details>")[0]
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", section)
    return {key: re.findall(r"<td>(.*?)</td>", values) for key, values in rows}


def page_of(*runs) -> str:
    out = runs[0].parent / "page.html"
    write_report(runs, out)
    return out.read_text()


def test_the_table_has_what_the_user_changed(tmp_path, undrawn):
    source = "'+data.sources.v1.5={kind: files, path: /x, weight: 0.5}'".strip("'")
    first = make_run(tmp_path / "first", "run.name=first")
    second = make_run(tmp_path / "second", "run.name=second", "optimizer.lr=0.5", "launch=torchrun", "run.root=/else")
    third = make_run(tmp_path / "third", "run.name=third", source.replace("v1.5", "other"), "run.seed=5")
    text = page_of(first, second, third)
    rows = table(text)
    assert rows.pop("data.sources.other")[:2] == ["-", "-"]
    assert rows.pop("optimizer.lr")[1] == "0.5" and rows.pop("run.seed")[2] == "5"
    assert rows == {}, "names, folders, the launch and derived values are left out"
    assert "derived values differ" in text and "optimizer.transferred.roles" in text
    assert RunData(second).config.launch and RunData(second).config.run.root == "/else", "control"


def test_equal_configurations_have_no_table(tmp_path, undrawn):
    runs = [make_run(tmp_path / name, f"run.name={name}") for name in ("first", "second")]
    assert "None, except for the names" in (text := page_of(*runs)) and table(text) == {}
    assert "Differences between" not in page_of(runs[0])


def test_values_are_found_under_keys_with_dots():
    first = {"a": {"v1.5": {"weight": 1.0}, "v2": None}, "b": [1, None]}
    second = {"a": {"v1.5": {"weight": 2.0}}, "b": [1, True]}
    third = {"a": {}, "b": [1, None]}
    assert _compared([first, second, third]) == {
        "a.v1.5.weight": ["1.0", "2.0", "-"],
        "b": ["[1, null]", "[1, true]", "[1, null]"],
        "a.v1.5": ['{"weight": 1.0}', '{"weight": 2.0}', "-"],
    }


def test_runs_of_one_name_are_told_apart(tmp_path, undrawn):
    runs = [make_run(tmp_path / folder / "run") for folder in ("a", "b")]
    text = page_of(*runs)
    assert all(f"<th>{run}</th>" in text for run in runs)
    assert "run.name=run-again" in text


@pytest.fixture
def drawn(monkeypatch):
    """Record the figures that are drawn, instead of the time that their PNG takes."""
    figures = {}
    monkeypatch.setattr(plots, "png", lambda figure: figures.setdefault(len(figures), figure) and b"")
    return figures


def test_layer_plots_of_several_runs_have_one_scale(tmp_path, drawn):
    dense = make_run(tmp_path / "dense", "model.moe_every=0", steps=6)
    even, uneven = make_run(tmp_path / "even", steps=6), make_run(tmp_path / "uneven", steps=6, max_over_mean=9.0)
    pictures = plots.draw([RunData(run) for run in (dense, even, uneven)])
    assert [picture.name for picture in pictures[5:8]] == ["expert_load_2", "expert_load_3", "router_entropy_2"]
    assert [picture.first for picture in pictures[4:9]] == [False, True, False, True, False]
    assert not any(picture.wide for picture in pictures[5:])
    for place, wanted in ((5, (1.0, 9.0)), (6, (1.0, 9.0))):
        (image,) = drawn[place].axes[0].collections
        assert image.get_clim() == wanted
    limits = [drawn[place].axes[0].get_ylim() for place in range(7, 15)]
    assert limits[::2] == limits[1::2]
    drawn.clear()
    plots.draw([RunData(even)])
    assert drawn[5].axes[0].collections[0].get_clim() == (1.0, 2.0), "control: alone it has a scale of its own"


@pytest.mark.parametrize("last", [1, 2, 3, 7, 60, 1_500_000])
def test_axes_of_steps_have_whole_numbers(tmp_path, drawn, last):
    run = make_run(tmp_path / "run", steps=2)
    step, held_out = map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[:2])
    steps = sorted({1, last // 2 or 1, last})
    lines = [line | {"step": one} for one in steps for line in (step, held_out)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.draw([RunData(run)])
    assert len(drawn) == 10
    for figure in drawn.values():
        axes = figure.axes[0]
        figure.draw_without_rendering()
        low, high = axes.get_xlim()
        labels = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert labels and labels == [f"{int(text.replace(',', '')):,}" for text in labels]
        assert len(set(labels)) == len(labels) and axes.xaxis.get_offset_text().get_text() == ""


def test_default_ticks_would_be_halves(tmp_path, drawn, monkeypatch):
    """Control for the test above."""
    from matplotlib import ticker

    monkeypatch.setattr(ticker, "MaxNLocator", lambda *_, **__: ticker.AutoLocator())
    plots.draw([RunData(make_run(tmp_path / "run", steps=4))])
    assert any(place % 1 for place in drawn[0].axes[0].get_xticks())


def test_the_last_scores_of_examinations_are_listed(tmp_path, undrawn):
    """Damaged lines are skipped, and scores of different questions are not compared."""
    runs = [make_run(tmp_path / name, f"run.name={name}") for name in ("first", "second")]
    result = {"fingerprint": "a" * 64, "score": 0.5, "interval": [0.25, 0.75]}
    for run, last in zip(runs, ({"score": 0.75}, {"score": 1.0, "fingerprint": "b" * 64}), strict=True):
        lines = [{"suite": "smoke", "exams": {"lists": one}} for one in (result, {**result, **last})]
        wrong = [
            {"suite": "smoke", "exams": {"lists": {**result, **one}}} for one in ({"score": "1"}, {"interval": []})
        ]
        (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, [*lines, *wrong, {"suite": 3}])) + '\n{"sui')
    found = re.findall(r"<tr><td>examination (.*?), 95% interval</td>(.*?)</tr>", page_of(*runs))
    assert [(label, re.findall(r">([^<]+)<", values)) for label, values in found] == [
        ("smoke/lists (aaaaaaaa)", ["0.750 (0.250 to 0.750)", "0.500 (0.250 to 0.750)"]),
        ("smoke/lists (bbbbbbbb)", ["-", "1.000 (0.250 to 0.750)"]),
    ]
    (runs[0] / "evaluations.jsonl").unlink()
    (runs[0] / "evaluations.jsonl").mkdir()
    assert RunData(runs[0]).examinations == {} and "evaluations.jsonl" in RunData(runs[0]).problems


def test_scores_are_drawn_by_step_with_their_intervals(tmp_path, drawn):
    """The last score of a step counts, a score without a step is not drawn, and damaged ones are left out and named."""
    run = make_run(tmp_path / "run")
    beside = {"status": "searched", "found": 1, "clean": 3, "too_short": 0, "score_found": 1.0, "score_clean": 0.25}
    lines = []
    for step, score in ((20, 0.1), (10, 0.25), (20, 0.5), (None, 1.0), (30, 7.0), (-1, 0.5)):
        one = {"fingerprint": "a" * 64, "score": score, "interval": [0.0, min(score + 0.1, 1.0)]}
        exams = {"lists": {**one, "contamination": beside}, "choices": {**one, "contamination": {"found": "x"}}}
        lines.append({"suite": "smoke", "step": step, "exams": exams})
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = RunData(run)
    pictures = {one.title: place for place, one in enumerate(plots.draw([data]))}
    (axes,) = drawn[pictures["Examination smoke/lists (aaaaaaaa)"]].axes
    score, clean = axes.get_lines()
    assert (list(score.get_xdata()), list(score.get_ydata())) == ([10, 20], [0.25, 0.5])
    assert list(clean.get_ydata()) == [0.25, 0.25]
    bars = axes.collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(0.0, 0.35), (0.0, 0.6)]
    (axes,) = drawn[pictures["Examination smoke/choices (aaaaaaaa)"]].axes
    assert len(axes.get_lines()) == 1, "control: nothing is known of these questions"
    assert data.problems["evaluations.jsonl"] == "scores that are no numbers from 0 to 1 are left out"
    text = str(data.examinations["smoke/lists (aaaaaaaa)"][-1])
    assert text.startswith("1.000 (0.000 to 1.000; 1 of 4 questions in training text, score on these 1.000, on")
    (run / "evaluations.jsonl").unlink()
    assert not any("Examination" in one.title for one in plots.draw([RunData(run)])), "control"
