"""Run the ranks of one node with torchrun's agent, in this process.

This adds to plain torchrun: A rank's exit code tells whether a restart can help. Each rank's output is written to the
run's directory. The rank that failed first is reported first. On any number of nodes, ranks of a new attempt never read
what an earlier attempt left in the store.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, Std
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.numa.binding import AffinityMode, NumaOptions

from core.errors import ConfigError, LeviathanError, first_line
from core.exit_codes import AGENT, ATTEMPT, CRASHED, HUNG, INTERRUPTED, is_consequence
from core.process import told_after
from launch.diagnose.machine import cores, not_bound

SAVE_S = 600  # time for ranks to save after a signal
KILL_AFTER_S = 20  # time for ranks to end after another rank has crashed, without which they cannot save
JOIN_S = 600  # time for all nodes to join the rendezvous
PATIENCE_S = 10  # time before a node says that it waits for another
END_TOGETHER_S = 60  # time to wait for the other nodes after this node's ranks have ended
ALONE_S = 10  # time for ranks to fail by themselves after another node has given up; suspended ranks never fail
GIVEN_UP = "given up"
NEAR_GPU = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
"""Bind each rank to the cores of its GPU's NUMA node. A container may forbid it; torch then logs why."""


@dataclass(frozen=True)
class Node:
    """The ranks to start on one node. `rendezvous`: host and port of the first node, or None with a single node."""

    command: tuple[str, ...]
    """Each rank runs `python COMMAND...`."""
    ranks: int
    logs: Path
    nodes: int = 1
    is_first: bool = True
    rendezvous: tuple[str, int] | None = None
    restarts: int = 0
    job: str = ""
    """Job id, equal on all nodes; empty with a single node."""
    shows_output: bool = True
    """Also show rank 0's standard output on the terminal."""
    shows_errors: bool = True
    """Also show rank 0's standard error on the terminal."""


class NodesNotMet(LeviathanError):
    """The rendezvous of the nodes failed; another attempt may succeed."""


class Unreachable(ConfigError):
    """The rendezvous address cannot be used."""


class AgentInterrupted(LeviathanError):
    """The agent received the signal `signal_number`, and its ranks have saved."""

    exit_code = INTERRUPTED

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")


def run(node: Node) -> int:
    """Start the ranks and wait for them. Return 0, CRASHED, or the code of the first expected error or interruption.

    Raises `AgentInterrupted` after a signal, `NodesNotMet` if the rendezvous fails, `Unreachable` for an unusable
    rendezvous address.
    """
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous.dynamic_rendezvous"):  # reported here instead
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ["PYTHONSAFEPATH"] = "1"  # else `-m train` would run a train.py in the current folder
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // node.ranks)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    if (interface := _interface(_own_address(node))) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # by default gloo uses the address of the host name
    _await_first_node(node)
    handler = get_rendezvous_handler(_rendezvous(node))
    spec = WorkerSpec(
        role="",  # the agent prints it before each line of rank 0
        local_world_size=node.ranks,
        entrypoint=sys.executable,
        args=("-u", *node.command),
        rdzv_handler=handler,
        max_restarts=node.restarts,
        monitor_interval=0.1,
        local_addr=_own_address(node),
        numa_options=None if not_bound() else NEAR_GPU,
    )
    agent = _Agent(spec, node)
    interrupted = False
    try:
        return _exit_code(agent.run())
    except SignalException as error:
        interrupted = True
        raise AgentInterrupted(int(error.sigval)) from None
    except RendezvousError as error:
        reason = first_line(error) if str(error) else f"not all {node.nodes} came within {JOIN_S} s"
        raise NodesNotMet(f"the nodes do not meet: {reason}") from None
    finally:
        if not interrupted:  # after a signal, each node gets the signal itself
            handler.shutdown()  # closes the rendezvous for all nodes


