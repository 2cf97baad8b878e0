"""A fork of the server behaves like a new process: output, exit codes, streams and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REAL = Path(sys.executable).parent
PROGRAM = "import sys, os; print(sys.argv, os.getcwd(), os.environ['SEEN'], sys.stdin.read()); sys.exit(4)"


def outcome(folder: Path, name: str, arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "SEEN": "yes"}
    line = [str(folder / name), *arguments]
    done = subprocess.run(line, cwd=cwd, env=environment, input="given", capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "name, arguments, code",
    [
        ("leviathan", ["--help"], 0),
        ("leviathan", ["train", "model.hidden_size=no"], 2),
        ("python", ["-c", PROGRAM, "a", "b"], 4),
        ("python", ["-c", "import sys; sys.exit('a reason')"], 1),
    ],
    ids=["help", "bad input", "streams", "reason"],
)
def test_a_fork_does_what_a_process_does(executables, tmp_path, name, arguments, code):
    forked = outcome(executables, name, arguments, tmp_path)
    assert forked == outcome(REAL, name, arguments, tmp_path) and forked[0] == code


def sleeper(executables: Path) -> tuple[subprocess.Popen[str], int]:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([executables / "python", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_signals_reach_the_fork_and_none_outlives_its_client(executables):
    process, _ = sleeper(executables)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    process, fork = sleeper(executables)
    process.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{fork}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{fork}").exists()
