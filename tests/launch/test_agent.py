"""Ranks that die or hang: told, started again, and the run's losses are those of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.agent import Node, Unreachable, _check_port, _endpoint, _interface, _own_address, failure_lines
from launch.cli import main
from tests.support.drills import STARTED, STEPS, TWO_RANKS, ended, figures, has_step, ranks_of, start, wait_for


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a failed test has left running."""
    yield
    for process in STARTED:
        if process.poll() is None:
            for rank in ranks_of(process):
                os.kill(rank, signal.SIGKILL)  # a stopped one would stay
            process.kill()
    STARTED.clear()


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory) -> dict[int, tuple[float, float]]:
    root = tmp_path_factory.mktemp("undisturbed")
    process = start([*small_corpus, *TWO_RANKS, "run.name=x"], root)
    ended(process)
    return figures(root / "runs" / "x")


def killed(small_corpus: list[str], root: Path, after: int, victim: int) -> str:
    process = start([*small_corpus, *TWO_RANKS, "run.name=x"], root)
    wait_for(has_step(root / "runs" / "x", after), process)
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    return ended(process)


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_nothing_changes(small_corpus, tmp_path, undisturbed):
    errors = killed(small_corpus, tmp_path, 30, 1)
    assert "leviathan: rank 1 was ended by SIGKILL" in errors and "restarts left: 3" in errors
    assert "Traceback" not in errors, "what only lost its neighbour says so in a line"
    assert figures(tmp_path / "runs" / "x") == undisturbed and len(undisturbed) == STEPS
    log = (tmp_path / "runs" / "x" / "log.txt").read_text()
    assert "resuming from step-00000020" in log
    for rank in ("rank-00000", "rank-00001"):
        assert len(list((tmp_path / "runs" / "x" / "logs" / rank).glob("*.err"))) == 2, "a file per start"
    environment = json.loads((tmp_path / "runs" / "x" / "environment.json").read_text())
    assert environment["variables"]["TORCHELASTIC_RESTART_COUNT"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(10))
def test_ten_of_ten_kills_are_survived(small_corpus, tmp_path, undisturbed, time_of_death):
    killed(small_corpus, tmp_path, 10 + 7 * time_of_death, time_of_death % 2)
    assert figures(tmp_path / "runs" / "x") == undisturbed


@pytest.mark.slow
def test_a_stopped_rank_is_reported_and_restarted(small_corpus, tmp_path, undisturbed):
    process = start([*small_corpus, *TWO_RANKS, "run.name=x", "parallel.timeout_s=4"], tmp_path)
    wait_for(has_step(tmp_path / "runs" / "x", 30), process)
    stopped = time.time()
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    errors = ended(process)
    assert figures(tmp_path / "runs" / "x") == undisturbed
    (hang,) = map(json.loads, (tmp_path / "runs" / "x" / "logs" / "hangs.jsonl").read_text().splitlines())
    assert hang["rank"] == 0 and hang["hosts"] == [os.uname().nodename]
    assert hang["time"] - stopped < 30, "soon after the 4 s, not when a socket gives up"
    words = hang["line"].split()
    # it may have been stopped between logging 30 steps and beginning the next one
    assert words[0] == "step" and 29 <= int(words[1].rstrip(":")) <= STEPS
    assert any(f" over axis {axis} waits for " in hang["line"] for axis in ("experts", "fsdp", "world", "dp"))
    assert "; rank 1 has sent no heartbeat since step " in hang["line"]
    told = [line for line in errors.splitlines() if line.startswith("leviathan: ") and "error" not in line]
    assert told[0].startswith(f"leviathan: rank 0: {hang['line']}"), errors


@pytest.mark.slow
def test_an_error_that_would_occur_again_is_not_retried(small_corpus, tmp_path):
    process = start([*small_corpus, *TWO_RANKS, "run.name=x", "optimizer.lr=1e30", "optimizer=sgd"], tmp_path)
    (line,) = ended(process, 1).strip().splitlines()
    assert "the loss after step" in line


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no address of IPv6"))


def free_endpoint(host: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return _endpoint(host, probe.getsockname()[1])


def two_agents(arguments: list[str], cwd: Path, endpoint: str) -> list[subprocess.Popen[str]]:
    nodes = ["launch=torchrun", "launch.processes=1", "launch.nodes=2", f"launch.rendezvous='{endpoint}'"]
    return [
        start([*arguments, *nodes, "parallel.ep=2", "run.name=x", f"launch.node_rank={rank}"], cwd) for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", IPV6])
def test_several_nodes_meet_again_after_a_crash(small_corpus, tmp_path, undisturbed, host):
    """Two agents, as on two machines: each counts its own restarts."""
    both = two_agents(small_corpus, tmp_path, free_endpoint(host))
    log = tmp_path / "runs" / "x" / "log.txt"
    for attempt, victim in enumerate(both):
        wait_for(lambda attempt=attempt: log.exists() and log.read_text().count("resuming from") == attempt, both[0])
        wait_for(has_step(tmp_path / "runs" / "x", 30 + 30 * attempt), both[0])
        os.kill(ranks_of(victim)[0], signal.SIGKILL)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert figures(tmp_path / "runs" / "x") == undisturbed
    assert log.read_text().count("resuming from") == 2
    environment = json.loads((tmp_path / "runs" / "x" / "environment.json").read_text())
    assert environment["variables"]["MASTER_ADDR"] == host


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_node_ends_after_another_gave_up(small_corpus, tmp_path, stopped):
    """No restarts are left; a stopped rank hears nothing of its neighbour's end, so its agent ends it."""
    alone = [*small_corpus, "launch.restarts=0", "parallel.timeout_s=4"]
    both = two_agents(alone, tmp_path, free_endpoint("127.0.0.1"))
    wait_for(has_step(tmp_path / "runs" / "x", 30), both[0])
    (victim,) = ranks_of(both[stopped])
    os.kill(victim, signal.SIGSTOP)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], told
    assert f"rank {stopped} has sent no heartbeat since step" in told[1 - stopped]
    assert not Path(f"/proc/{victim}").exists()
    if stopped == 0:  # the store is its node's: the other one cannot say that it gives up but there
        assert "another node has given up" in told[0], told


@pytest.mark.parametrize("host", ["127.0.0.1", IPV6])
def test_a_port_in_use_is_one_line(monkeypatch, tmp_path, capsys, host):
    for name in ("OMP_NUM_THREADS", "PYTHONSAFEPATH", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "1")  # the agent sets them
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        endpoint = _endpoint(host, taken.getsockname()[1])
        nodes = ["launch.processes=1", "launch.nodes=2", "launch.node_rank=0", f"launch.rendezvous='{endpoint}'"]
        assert main(["train", "launch=torchrun", f"run.root={tmp_path}", "run.name=x", *nodes]) == 2
    _check_port(host, int(endpoint.rpartition(":")[2]))  # control: it is free again
    assert capsys.readouterr().err == (
        f"leviathan: error: launch.rendezvous={endpoint}: Address already in use: choose another port\n"
    )


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
    """Four ranks: one was stopped by the agent, one only lost its neighbours, one broke by itself, later."""
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