class _Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, node: Node) -> None:
        self.logs, self.node = node.logs, node
        self._alone_since: float | None = None
        self._checked_at = 0.0
        super().__init__(
            spec,
            RankLogs(node),
            start_method="spawn",
            exit_barrier_timeout=END_TOGETHER_S,
            log_line_prefix_template="$role_name",
        )

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        with told_after(PATIENCE_S, f"leviathan: waiting for all {self.node.nodes} nodes, at most {JOIN_S} s"):
            super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Agree with all nodes on an id of this attempt, since the nodes' counts of restarts may differ."""
        store: Any = worker_group.store  # the store of this rendezvous round only
        if worker_group.group_rank == 0:
            store.set("attempt", uuid.uuid4().hex)
        os.environ[ATTEMPT] = store.get("attempt").decode()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if final := any(_is_final(failure.exitcode) for failure in result.failures.values()):
                self._remaining_restarts = 0
            lines = list(failure_lines(result, self.logs))
            if self._remaining_restarts:
                lines.append(f"leviathan: restarting the ranks; restarts left: {self._remaining_restarts}")
            elif not final:  # after a final error other nodes' ranks fail alike, and may still be saving
                with suppress(dist.DistError, RuntimeError):  # the node of the store is gone; other nodes notice that
                    store: Any = worker_group.store
                    store.set(GIVEN_UP, "")
            print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
        elif result.state is WorkerState.HEALTHY and self._is_alone(worker_group):
            print("leviathan: another node has given up; stopping the ranks of this one", file=sys.stderr, flush=True)
            self._remaining_restarts = 0
            return RunResult(WorkerState.FAILED)
        return result

    def _is_alone(self, worker_group: WorkerGroup) -> bool:
        """Return whether a node of this round gave up at least ALONE_S ago. Asks the shared store once a second."""
        store, now = worker_group.store, time.monotonic()
        if self._alone_since is None and now - self._checked_at > 1.0:
            self._checked_at = now
            with suppress(dist.DistError, RuntimeError):  # the rendezvous uses the same store and reports the failure
                self._alone_since = now if store is not None and store.check([GIVEN_UP]) else None
        return self._alone_since is not None and now - self._alone_since > ALONE_S

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._shutdown(signal.SIGTERM, KILL_AFTER_S)

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: int = 0) -> None:
        """Give ranks time to save after a signal. Do not wait if the agent gives up: the first node is gone."""
        super()._shutdown(death_sig or signal.SIGTERM, SAVE_S if death_sig else KILL_AFTER_S)


class RankLogs(LogsSpecs):
    """Write each rank's output to logs/rank-00000/ etc., in new files at each start. Also show that of rank 0."""

    def __init__(self, node: Node) -> None:
        super().__init__(str(node.logs), redirects=Std.ALL)
        self.directory, self.node = node.logs, node

    @property
    def root_log_dir(self) -> str:
        return str(self.directory)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        found = LogsDest()
        for local, env in envs.items():
            folder = self.directory / f"rank-{int(env['RANK']):05d}"
            folder.mkdir(parents=True, exist_ok=True)
            number = len(list(folder.glob("*.out")))
            stem = folder / f"{number:03d}-{stamp}"
            found.stdouts[local], found.stderrs[local] = f"{stem}.out", f"{stem}.err"
            found.error_files[local] = env["TORCHELASTIC_ERROR_FILE"] = f"{stem}.json"
            env[AGENT] = str(os.getpid())
            if env["RANK"] == "0":
                found.tee_stdouts |= {local: f"{stem}.out"} if self.node.shows_output else {}
                found.tee_stderrs |= {local: f"{stem}.err"} if self.node.shows_errors else {}
        return found


