"""Damaged files of a run: the report leaves the damaged part out and says so, or the command prints one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from tests.train.report.runs import make_run
from train.report.files import RunFiles
from train.report.run import RunData


def with_line(directory: Path, **changed) -> None:
    """Append a logged step like the last one, with some values changed."""
    last = next(line for line in reversed(RunFiles(directory).metrics(2)[0]))
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last | changed) + "\n")


def with_text(name: str, text: str | bytes):
    return lambda d: (d / name).write_bytes(text.encode() if isinstance(text, str) else text)


def with_folder(name: str):
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return change


def with_pipe(name: str):
    def change(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return change


def with_summary(**changed):
    def change(directory: Path) -> None:
        summary = json.loads((directory / "summary.json").read_text())
        (directory / "summary.json").write_text(json.dumps(summary | changed))

    return change


LOADS = [{"max_over_mean": 1.5, "entropy": 0.9, "dead": 0}] * 2
LINES = [
    {"step": "sixty"},
    {"step": 62.5},
    {"step": -1},
    {"step": True},
    {"step": 10**400},
    {"step": None},
    {"tokens": None},
    {"loss": None},
    {"loss": float("nan")},
    {"loss": float("inf")},
    {"loss": {"mean": [4.0]}},
    {"loss": "4.5"},
    {"learning_rate": "fast"},
    {"gradient_norm": [0.5]},
    {"tokens_per_second": {}},
    {"peak_memory_bytes": float("nan")},
    {"expert_load": None},
    {"expert_load": 3},
    {"expert_load": LOADS[:1]},
    {"expert_load": [[], []]},
    {"expert_load": [{**LOADS[0], "dead": None}] * 2},
    {"router_z": [0.5]},
    {"router_z": "high"},
    {"router_entropy": [None, 0.5]},
]
EVALUATIONS = [
    {"heldout_loss": "low", "heldout": {}},
    {"heldout_loss": 4.0, "heldout": 4.0},
    {"heldout_loss": 4.0, "heldout": {"code": 4.0}},
    {"heldout_loss": 4.0, "heldout": {"code": {"loss": None}}},
]


@pytest.fixture
def kept(tmp_path, undrawn) -> Path:
    return make_run(tmp_path / "run")


def report(run: Path, capsys) -> str:
    """Run the verb, which must succeed without a word on stderr, and return the page's warnings."""
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().err == ""
    return "\n".join(re.findall(r"<li>(.*?)</li>", (run / "report.html").read_text()))


def test_sound_files_give_no_warning(kept, capsys):
    """Control for the tests below."""
    with_line(kept, step=60, loss=4.0)
    assert report(kept, capsys) == "" and RunData(kept).lines[-1]["loss"] == 4.0


@pytest.mark.parametrize("changed", LINES + EVALUATIONS, ids=str)
def test_a_damaged_line_is_left_out(kept, capsys, changed):
    if "heldout_loss" in changed:
        with open(kept / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 60, **changed}) + "\n")
    else:
        with_line(kept, **changed)
    assert report(kept, capsys) == "metrics.jsonl: 1 of 33 lines is damaged and left out."


@pytest.mark.parametrize("text", ["[1]", "null", "x", "[" * 100_000, "9" * 5000, '{"step": 1', "\x00"], ids=len)
def test_a_line_that_is_no_object_is_left_out(kept, capsys, text):
    with open(kept / "metrics.jsonl", "a") as file:
        file.write(text + "\n")
    assert report(kept, capsys) == "metrics.jsonl: 1 of 33 lines is damaged and left out."


