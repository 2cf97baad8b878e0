"""The ranks of one node: torchrun's own agent, started from here so that a rank's exit code means something.

What plain torchrun does not do: a wrong configuration and an interrupted run are not started again; each rank's output
goes into the run's directory; the rank that failed first is told first; ranks of a new attempt never meet what a dead
one left in the store, on any number of nodes.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, Std
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from core.errors import ConfigError, LeviathanError
from core.exit_codes import ATTEMPT, CRASHED, HUNG, INTERRUPTED, is_consequence
from launch.diagnose.machine import cores

PATIENCE_S = 600  # for ranks that save after a signal
KILL_AFTER_S = 20  # for ranks whose neighbour has crashed: there is nothing to save
JOIN_S = 600
END_TOGETHER_S = 60  # for the other nodes, when this one's ranks are done
ALONE_S = 10  # for ranks to notice by themselves that another node has given up: stopped ones never do
GIVEN_UP = "given up"
_SIOCGIFADDR = 0x8915
_IPV6 = Path("/proc/net/if_inet6")
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Node:
    """What one node starts. `rendezvous`: host and port of the first node, None where there is one node only."""

    command: tuple[str, ...]
    """What each rank runs: `python COMMAND...`."""
    ranks: int
    logs: Path
    nodes: int = 1
    is_first: bool = True
    rendezvous: tuple[str, int] | None = None
    restarts: int = 0
    job: str = ""
    """The same on all nodes of a job; empty where there is one node only."""
    shows_output: bool = True
    """Rank 0's output goes to the terminal, too."""


class NodesNotMet(LeviathanError):
    """The nodes of a job have not met, or not again: another try may do better."""


class Unreachable(ConfigError):
    """The rendezvous cannot be where it was said to be."""


class AgentInterrupted(LeviathanError):
    """The agent got a signal; its ranks have saved. `signal_number` says which."""

    exit_code = INTERRUPTED

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")


def run(node: Node) -> int:
    """Start the ranks and wait for them; returns the exit code of the one that failed first, 0 where none did.

    Raises `Interrupted` after a signal, `LeviathanError` where a rank was ended by a signal of its own, `ConfigError`
    for a rendezvous that cannot be.
    """
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous.dynamic_rendezvous"):  # told below instead
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ["PYTHONSAFEPATH"] = "1"  # a train.py in the current folder would win against `-m train`
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // node.ranks)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    if (interface := _interface(_own_address(node))) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # by itself gloo takes what the host's name leads to
    handler = get_rendezvous_handler(_rendezvous(node))
    spec = WorkerSpec(
        role="",  # goes before each line that rank 0 prints
        local_world_size=node.ranks,
        entrypoint=sys.executable,
        args=("-u", *node.command),
        rdzv_handler=handler,
        max_restarts=node.restarts,
        monitor_interval=0.1,
        local_addr=_own_address(node),
    )
    agent = _Agent(spec, node.logs, node.shows_output)
    closes = True
    try:
        return _exit_code(agent.run())
    except SignalException as error:
        closes = False  # the others get their own signal
        raise AgentInterrupted(int(error.sigval)) from None
    except RendezvousError as error:
        said = str(error).splitlines()
        raise NodesNotMet(f"the nodes do not meet: {said[0] if said else type(error).__name__}") from None
    finally:
        if closes:
            handler.shutdown()


class _Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, logs: Path, shows_output: bool) -> None:
        self.logs = logs
        self._alone_since: float | None = None
        self._asked = 0.0
        output = RankLogs(logs, shows_output)
        super().__init__(
            spec,
            output,
            start_method="spawn",
            exit_barrier_timeout=END_TOGETHER_S,
            log_line_prefix_template="$role_name",
        )

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """All nodes take the same word for this attempt: each one's own count of restarts differs from the others'."""
        store: Any = worker_group.store  # this round's alone
        if worker_group.group_rank == 0:
            store.set("attempt", uuid.uuid4().hex)
        os.environ[ATTEMPT] = store.get("attempt").decode()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if final := any(_is_final(failure.exitcode) for failure in result.failures.values()):
                self._remaining_restarts = 0
            lines = list(told(result, self.logs))
            if self._remaining_restarts:
                lines.append(f"leviathan: starting again; restarts left: {self._remaining_restarts}")
            elif not final:  # or the others' ranks, too, say the same, and may still be saving
                self._tell_the_others(worker_group)
            for line in lines:
                print(line, file=sys.stderr, flush=True)
        elif result.state is WorkerState.HEALTHY and self._is_alone(worker_group):
            print("leviathan: another node has given up; this one's ranks are ended", file=sys.stderr, flush=True)
            self._remaining_restarts = 0
            return RunResult(WorkerState.FAILED)
        return result

    def _tell_the_others(self, worker_group: WorkerGroup) -> None:
        store: Any = worker_group.store
        with suppress(dist.DistError, RuntimeError):  # it went with its node, and the others notice that
            store.set(GIVEN_UP, "")

    def _is_alone(self, worker_group: WorkerGroup) -> bool:
        """Whether a node of this round has given up, some time ago. All nodes ask one store: each once a second."""
        store, now = worker_group.store, time.monotonic()
        if self._alone_since is None and now - self._asked > 1.0:
            self._asked = now
            with suppress(dist.DistError, RuntimeError):  # told by the rendezvous, which asks the same store
                self._alone_since = now if store is not None and store.check([GIVEN_UP]) else None
        return self._alone_since is not None and now - self._alone_since > ALONE_S

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._shutdown(signal.SIGTERM, KILL_AFTER_S)

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: int = 0) -> None:
        """After a signal ranks save; where the agent itself gives up (its first node is gone) there is nobody to save
        with.
        """
        super()._shutdown(death_sig or signal.SIGTERM, PATIENCE_S if death_sig else KILL_AFTER_S)


