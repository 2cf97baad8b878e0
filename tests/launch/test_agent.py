"""Ranks that die or hang: told, started again, and the run's losses are those of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.agent import told
from tests.launch.test_command import BIN
from tests.train.tiny import TINY

STEPS = 100
RUN = [f"training.steps={STEPS}", "logging.every=1", "checkpoint.every=20", "evaluation.rows=2", "logging.report=false"]
STARTED: list[subprocess.Popen[str]] = []
TWO_RANKS = ["launch=torchrun", "launch.processes=2", "parallel.ep=2"]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    STARTED.append(
        process := subprocess.Popen(
            [str(BIN / "leviathan"), "train", *TINY, *RUN, *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    )
    return process


def figures(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"--config" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def has_step(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a failed test has left running."""
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory) -> dict[int, tuple[float, float]]:
    root = tmp_path_factory.mktemp("undisturbed")
    process = start([*small_corpus, *TWO_RANKS, "run.name=x"], root)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return figures(root / "runs" / "x")


def killed(small_corpus: list[str], root: Path, after: int, victim: int) -> tuple[int, str]:
    process = start([*small_corpus, *TWO_RANKS, "run.name=x"], root)
    wait_for(has_step(root / "runs" / "x", after), process)
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_changes(small_corpus, tmp_path, undisturbed):
    code, errors = killed(small_corpus, tmp_path, 30, 1)
    assert code == 0, errors
    assert "leviathan: rank 1 was ended by SIGKILL" in errors and "restarts left: 3" in errors
    assert "Traceback" not in errors, "what only lost its neighbour says so in a line"
    assert figures(tmp_path / "runs" / "x") == undisturbed and len(undisturbed) == STEPS
    log = (tmp_path / "runs" / "x" / "log.txt").read_text()
    assert "going on from step-00000020" in log
    for rank in ("rank-00000", "rank-00001"):
        assert len(list((tmp_path / "runs" / "x" / "logs" / rank).glob("*.err"))) == 2, "a file per start"
    environment = json.loads((tmp_path / "runs" / "x" / "environment.json").read_text())
    assert environment["variables"]["TORCHELASTIC_RESTART_COUNT"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(10))
def test_ten_of_ten_kills_are_survived(small_corpus, tmp_path, undisturbed, time_of_death):
    code, errors = killed(small_corpus, tmp_path, 10 + 7 * time_of_death, time_of_death % 2)
    assert code == 0, errors
    assert figures(tmp_path / "runs" / "x") == undisturbed


@pytest.mark.slow
def test_a_stopped_rank_is_reported_with_axis_and_step_and_started_again(small_corpus, tmp_path, undisturbed):
    process = start([*small_corpus, *TWO_RANKS, "run.name=x", "parallel.timeout_s=4"], tmp_path)
    wait_for(has_step(tmp_path / "runs" / "x", 30), process)
    stopped = time.time()
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert figures(tmp_path / "runs" / "x") == undisturbed
    (hang,) = map(json.loads, (tmp_path / "runs" / "x" / "logs" / "hangs.jsonl").read_text().splitlines())
    assert hang["rank"] == 0 and hang["hosts"] == [os.uname().nodename]
    assert hang["time"] - stopped < 2 * 4 + 2
    words = hang["line"].split()
    assert words[0] == "step" and 30 <= int(words[1].rstrip(":")) <= STEPS
    assert any(f" over axis {axis} waits for " in hang["line"] for axis in ("experts", "fsdp", "world", "rows"))
    assert "; rank 1 gives no sign of life since step " in hang["line"]
    told = [line for line in errors.splitlines() if line.startswith("leviathan: ") and "error" not in line]
    assert told[0].startswith(f"leviathan: rank 0: {hang['line']}"), errors


def test_an_error_that_would_come_again_is_not_tried_again(small_corpus, tmp_path):
    process = start([*small_corpus, *TWO_RANKS, "run.name=x", "optimizer.lr=1e30", "optimizer=sgd"], tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    told = errors.strip().splitlines()
    assert len(told) == 1 and "the loss after step" in told[0], errors


@pytest.mark.slow
def test_several_nodes_meet_again_after_a_crash(small_corpus, tmp_path, undisturbed):
    """Two agents, as on two machines: each counts its own restarts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = ["launch=torchrun", "launch.processes=1", "launch.nodes=2", f"launch.rendezvous=127.0.0.1:{port}"]
    both = [
        start([*small_corpus, *nodes, "parallel.ep=2", "run.name=x", f"launch.node_rank={rank}"], tmp_path)
        for rank in range(2)
    ]
    log = tmp_path / "runs" / "x" / "log.txt"
    for attempt, victim in enumerate(both):
        wait_for(lambda attempt=attempt: log.exists() and log.read_text().count("going on from") == attempt, both[0])
        wait_for(has_step(tmp_path / "runs" / "x", 30 + 30 * attempt), both[0])
        os.kill(ranks_of(victim)[0], signal.SIGKILL)
    told = [process.communicate(timeout=90)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert figures(tmp_path / "runs" / "x") == undisturbed
    assert log.read_text().count("going on from") == 2


def test_a_port_in_use_is_one_line(small_corpus, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nodes = ["launch=torchrun", "launch.processes=1", "launch.nodes=2", f"launch.rendezvous=127.0.0.1:{port}"]
        process = start([*small_corpus, *nodes, "run.name=x", "launch.node_rank=0"], tmp_path)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip() == (
        f"leviathan: error: launch.rendezvous=127.0.0.1:{port}: Address already in use: choose another port"
    )


def test_the_rank_that_failed_first_is_told_first(tmp_path):
    """Four ranks: one was stopped by the agent, one only lost its neighbours, one broke by itself, later."""
    last = {0: "RuntimeError: Connection reset by peer", 1: "ZeroDivisionError: by itself", 3: "ValueError: later"}
    for rank, line in last.items():
        (tmp_path / f"rank-{rank:05d}").mkdir()
        (tmp_path / f"rank-{rank:05d}" / "000.err").write_text(f"Traceback\n{line}\n")
    failed = {0: (3, 1), 1: (3, 2), 2: (-signal.SIGTERM, 0), 3: (3, 5)}
    result = SimpleNamespace(failures={r: SimpleNamespace(exitcode=c, timestamp=t) for r, (c, t) in failed.items()})
    assert list(told(result, tmp_path)) == [
        f"leviathan: rank 1 failed: ZeroDivisionError: by itself  (its output: {tmp_path})",
        "leviathan: then rank 3 failed: ValueError: later",
        "leviathan: then rank 2 was ended by SIGTERM",
        "leviathan: then rank 0 failed: RuntimeError: Connection reset by peer",
    ]
