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

LAYERS = 2
LOADS = [{"max_over_mean": 1.5, "entropy": 0.9, "dead": 0}] * LAYERS
STEP = {"step": 2, "tokens": 4096, "loss": 4.0, "learning_rate": 1e-3, "gradient_norm": 0.5, "mfu": None}
STEP |= {"router_z": [0.5] * LAYERS, "router_entropy": [0.9] * LAYERS, "expert_load": LOADS}


def with_lines(*lines: dict):
    """Append lines to the metrics."""

    def change(directory: Path) -> None:
        with open(directory / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    return change


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


LINES = [
    {"step": "sixty"},
    {"step": 62.5},
    {"step": 0},
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
    {"loss_by_modality": 4.0},
    {"loss_by_modality": {"images": "low"}},
    {"expert_load_by_modality": []},
    {"expert_load_by_modality": {"images": LOADS[:1]}},
    {"expert_overlap": [0.5]},
]
EVALUATIONS = [
    {"heldout_loss": "low", "heldout": {}},
    {"heldout_loss": 4.0, "heldout": 4.0},
    {"heldout_loss": 4.0, "heldout": {"code": 4.0}},
    {"heldout_loss": 4.0, "heldout": {"code": {"loss": None}}},
    {"heldout_loss": 4.0, "heldout_by_modality": {"images": 4.0}},
    {"heldout_loss": 4.0, "answers": {"scenes": {"documents": 3, "own": 0.5}}},
]


@pytest.fixture
def kept(tmp_path, undrawn) -> Path:
    return make_run(tmp_path / "run")


def warnings(run: Path) -> str:
    return "\n".join(re.findall(r"<li>(.*?)</li>", (run / "report.html").read_text()))


@pytest.mark.parametrize("changed", LINES + EVALUATIONS, ids=lambda changed: str(changed)[:50])
def test_a_damaged_line_is_left_out(tmp_path, changed):
    sound = [STEP, {"step": 2, "heldout_loss": 4.0, "heldout": {"code": {"loss": 4.0}}}, {"of": "another kind"}]
    with_lines(*sound)(tmp_path)
    files = RunFiles(tmp_path)
    assert files.metrics(LAYERS) == ([STEP], sound[1:2]) and files.problems == {}, "control"
    with_lines({"step": 3, **changed} if "heldout_loss" in changed else {**STEP, "step": 3, **changed})(tmp_path)
    assert files.metrics(LAYERS) == ([STEP], sound[1:2])
    assert files.problems == {"metrics.jsonl": "1 of 4 lines is damaged and left out"}


@pytest.mark.parametrize("text", ["[1]", "null", "x", "[" * 100_000, "9" * 5000, '{"step": 1', "\x00"], ids=len)
def test_a_line_that_is_no_object_is_left_out(tmp_path, text):
    with_lines(STEP)(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(text)
    files = RunFiles(tmp_path)
    assert files.metrics(LAYERS) == ([STEP], []) and files.problems == {}, "the run is writing the last line"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n")
    assert files.metrics(LAYERS) == ([STEP], []) and "1 of 2 lines is damaged" in files.problems["metrics.jsonl"]


def test_the_last_line_of_a_step_counts(tmp_path):
    with_lines({**STEP, "step": 4}, STEP, {**STEP, "loss": 3.0}, {**STEP, "mfu": "x", "step": 6})(tmp_path)
    steps, _ = RunFiles(tmp_path).metrics(LAYERS)
    assert [(line["step"], line["loss"]) for line in steps] == [(2, 3.0), (4, 4.0), (6, 4.0)]


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
def test_a_damaged_file_is_left_out(tmp_path, damage, warning):
    (tmp_path / "summary.json").write_text('{"steps": 60, "heldout_loss": 4.0, "heldout": null}')
    (tmp_path / "log.txt").write_text("a line\n")
    files = RunFiles(tmp_path)
    assert files.summary()["heldout_loss"] == 4.0 and files.log() == ["a line"] and files.problems == {}, "control"
    damage(tmp_path)
    summary, log = files.summary(), files.log()
    (problem,) = (f"{name}: {text}" for name, text in files.problems.items())
    assert warning in problem
    assert log == ([] if "log.txt" in warning else ["a line"])
    wrong = problem.partition("left out: ")[2].split(", ")
    assert not set(wrong) & set(summary) and ("left out: " not in problem or summary["steps"] == 60)


def test_missing_files_are_no_damage(tmp_path):
    files = RunFiles(tmp_path)
    assert (files.summary(), files.log(), files.metrics(LAYERS), files.problems) == ({}, [], ([], []), {})


@pytest.mark.parametrize(
    "damages, wanted",
    [
        ([], []),
        ([with_summary(total_parameters=1.5, heldout=None, peak_memory_bytes=None)], []),
        ([with_summary(heldout={}), lambda d: (d / "log.txt").unlink()], []),
        (
            [with_text("summary.json", ""), with_lines({"step": "x", "loss": 1}), with_folder("log.txt")],
            ["metrics.jsonl: 1 of 33 lines", "summary.json: cannot be read (is not JSON", "log.txt: cannot be read"],
        ),
        ([with_summary(heldout=[], world_size="x")], ["summary.json: damaged values are left out: world_size, held"]),
    ],
)
def test_the_page_says_what_is_left_out(kept, capsys, damages, wanted):
    for damage in damages:
        damage(kept)
    assert main(["report", str(kept)]) == 0
    assert capsys.readouterr().err == ""
    found = warnings(kept).splitlines()
    assert len(found) == len(wanted) and all(part in text for part, text in zip(wanted, found, strict=True))


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


def test_pictures_are_drawn_of_what_is_left(tmp_path, recwarn):
    run = make_run(tmp_path / "run", steps=6)
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    more = {"step": 7, "gradient_norm": 0.0}, {"step": 8, "mfu": "x", "learning_rate": None, "peak_memory_bytes": None}
    with_lines(*(step | changed for changed in [*LINES, *more]), {"step": 6, "heldout_loss": 3.0})(run)
    assert main(["report", str(run)]) == 0
    assert warnings(run).startswith(f"metrics.jsonl: {len(LINES)} of ")
    assert len(list((run / "plots").iterdir())) == 10
    # files that earlier tests left open are reported whenever Python collects them
    assert [str(one) for one in recwarn if one.category is not ResourceWarning] == []
