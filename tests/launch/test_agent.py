"""Ranks that die or hang are reported and restarted, and the losses are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from core.process import run_process
from launch.agent import Node, Unreachable, _check_port, _endpoint, _interface, _own_address, failure_lines
from tests.support.drills import STEPS, TWO_RANKS, ended, figures, has_step, kill_started, ranks_of, start, wait_for


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    kill_started()


STAGES = ["launch=torchrun", "launch.processes=4", "parallel.pp=2", "parallel.ep=2"]
STAGES += ["training.micro_batch_size=1", "training.global_batch_size=8"]
LAYOUTS = {"ranks": TWO_RANKS, "stages": STAGES}


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory) -> Callable[[str], dict[int, tuple[float, float]]]:
    """Return a function that gives the losses and norms of an undisturbed run under a layout, by step."""

    @cache
    def run(layout: str) -> dict[int, tuple[float, float]]:
        root = tmp_path_factory.mktemp("undisturbed")
        ended(start([*small_corpus, *LAYOUTS[layout], "run.name=x"], root))
        return figures(root / "runs" / "x")

    return run


@pytest.fixture
def hit(small_corpus, tmp_path) -> Callable[..., tuple[str, float]]:
    """Return a function that signals a rank of run x after a step, and returns stderr and the time of the signal."""

    def run(layout: str, step: int, victim: int, sent: signal.Signals, *words: str, code: int = 0) -> tuple[str, float]:
        process = start([*small_corpus, *LAYOUTS[layout], "run.name=x", *words], tmp_path)
        wait_for(has_step(tmp_path / "runs" / "x", step), process)
        os.kill(ranks_of(process)[victim], sent)
        now = time.time()
        return ended(process, code), now

    return run


KILLS = [("ranks", 10 + 7 * number, number % 2) for number in range(10)]
KILLS += [("stages", 15, 0), ("stages", 33, 3), ("stages", 58, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("layout, step, victim", KILLS)
def test_a_killed_rank_is_restarted_and_nothing_changes(hit, tmp_path, undisturbed, layout, step, victim):
    """In the layout `stages`, the two ranks of each pipeline stage split the experts."""
    (errors, _), run = hit(layout, step, victim, signal.SIGKILL), tmp_path / "runs" / "x"
    assert f"leviathan: rank {victim} was ended by SIGKILL" in errors and "restarts left: 3" in errors
    assert "Traceback" not in errors, "a rank that lost its neighbour prints one line"
    assert figures(run) == undisturbed(layout) and len(figures(run)) == STEPS
    assert step < 20 or "resuming from step-000000" in (run / "log.txt").read_text()
    for rank in (run / "logs").glob("rank-*"):
        assert len(list(rank.glob("*.err"))) == 2, "one file per start"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["variables"]["TORCHELASTIC_RESTART_COUNT"] == "1"


def test_a_wrapped_consequence_of_a_lost_rank_is_one_line(capsys):
    def stage(arguments: list[str]) -> int:
        try:
            raise RuntimeError(f"pair.cc: {arguments[0]}")
        except RuntimeError as error:
            raise RuntimeError("[Stage 1] failed to run forward") from error

    assert run_process(stage, ["Connection closed by peer"]) == 1
    assert capsys.readouterr().err.endswith("lost another rank: pair.cc: Connection closed by peer\n")
    assert run_process(stage, ["out of memory"]) == 1
    assert "internal error, RuntimeError" in capsys.readouterr().err, "control"


@pytest.mark.slow
def test_a_rank_that_dies_ends_a_run_without_restarts(hit):
    errors, _ = hit("ranks", 1, 1, signal.SIGKILL, "launch.restarts=0", code=1)
    told = [line for line in errors.splitlines() if line.startswith("leviathan: ")]
    assert told[0].startswith("leviathan: rank 1 was ended by SIGKILL  (its output: ")
    assert told[-1].endswith("x failed; rerun with run.name=x to resume from its last checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("layout, victim", [("ranks", 1), ("stages", 2)])
def test_a_stopped_rank_is_reported_and_restarted(hit, tmp_path, undisturbed, layout, victim):
    """In `stages`, the other stage waits for hidden states in a point-to-point transfer, not in a collective."""
    errors, stopped = hit(layout, 30, victim, signal.SIGSTOP, "parallel.timeout_s=6")
    assert figures(tmp_path / "runs" / "x") == undisturbed(layout)
    hang, *others = map(json.loads, (tmp_path / "runs" / "x" / "logs" / "hangs.jsonl").read_text().splitlines())
    assert f"; rank {victim} has sent no heartbeat since step " in hang["line"]
    assert hang["hosts"] == [os.uname().nodename]
    assert hang["time"] - stopped < 30, "soon after the 6 s, not when a socket gives up"
    told = [line for line in errors.splitlines() if line.startswith("leviathan: ") and "error" not in line]
    reported = [f"leviathan: rank {one['rank']}: {one['line']}" for one in (hang, *others)]
    assert any(map(told[0].startswith, reported)), errors
    if layout == "ranks":
        assert hang["rank"] == 0 and not others
        words = hang["line"].split()
        # the rank may have been stopped after step 30 was logged and before it began step 31
        assert words[0] == "step" and 29 <= int(words[1].rstrip(":")) <= STEPS
        assert any(f" over axis {axis} waits for " in hang["line"] for axis in ("experts", "fsdp", "world", "dp"))


@pytest.mark.slow
def test_pipelines_end_cleanly(small_corpus, tmp_path):
    """Some such runs were aborted at their end by a thread of gloo: see `core.process.end_process`."""
    schedule = ["launch.processes=2", "parallel.ep=1", "parallel.schedule=interleaved_zero_bubble"]
    for number in range(5):
        process = start([*small_corpus, *STAGES, *schedule, "training.steps=2", f"run.name=x{number}"], tmp_path)
        assert "terminate" not in ended(process), f"run {number}"


@pytest.mark.slow
def test_an_error_that_would_occur_again_is_not_retried(small_corpus, tmp_path):
    process = start([*small_corpus, *TWO_RANKS, "run.name=x", "optimizer.lr=1e30", "optimizer=sgd"], tmp_path)
    (line,) = ended(process, 1).strip().splitlines()
    assert "the loss after step" in line


def listen(host: str) -> socket.socket:
    """Listen on a free port. Skip the test if the machine does not have the address."""
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"this machine has no address {host}")


def two_agents(arguments: list[str], cwd: Path, host: str) -> list[subprocess.Popen[str]]:
    with listen(host) as probe:
        endpoint = _endpoint(host, probe.getsockname()[1])
    nodes = ["launch=torchrun", "launch.processes=1", "launch.nodes=2", f"launch.rendezvous='{endpoint}'"]
    nodes += ["parallel.ep=2", "run.name=x"]
    return [start([*arguments, *nodes, f"launch.node_rank={rank}"], cwd) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_several_nodes_meet_again_after_a_crash(small_corpus, tmp_path, undisturbed, host):
    """Run two agents, as on two machines. Each counts its own restarts."""
    both = two_agents(small_corpus, tmp_path, host)
    log = tmp_path / "runs" / "x" / "log.txt"
    for attempt, victim in enumerate(both):
        wait_for(lambda attempt=attempt: log.exists() and log.read_text().count("resuming from") == attempt, both[0])
        wait_for(has_step(tmp_path / "runs" / "x", 30 + 30 * attempt), both[0])
        os.kill(ranks_of(victim)[0], signal.SIGKILL)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert figures(tmp_path / "runs" / "x") == undisturbed("ranks")
    assert log.read_text().count("resuming from") == 2
    environment = json.loads((tmp_path / "runs" / "x" / "environment.json").read_text())
    assert environment["variables"]["MASTER_ADDR"] == host


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_node_ends_after_another_gave_up(small_corpus, tmp_path, stopped):
    """No restarts are left. A stopped rank cannot notice that the other rank ended, so its agent kills it."""
    alone = [*small_corpus, "launch.restarts=0", "parallel.timeout_s=4"]
    both = two_agents(alone, tmp_path, "127.0.0.1")
    wait_for(has_step(tmp_path / "runs" / "x", 30), both[0])
    (victim,) = ranks_of(both[stopped])
    os.kill(victim, signal.SIGSTOP)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], told
    assert f"rank {stopped} has sent no heartbeat since step" in told[1 - stopped]
    assert not Path(f"/proc/{victim}").exists()
    if stopped == 0:  # node 0 has the store, through which the other node reports that it gives up
        assert "another node has given up" in told[0], told


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_one_line(monkeypatch, tmp_path, refused, host):
    for name in ("OMP_NUM_THREADS", "PYTHONSAFEPATH", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "1")  # so that monkeypatch restores what the agent sets
    with listen(host) as taken:
        port = taken.getsockname()[1]
        nodes = ["launch.processes=1", "launch.nodes=2", "launch.node_rank=0"]
        nodes += [f"launch.rendezvous='{_endpoint(host, port)}'"]
        line = refused("train", "launch=torchrun", f"run.root={tmp_path}", "run.name=x", *nodes)
    assert line == f"launch.rendezvous={_endpoint(host, port)}: Address already in use: choose another port"
    _check_port(host, port)  # control: it is free again


def test_a_host_that_is_not_there_is_one_line():
    node = Node(("-m", "train"), 1, Path("logs"), 2, rendezvous=("no-such-host.invalid", 29500))
    with pytest.raises(Unreachable, match=r"launch\.rendezvous=no-such-host\.invalid:29500: no route to that host: "):
        _own_address(node)


def test_every_interface_is_found_by_its_addresses():
    assert _interface("127.0.0.1") is None and _interface("127.0.1.1") is None and _interface("::1") is None
    assert _interface("192.0.2.99") is None, "an address of no interface"
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family is socket.AF_INET and not one.address.startswith("127."):
                assert _interface(one.address) == name


def test_the_rank_that_failed_first_is_told_first(tmp_path):
    """Rank 1 failed first by itself, and rank 3 later. Rank 0 only lost its connection; the agent stopped rank 2."""
    last = {0: "RuntimeError: Connection reset by peer", 1: "ZeroDivisionError: by itself", 3: "ValueError: later"}
    for rank, line in last.items():
        (tmp_path / f"rank-{rank:05d}").mkdir()
        (tmp_path / f"rank-{rank:05d}" / "000.err").write_text(f"Traceback\n{line}\n")
    failed = {0: (3, 1), 1: (3, 2), 2: (-signal.SIGTERM, 0), 3: (3, 5)}
    result = SimpleNamespace(failures={r: SimpleNamespace(exitcode=c, timestamp=t) for r, (c, t) in failed.items()})
    assert list(failure_lines(result, tmp_path)) == [
        f"leviathan: rank 1 failed: ZeroDivisionError: by itself  (its output: {tmp_path})",
        "leviathan: then rank 3 failed: ValueError: later",
        "leviathan: then rank 2 was ended by SIGTERM",
        "leviathan: then rank 0 failed: RuntimeError: Connection reset by peer",
    ]
