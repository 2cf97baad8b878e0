"""`evaluate suite=`: what can be known at the start is refused there, and results are shown even if no file takes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.cli import main
from tests.support.tiny import config
from tests.train.exam.test_exam_ask import Model
from train.run_directory import EVALUATIONS, write_config

ROOTS = "+suite.exams.roots={exam: quadratics, options: {number: 2, shots: 1}}"


class Opened(Model):
    fingerprint, step = "0" * 64, 1


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Return the directory of a run, whose model is a stub that answers at once."""
    path = tmp_path / "run"
    path.mkdir()
    write_config(path / "config.yaml", config(tmp_path, "run"))
    monkeypatch.setattr("train.eval.open_model.open_scoring_model", lambda *given: Opened(999, "no"))
    return path


def words(run: Path, *more: str) -> list[str]:
    return ["evaluate", str(run), "suite=own", ROOTS, "search_tokens=0", *more]


def test_mistakes_are_refused_before_the_model_opens(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    assert main(words(run, f"out={out}")) == 0 and main(words(run, f"against={out}")) == 0, "control"
    assert "p_value" in capsys.readouterr().out
    monkeypatch.setattr("train.eval.open_model.open_scoring_model", lambda *given: pytest.fail("is opened"))
    (tmp_path / "empty.txt").touch()
    others = [word.replace("number: 2", "number: 3") for word in words(run, f"against={out}")]
    searched = [*words(run)[:-1], f"corpus={tmp_path / 'empty.txt'}"]
    for line, reason in ((others, "against: roots: asks other questions"), (searched, "has no text in which to look")):
        assert main(line) == 2 and reason in capsys.readouterr().err
    (run / EVALUATIONS).unlink()
    (run / EVALUATIONS).mkdir()
    assert main(words(run)) == 2
    assert re.search(r"run=.*evaluations\.jsonl: is a folder, but must be a file", capsys.readouterr().err)


def test_results_are_shown_and_kept_if_a_file_takes_none(run, tmp_path, capsys, monkeypatch):
    def full(path: Path, line: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.files.append_json_line", full)
    assert main(words(run, f"out={tmp_path / 'out.json'}")) == 1
    found = capsys.readouterr()
    assert "could not be written to" in found.err and "(No space left on device)" in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert json.loads(found.out)["exams"]["roots"]["questions"] == 2
    assert len(json.loads((tmp_path / "out.json").read_text())["exams"]["roots"]["answers"]) == 2