@pytest.mark.parametrize(
    "damage, warning",
    [
        (with_text("summary.json", ""), "summary.json: cannot be read (is not JSON"),
        (with_text("summary.json", '{"steps": 60, "held'), "summary.json: cannot be read (is not JSON"),
        (with_text("summary.json", b"\xff\xfe"), "summary.json: cannot be read (is not UTF-8"),
        (with_text("summary.json", "[" * 100_000), "summary.json: cannot be read (is nested too deeply"),
        (with_text("summary.json", "[]"), "summary.json: holds no keys"),
        (with_folder("summary.json"), "summary.json: cannot be read (is a folder"),
        (with_pipe("summary.json"), "summary.json: cannot be read (is a named pipe"),
        (with_summary(bigram_loss="high"), "summary.json: damaged values are left out: bigram_loss"),
        (with_summary(heldout_loss=float("nan")), "damaged values are left out: heldout_loss"),
        (with_summary(world_size=[1], total_parameters={}), "left out: total_parameters, world_size"),
        (with_summary(heldout=[]), "left out: heldout"),
        (with_summary(heldout={"sources": {"code": "x"}}), "left out: heldout"),
        (with_summary(heldout={"sources": {}, "bits_per_byte": "x"}), "left out: heldout"),
        (with_folder("log.txt"), "log.txt: cannot be read (is not a file)"),
        (with_pipe("log.txt"), "log.txt: cannot be read (is not a file)"),
    ],
)
def test_a_damaged_file_is_left_out(kept, capsys, damage, warning):
    damage(kept)
    found = report(kept, capsys)
    assert warning in found and "\n" not in found


@pytest.mark.parametrize(
    "changed", [{"total_parameters": 1.5}, {"heldout": None}, {"heldout": {}}, {"peak_memory_bytes": None}], ids=str
)
def test_figures_may_be_missing_or_fractions(kept, capsys, changed):
    with_summary(**changed)(kept)
    assert report(kept, capsys) == ""


def test_a_missing_summary_or_log_is_no_damage(kept, capsys):
    for name in ("summary.json", "log.txt"):
        (kept / name).unlink()
    assert report(kept, capsys) == ""


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no such directory"),
        (lambda d: (shutil.rmtree(d), d.write_text("")), "is a file, but must be a run's directory"),
        (lambda d: (d / "config.yaml").unlink(), "no run there: its config.yaml is missing"),
        (with_text("config.yaml", ""), "has no keys"),
        (with_text("config.yaml", "a: [1"), "config.yaml"),
        (with_text("config.yaml", b"\xff"), "is not UTF-8"),
        (with_text("config.yaml", "training: {steps: many}"), "config.yaml has a damaged value, training.steps"),
        (with_folder("config.yaml"), "is a folder, but must be a file"),
        (with_text("metrics.jsonl", ""), "has logged no step yet"),
        (with_text("metrics.jsonl", "x\n" * 3), "metrics.jsonl: 3 of 3 lines are damaged"),
        (with_folder("metrics.jsonl"), "metrics.jsonl: cannot be read (is not a file)"),
        (with_pipe("metrics.jsonl"), "metrics.jsonl: cannot be read (is not a file)"),
        (with_folder("report.html"), "is a folder; name a file"),
    ],
)
def test_without_a_run_the_command_prints_one_line(kept, capsys, damage, message):
    damage(kept)
    assert main(["report", str(kept)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(kept) in line


def test_a_read_only_run_is_reported_elsewhere(kept, capsys, monkeypatch):
    """The tests may run as root, who can write everywhere: writing fails by a stand-in."""

    def refused(path, content):
        if path.is_relative_to(kept):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        path.write_text(content)

    monkeypatch.setattr("train.report.page.write_text", refused)
    assert main(["report", str(kept)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "report.html: the file system is read-only; write elsewhere" in line
    assert main(["report", str(kept), f"out={kept.parent / 'page.html'}"]) == 0
    (kept / "plots").rmdir()
    (kept / "plots").write_text("")
    assert main(["report", str(kept)]) == 1
    assert "plots: exists already" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["runs=[null]"], ["runs=3"], ["~nobody-of-that-name/x"], ["x\0y"], ["/"]], ids=repr)
def test_wrong_names_of_runs_are_one_line(tmp_path, capsys, words):
    assert main(["report", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pictures_are_drawn_of_what_is_left(tmp_path, capsys, recwarn):
    run = make_run(tmp_path / "run", steps=6)
    for changed in [*LINES, {"step": 7, "gradient_norm": 0.0}, {"step": 8, "mfu": "x", "learning_rate": None}]:
        with_line(run, **changed)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "heldout_loss": 3.0}\n')
    assert report(run, capsys).startswith(f"metrics.jsonl: {len(LINES)} of ")
    assert len(list((run / "plots").iterdir())) == 10 and not recwarn.list