class RankLogs(LogsSpecs):
    """Output of each rank in logs/rank-00000/, a file per start; rank 0's goes to the terminal as well."""

    def __init__(self, directory: Path, shows_output: bool) -> None:
        super().__init__(str(directory), redirects=Std.ALL)
        self.directory, self.shows_output = directory, shows_output

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
            if env["RANK"] == "0" and self.shows_output:
                found.tee_stdouts[local], found.tee_stderrs[local] = f"{stem}.out", f"{stem}.err"
        return found


def told(result: RunResult, logs: Path) -> Iterator[str]:
    """What to say of failed ranks. An error that was foreseen: its own line, unless rank 0 has said it already.
    Otherwise a line per rank, the one that failed first before those that only lost it.
    """
    foreseen = {rank: failure for rank, failure in result.failures.items() if _is_final(failure.exitcode)}
    if foreseen:
        rank = min(foreseen)
        if rank != 0 and foreseen[rank].exitcode != INTERRUPTED and (line := _last_line(logs, rank)):
            yield f"leviathan: error: {line}"
        return
    causes = []
    for rank, failure in result.failures.items():
        last = _last_line(logs, rank)
        if failure.exitcode == HUNG:
            causes.append((-1, failure.timestamp, f"rank {rank}: {last}"))
        elif failure.exitcode < 0:
            ours = failure.exitcode == -signal.SIGTERM  # what the agent sends to the others once one has failed
            how = signal.Signals(-failure.exitcode).name
            causes.append((2 * ours, failure.timestamp, f"rank {rank} was ended by {how}"))
        else:
            causes.append(
                (1 + is_consequence(last), failure.timestamp, f"rank {rank} failed: {last or 'no word of it'}")
            )
    first, *rest = [line for _, _, line in sorted(causes)]
    yield f"leviathan: {first}  (its output: {logs})"
    yield from (f"leviathan: then {line}" for line in rest[:3])
    if len(rest) > 3:
        yield f"leviathan: then {len(rest) - 3} ranks more"


def _last_line(logs: Path, rank: int) -> str:
    newest = max((logs / f"rank-{rank:05d}").glob("*.err"), default=None)
    lines = newest.read_text(errors="replace").strip().splitlines() if newest else []
    return lines[-1].removeprefix("leviathan: error: ") if lines else ""


def _is_final(code: int) -> bool:
    """Whether starting again would end the same: an error that was foreseen, or an interruption."""
    return code > 0 and code not in (CRASHED, HUNG)


def _exit_code(result: RunResult) -> int:
    if not result.is_failed():
        return 0
    codes = [failure.exitcode for failure in sorted(result.failures.values(), key=lambda failure: failure.timestamp)]
    final = [code for code in codes if _is_final(code)]
    return final[0] if final else CRASHED


def _rendezvous(node: Node) -> RendezvousParameters:
    settings: dict[str, Any] = {"join_timeout": JOIN_S, "last_call_timeout": 1, "close_timeout": 10}
    if node.rendezvous is None:
        endpoint, job = "127.0.0.1:0", uuid.uuid4().hex
    else:
        endpoint, job = _written(*node.rendezvous), node.job
        settings["is_host"] = node.is_first
        if node.is_first:
            _check_port(*node.rendezvous)
    return RendezvousParameters(
        "c10d", endpoint, job, node.nodes, node.nodes, local_addr=_own_address(node), **settings
    )


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_port(host: str, port: int) -> None:
    """The store listens on every address of this machine, of IPv6 as well where there is any."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = f"{os.strerror(error.errno or 0)}: choose another port"
        raise Unreachable("launch.rendezvous", _written(host, port), reason) from None


def _interface(address: str) -> str | None:
    """The network interface that has this address; None for this machine's own."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return None
    return next((name for name, found in _addresses() if found == wanted), None)


def _addresses() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Every network interface with its first address of IPv4 and all of IPv6."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:
                continue  # it has none
            yield name, ipaddress.IPv4Address(found)
    if _IPV6.exists():
        for line in _IPV6.read_text().splitlines():
            digits, *_, name = line.split()
            yield name, ipaddress.IPv6Address(bytes.fromhex(digits))


def _own_address(node: Node) -> str:
    """The address under which other nodes reach this one; the host's own name need not resolve."""
    if node.rendezvous is None:
        return "127.0.0.1"
    try:
        ways = socket.getaddrinfo(*node.rendezvous, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise _no_way(node.rendezvous, error) from None
    for place, (family, kind, protocol, _, address) in enumerate(ways, start=1):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # sends nothing
            except OSError as error:
                if place == len(ways):
                    raise _no_way(node.rendezvous, error) from None
                continue
            return str(probe.getsockname()[0])
    raise _no_way(node.rendezvous, OSError("it has no address"))


def _no_way(rendezvous: tuple[str, int], error: OSError) -> Unreachable:
    return Unreachable("launch.rendezvous", _written(*rendezvous), f"no way to that host: {error.strerror or error}")