def failure_lines(result: RunResult, logs: Path) -> Iterator[str]:
    """Yield lines that report failed ranks.

    For an expected error, yield its message, unless rank 0 has printed it already. Otherwise yield lines for up to four
    ranks. The rank that failed first comes before ranks that only lost a connection.
    """
    expected = {rank: failure for rank, failure in result.failures.items() if _is_final(failure.exitcode)}
    if expected:
        rank = min(expected)
        if rank != 0 and expected[rank].exitcode != INTERRUPTED and (line := _last_line(logs, rank)):
            yield f"leviathan: error: {line}"
        return
    causes = []
    for rank, failure in result.failures.items():
        last = _last_line(logs, rank)
        if failure.exitcode == HUNG:
            causes.append((-1, failure.timestamp, f"rank {rank}: {last}"))
        elif failure.exitcode < 0:
            ours = failure.exitcode == -signal.SIGTERM  # sent by the agent after another rank failed
            name = signal.Signals(-failure.exitcode).name
            causes.append((2 * ours, failure.timestamp, f"rank {rank} was ended by {name}"))
        else:
            line = f"rank {rank} failed: {last or 'no message'}"
            causes.append((1 + is_consequence(last), failure.timestamp, line))
    first, *rest = [line for _, _, line in sorted(causes)]
    yield f"leviathan: {first}  (its output: {logs})"
    yield from (f"leviathan: then {line}" for line in rest[:3])
    if len(rest) > 3:
        yield f"leviathan: then {len(rest) - 3} more ranks"


def _last_line(logs: Path, rank: int) -> str:
    newest = max((logs / f"rank-{rank:05d}").glob("*.err"), default=None)
    lines = newest.read_text(errors="replace").strip().splitlines() if newest else []
    return lines[-1].removeprefix("leviathan: error: ") if lines else ""


def _is_final(code: int) -> bool:
    """Return whether a restart cannot help: after an expected error or an interruption."""
    return code > 0 and code not in (CRASHED, HUNG)


def _exit_code(result: RunResult) -> int:
    if not result.is_failed():
        return 0
    failures = sorted(result.failures.values(), key=lambda failure: failure.timestamp)
    return next((failure.exitcode for failure in failures if _is_final(failure.exitcode)), CRASHED)


def _rendezvous(node: Node) -> RendezvousParameters:
    settings: dict[str, Any] = {"join_timeout": JOIN_S, "last_call_timeout": 1, "close_timeout": 10}
    if node.rendezvous is None:
        endpoint, job = "127.0.0.1:0", uuid.uuid4().hex
    else:
        endpoint, job = _endpoint(*node.rendezvous), node.job
        settings["is_host"] = node.is_first
        if node.is_first:
            _check_port(*node.rendezvous)
    return RendezvousParameters(
        "c10d", endpoint, job, node.nodes, node.nodes, local_addr=_own_address(node), **settings
    )


def _await_first_node(node: Node) -> None:
    """Wait until the first node listens. Raises `NodesNotMet` after JOIN_S seconds.

    torch's own wait is silent, and ends with stack traces.
    """
    if node.rendezvous is None or node.is_first:
        return
    where, deadline = _endpoint(*node.rendezvous), time.monotonic() + JOIN_S
    with told_after(PATIENCE_S, f"leviathan: waiting for the first node at {where}, at most {JOIN_S} s"):
        while True:
            try:
                socket.create_connection(node.rendezvous, timeout=PATIENCE_S).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    reason = f"nothing listens at {where} ({error.strerror or error}): start the first node there"
                    raise NodesNotMet(f"the nodes do not meet: {reason}") from None
            time.sleep(0.2)


def _endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_port(host: str, port: int) -> None:
    """Raise `Unreachable` if the port is in use. The store listens on every IPv4 and IPv6 address of this machine."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = f"{os.strerror(error.errno or 0)}: choose another port"
        raise Unreachable("launch.rendezvous", _endpoint(host, port), reason) from None


def _interface(address: str) -> str | None:
    """Return the network interface with this address, or None for a loopback or unknown address."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        texts = [one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        if wanted in map(ipaddress.ip_address, texts):
            return name
    return None


def _own_address(node: Node) -> str:
    """Return the address at which other nodes reach this one. Works even if the name of this host does not resolve."""
    if node.rendezvous is None:
        return "127.0.0.1"
    reason = "it has no address"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(*node.rendezvous, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                code = probe.connect_ex(address)  # sends nothing
                if code == 0:
                    return str(probe.getsockname()[0])
                reason = os.strerror(code)
    except OSError as error:  # unknown host
        reason = error.strerror or str(error)
    raise Unreachable("launch.rendezvous", _endpoint(*node.rendezvous), f"no route to that host: {reason}")
