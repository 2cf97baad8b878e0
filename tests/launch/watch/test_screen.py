"""`leviathan watch` on a pseudo-terminal, `--once` without one, paths that are no run, and SLURM's words."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from core.errors import ConfigError, LeviathanError
from core.files import write_json
from launch.cli import main
from launch.slurm.job import record
from launch.slurm.submit import JobStatus
from launch.watch import jobs as watch_jobs
from launch.watch.jobs import JobStates
from launch.watch.run import WatchedRun
from launch.watch.screen import Keyboard, print_once, watch
from tests.launch.watch.runs import make_running

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
"""What switches a terminal to a screen of its own, and back."""


@pytest.fixture
def run(tmp_path):
    return make_running(tmp_path / "first")


class Terminal:
    """A pseudo-terminal with a thread in which `watch` runs."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.shown, self.codes = StringIO(), list[int]()

    def start(self, directories: list[Path]) -> None:
        console = Console(file=self.shown, width=120, height=40, force_terminal=True, color_system="standard")
        arguments = directories, Path("jobs"), 0.1, console, Keyboard(self.theirs)
        self.thread = threading.Thread(target=lambda: self.codes.append(watch(*arguments)), daemon=True)
        self.thread.start()

    def until(self, words: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.shown.getvalue():
            assert time.monotonic() < end and self.thread.is_alive(), words
            time.sleep(0.02)

    def end(self) -> None:
        os.write(self.ours, b"q")
        self.thread.join(60.0)
        assert self.codes == [0]


def test_keys_change_the_view_and_q_ends_it(run, tmp_path):
    terminal = Terminal()
    terminal.start([run, tmp_path / "later"])
    terminal.until("2 runs")
    assert ENTER in terminal.shown.getvalue()
    assert not termios.tcgetattr(terminal.theirs)[3] & termios.ECHO, "a key is not shown"
    os.write(terminal.ours, b"z")
    terminal.until("its last half")
    os.write(terminal.ours, b"\x1b[B")
    terminal.until("mean, later")
    make_running(tmp_path / "later")
    terminal.until("2 running")
    terminal.end()
    assert LEAVE in terminal.shown.getvalue()
    assert termios.tcgetattr(terminal.theirs) == terminal.before, "the terminal is as it was"


def test_an_error_leaves_the_terminal_as_it_was(run, monkeypatch):
    def broken(self):
        raise ZeroDivisionError

    terminal = Terminal()
    monkeypatch.setattr(WatchedRun, "poll", broken)
    console = Console(file=terminal.shown, width=80, height=24, force_terminal=True)
    with pytest.raises(ZeroDivisionError):
        watch([run], Path("jobs"), 0.1, console, Keyboard(terminal.theirs))
    assert ENTER in terminal.shown.getvalue() and LEAVE in terminal.shown.getvalue()
    assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_a_keyboard_that_is_closed_or_no_terminal():
    ours, theirs = pty.openpty()
    keyboard = Keyboard(theirs)
    with keyboard.reading():
        os.write(ours, b"\x1b[A")
        assert keyboard.wait(5.0) == "up" and keyboard.wait(0.0) == ""
        os.write(ours, b"\xff")
        assert keyboard.wait(5.0) == ""
    with open(os.devnull) as nothing:
        keyboard = Keyboard(nothing.fileno())
        with keyboard.reading():
            assert keyboard.wait(0.01) == ""


@pytest.mark.slow
@pytest.mark.parametrize("key, code", [(b"q", 0), (b"\x03", 130), (signal.SIGHUP, 130)])
def test_the_command_on_a_terminal(run, key, code):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "launch.cli", "watch", str(run)]
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown, sent = b"", False
    while select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the process has ended
            break
        shown += part
        if b"step 50 of 60" in shown and not sent:
            sent = True
            if isinstance(key, bytes):
                os.write(ours, key)
            else:
                process.send_signal(key)
        if not part:
            break
    assert process.wait(60) == code and process.stderr is not None
    assert process.stderr.read() == b"" and LEAVE.encode() in shown


