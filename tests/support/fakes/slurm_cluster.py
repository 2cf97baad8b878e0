"""A real SLURM on one machine for the time of a test: munged, slurmctld and several slurmd, each of them a node.

It needs Debian's packages `slurm-wlm` and `munge` (`make slurm` installs them). It neither uses nor changes the
machine's own configuration. It must be started by root, since slurmd starts jobs as their users.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.support import drills

NODES = ("n1", "n2", "n3")
_CONF = """
ClusterName=leviathan
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout=6
SlurmctldTimeout=10
KillWait=20
MinJobAge=600
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
RebootProgram=/bin/true
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 GraceTime=60 State=UP
PartitionName=spare Nodes={last} MaxTime=60 State=UP
PartitionName=urgent Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


class Cluster:
    """Three nodes of two CPUs. `environment` has the variables with which a client reaches the cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = _free_ports(1 + len(NODES))
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self._variables = os.environ | self.environment
        self._daemons: dict[str, psutil.Popen] = {}

    def start(self) -> None:
        host = socket.gethostname()
        for name in ("munge", "state"):
            (self.root / name).mkdir(parents=True)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000 State=UNKNOWN"
            for name, port in zip(NODES, self.ports[1:], strict=True)
        )
        about = {"host": host, "ports": self.ports, "root": self.root}
        conf = _CONF.format(**about, nodes=nodes, names=",".join(NODES), last=NODES[-1])
        (self.root / "slurm.conf").write_text(conf)
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for name in NODES:
            self.start_node(name)
        self.wait(lambda: self.client("sinfo", "-h", "-p", "main", "-o", "%T").split() == ["idle"], "idle nodes", 60)

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill the node's daemon and all processes of its jobs, as a power failure would."""
        self.kill_daemon(name)
        for pid in self._processes_of(name):
            os.kill(pid, signal.SIGKILL)

    def stop_ranks(self, name: str) -> None:
        """Stop the ranks on a node by SIGSTOP, as if they hung."""
        ranks = self.processes(name, b"\0train\0--config\0")
        assert ranks
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)

    def processes(self, name: str, words: bytes) -> list[int]:
        """Return the processes on a node with `words` in their command lines, which are separated by zero bytes."""
        return [pid for pid in self._processes_of(name) if words in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def kill_daemon(self, name: str) -> None:
        """Kill the daemon only. The jobs on the node go on until SLURM declares the node down."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def client(self, *command: str) -> str:
        return subprocess.run(command, env=self._variables, check=True, capture_output=True, text=True).stdout

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} within {seconds:.0f} s; logs in {self.root}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End every job and daemon."""
        for command in (["scancel", "--signal=KILL", "--full", "--user=root"], ["scancel", "--user=root"]):
            subprocess.run(command, env=self._variables, capture_output=True)
        time.sleep(2)
        daemons = list(self._daemons.values())
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in psutil.wait_procs(daemons, timeout=10)[1]:
            daemon.kill()
            daemon.wait()

    def _processes_of(self, node: str) -> list[int]:
        """Return the pids of a node's step daemons, then of their tasks; ignore equally named nodes of other SLURMs."""
        ours = {"SLURMD_NODENAME": node, "SLURM_CONF": f"{self.root}/slurm.conf"}.items()
        tasks, daemons = [], []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or access is denied
                if ours <= process.environ().items():
                    tasks.append(process.pid)
                    if any("slurmstepd" in word for word in psutil.Process(process.ppid()).cmdline()):
                        daemons.append(process.ppid())
        return [*dict.fromkeys(daemons), *tasks]

    def _start_munge(self) -> None:
        """Run munged as the user `munge`: it refuses root, and the folder of its socket must be open to everybody."""
        folder = self.root / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(1024))
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        (folder / "key").chmod(0o400)
        folder.chmod(0o755)
        for parent in folder.parents:  # pytest's folders are private
            if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        arguments = [f"--{option}={folder / name}" for option, name in options.items()]
        self._start("munged", "runuser", "-u", "munge", "--", "munged", "--foreground", "--num-threads=2", *arguments)
        self.wait((folder / "socket").exists, "munge socket", 20)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        log = open(self.root / f"{name}.out", "wb")  # noqa: SIM115 - the daemon uses it
        command = [shutil.which(program) or f"/usr/sbin/{program}", *arguments]
        self._daemons[name] = psutil.Popen(command, env=self._variables, stdout=log, stderr=log, start_new_session=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


STEPS = 80
SMOKE = ["experiment=smoke", *drills.RUN, f"training.steps={STEPS}", "evaluation.baselines=false"]
TWO_NODES = ["launch.nodes=2", "launch.processes=1", "parallel.ep=2", "launch.slurm.save_s=60"]


class User:
    """A user at the login node, in a folder that all nodes share."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home = cluster, home
        self.environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}

    def leviathan(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(Path(sys.executable).with_name("leviathan")), *arguments]
        return subprocess.run(line, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=300)

    def job(self, name: str) -> list[str]:
        """Return the words of `leviathan train` for a job on two nodes."""
        slurm = ["launch=slurm", "launch.slurm.follow=false", *TWO_NODES, "launch.slurm.time=20"]
        return [*SMOKE, f"run.name={name}", *slurm]

    def submit(self, name: str, *overrides: str, until: int = 0) -> str:
        """Submit a run and, unless `until` is 0, wait for that step; return the job's number."""
        done = self.leviathan("train", *self.job(name), *overrides)
        assert done.returncode == 0, done.stderr
        if until:
            self.reach(name, until)
        return json.loads((self.home / "jobs" / name / "job.json").read_text())["number"]

    def log(self, name: str, task: int = 0) -> str:
        path = self.home / "jobs" / name / f"log-{task}.txt"
        return path.read_text() if path.exists() else ""

    def figures(self, name: str) -> dict[int, tuple[float, float]]:
        run = self.home / "runs" / name
        return drills.figures(run) if (run / "metrics.jsonl").exists() else {}

    def results(self, name: str) -> tuple[dict[int, tuple[float, float]], float]:
        """Return the loss and gradient norm of each step, and the held-out loss."""
        summary = json.loads((self.home / "runs" / name / "summary.json").read_text())
        return self.figures(name), summary["heldout_loss"]

    def state(self, number: str) -> str:
        return self.cluster.client("scontrol", "show", "job", "-o", number).partition("JobState=")[2].split()[0]

    def nodes_of(self, number: str) -> list[str]:
        """Return the nodes on which the job runs or last ran."""
        shown = self.cluster.client("scontrol", "show", "job", "-o", number).partition(" NodeList=")[2].split()[0]
        return self.cluster.client("scontrol", "show", "hostnames", shown).split()

    def ended(self, name: str, number: str, state: str = "COMPLETED", seconds: float = 480) -> str:
        """Wait until the job ends, check that it ended in `state`, and return its log."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            self.cluster.wait(lambda: self.state(number) in ended, "end of the job", seconds)
        except TimeoutError:
            raise AssertionError(f"{self.state(number)}:\n{self.log(name)}") from None
        assert self.state(number) == state, self.log(name)
        return self.log(name)

    def reach(self, name: str, step: int) -> None:
        self.cluster.wait(lambda: step in self.figures(name), f"step {step} of {name}", 240)
