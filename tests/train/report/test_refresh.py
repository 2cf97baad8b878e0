"""A report that is written again and again until its run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from tests.train.report.runs import make_run
from train.report import refresh
from train.report.page import write_report
from train.report.run import RunData
from train.run_directory import DIVERGED

TAG = '<meta http-equiv="refresh" content="30">'


@pytest.fixture
def running(tmp_path, undrawn) -> Path:
    """A run that has not ended: its last three lines and its summary are not there yet."""
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-3]))
    (run / "summary.json").rename(run / "later")
    return run


def during_waits(monkeypatch, *changes) -> list[str]:
    """Replace each wait by the next change to the run. Return a list that gets the page before each."""
    pages: list[str] = []
    left = list(changes)

    def wait(seconds, interruption) -> None:
        assert seconds == 30
        pages.append(left[0](interruption) or "")
        left.pop(0)

    monkeypatch.setattr(refresh, "_wait", wait)
    return pages


def test_the_page_refreshes_until_the_run_ends(running, monkeypatch, capsys):
    page, pages = running / "report.html", []

    def log_a_step(_) -> None:
        pages.append(page.read_text())
        with open(running / "metrics.jsonl", "a") as file:
            file.write('{"step": 58, "tokens": 118784, "loss": 2.125}\n')

    def end(_) -> None:
        pages.append(page.read_text())
        (running / "later").rename(running / "summary.json")

    during_waits(monkeypatch, log_a_step, end)
    assert main(["report", str(running), "refresh=30"]) == 0
    assert [TAG in text for text in (*pages, page.read_text())] == [True, True, False]
    assert ["2.1250" in text for text in pages] == [False, False] or "58" in pages[1]
    assert "12,345,678" in page.read_text() and "12,345,678" not in pages[1]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "every 30 s" in out[0] and out[1] == f"report: {page}"


def test_only_unfinished_runs_are_followed(running, monkeypatch):
    during_waits(monkeypatch)  # a wait would fail
    (running / DIVERGED).write_text("{}")
    assert main(["report", str(running), "refresh=30"]) == 0
    assert TAG not in (text := (running / "report.html").read_text()) and "The run diverged" in text
    (running / DIVERGED).unlink()
    assert not RunData(running).ended, "control"
    (running / "summary.json").write_text('{"steps": 20}')
    assert not RunData(running).ended, "the summary is older than an added phase"
    (running / "summary.json").write_text("damaged")
    assert main(["report", str(running), "refresh=30"]) == 0


def test_without_refresh_the_page_has_no_tag(running):
    assert main(["report", str(running)]) == 0
    assert TAG not in (running / "report.html").read_text()


def test_two_runs_are_followed_until_both_end(running, monkeypatch, tmp_path):
    other, out = make_run(tmp_path / "other"), tmp_path / "both.html"
    during_waits(monkeypatch, lambda _: (running / "later").rename(running / "summary.json") and "")
    assert main(["report", str(running), str(other), f"out={out}", "refresh=30"]) == 0
    assert not (running / "later").exists() and TAG not in out.read_text()


def test_an_interruption_leaves_a_page_without_refresh(running, monkeypatch, capsys):
    during_waits(monkeypatch, lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["report", str(running), "refresh=30"]) == 130
    assert TAG not in (running / "report.html").read_text()
    assert capsys.readouterr().err == ""


def test_the_first_logged_step_is_waited_for(running, monkeypatch, capsys):
    lines = (running / "metrics.jsonl").read_text()
    (running / "metrics.jsonl").unlink()
    assert main(["report", str(running)]) == 2, "control: without refresh there is nothing to write"
    capsys.readouterr()

    def end(_) -> None:
        (running / "metrics.jsonl").write_text(lines)
        (running / DIVERGED).write_text("{}")

    during_waits(monkeypatch, lambda _: None, end)
    assert main(["report", str(running), "refresh=30"]) == 0
    assert "waits, because" in (out := capsys.readouterr().out) and len(out.splitlines()) == 2
    (running / "metrics.jsonl").unlink()
    assert main(["report", str(running), "refresh=30"]) == 2, "no step will follow"
    assert "diverged before it logged a step" in capsys.readouterr().err


def test_a_wait_ends_at_an_interruption():
    with refresh.SignalFlag() as interruption:
        began = time.monotonic()
        refresh._wait(0, interruption)
        signal.raise_signal(signal.SIGTERM)
        refresh._wait(60, interruption)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "often", "true", "[30]", "1e400", str(10**400), "86401"])
def test_other_times_are_refused(running, capsys, value):
    assert main(["report", str(running), f"refresh={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "refresh" in line and not (running / "report.html").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_real_command(tmp_path):
    run = make_run(tmp_path / "run", "model.moe_every=0")
    (run / "summary.json").unlink()
    command = [str(Path(sys.executable).parent / "leviathan"), "report", str(run), "refresh=30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "Ctrl-C ends it" in process.stdout.readline()
        assert TAG in (run / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == 130
    assert TAG not in (run / "report.html").read_text()


def test_a_failed_write_leaves_the_old_page(running, monkeypatch):
    write_report([running], running / "report.html")
    before = (running / "report.html").read_text()
    monkeypatch.setattr("core.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        write_report([running], running / "report.html", refresh=30)
    assert (running / "report.html").read_text() == before
    assert not [path for path in running.iterdir() if path.suffix == ".tmp"]


def test_ctrl_c_while_a_page_is_written_makes_another(tmp_path, monkeypatch):
    """Else the last page would load itself again for ever."""
    written = []

    def write(directories, out, again):
        written.append(again)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(refresh, "write_report", write)
    assert refresh.refresh_report([tmp_path], tmp_path / "x.html", 30) == 130
    assert written == [30, None]