def test_once_prints_into_a_stream_without_an_encoding(run, monkeypatch):
    out = StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert print_once([run], Path("jobs"), 60) == 0 and "step 50 of 60" in out.getvalue()


def test_once_prints_plain_text_of_any_width(run, capsys):
    assert main(["watch", "--once", str(run), "width=77"]) == 0
    text = capsys.readouterr().out
    assert "step 50 of 60" in text and "\x1b" not in text and max(map(len, text.splitlines())) == 77
    assert main(["watch", str(run), "once=true"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) == 100


@pytest.mark.parametrize(
    "words, line",
    [
        ("", "runs: name at least one run's directory: leviathan watch RUN"),
        ("file", "runs=file: is a file, but must be a run's directory"),
        ("other", "runs=other: is not a run's directory: it has no config.yaml and no metrics.jsonl"),
        ("runs", "runs=runs: is not a run's directory: it has no config.yaml and no metrics.jsonl; try runs/x"),
        ("a/b/c", "runs=a/b/c: no such directory, and a/b does not exist either"),
        ("--once later", "runs=later: no such directory"),
        ("runs/x", "once=false: needs a terminal that can be drawn on; try --once"),
        ("runs/x seconds=0", "seconds=0.0: must be 0.1 to 86,400; try 2"),
        ("runs/x width=3", "width=3: must be 20 to 1,000 columns, or null; try 100"),
        (
            "runs/x s3://a/b",
            "runs=s3://a/b: is a URL, but must be a folder on this machine or on a file system it mounts",
        ),
        ("--twice runs/x", "--twice: no such option; keys are written KEY=VALUE; try --once, --help or --cfg"),
    ],
)
def test_what_cannot_be_watched_is_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for folder in ("other/x", "runs/x"):
        Path(folder).mkdir(parents=True)
    Path("runs/x/config.yaml").touch()
    assert main(["watch", *words.split()]) == 2
    assert capsys.readouterr().err == f"leviathan: error: {line}\n"


def test_the_words_of_slurm_stand_beside_a_run(tmp_path, monkeypatch):
    folder, runs = tmp_path / "jobs" / "sweep", [tmp_path / "runs" / name for name in ("a", "b", "c")]
    folder.mkdir(parents=True)
    record(folder, "17", runs[:2])
    state = {"time": 1.0, "step": 5, "fruitless": 0, "excluded": ["n3"], "slow": []}
    write_json(folder / "requeue-1.json", state)
    (folder / "a-0.txt").touch()
    states = JobStates(tmp_path / "jobs", runs)
    monkeypatch.setattr(watch_jobs.shutil, "which", lambda name: None)
    states.ask()
    assert [states.of(run) for run in runs] == [""] * 3, "no scontrol here"
    monkeypatch.setattr(watch_jobs.shutil, "which", lambda name: name)
    answers = [JobStatus("RUNNING"), JobStatus("PENDING", "Resources")]
    monkeypatch.setattr(watch_jobs, "ask", lambda job: answers)
    states.ask()
    assert [states.of(run) for run in runs] == [
        "job 17_0 RUNNING",
        "job 17_1 PENDING (Resources), excluded nodes: n3",
        "",
    ]

    def silent(job):
        raise LeviathanError("scontrol: timed out")

    monkeypatch.setattr(watch_jobs, "ask", silent)
    states.ask()
    assert states.problem.endswith("scontrol: timed out") and states.of(runs[0]) == ""
    (folder / "job.json").write_text('{"number": "; rm -rf /", "runs": []}')
    states.ask()
    assert "holds no number of a job" in states.problem


def test_a_directory_that_cannot_be_listed(run, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("launch.watch.run.os.listdir", denied)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        WatchedRun(run)
