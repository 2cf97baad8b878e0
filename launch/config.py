"""How a run reaches machines: the configuration that every launcher reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

import torch

from core.errors import ConfigError, check_numbers
from launch.diagnose.machine import cores
from train.config import TrainConfig


class LaunchKind(Enum):
    inline = "inline"
    torchrun = "torchrun"
    slurm = "slurm"


@dataclass(frozen=True)
class SlurmConfig:
    """What sbatch is asked for; null leaves it to the cluster. `time` as sbatch reads it (minutes, H:M:S, D-H:M:S)."""

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    gres: str | None = None
    cpus: int | None = None
    """CPUs of each node; null: the whole node is asked for with `exclusive`, or what the cluster gives."""
    memory: str | None = None
    exclusive: bool = False
    exclude: list[str] = field(default_factory=list)
    dependency: str | None = None
    """As sbatch reads it: afterok:1234. A name of another of this project's jobs stands for its number."""
    options: list[str] = field(default_factory=list)
    """Further lines after #SBATCH, each as it is: "--qos=high"."""
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """Kept in plain sight in the job's folder: leave secrets in your own environment, which sbatch hands on."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run on the first node before anything else."""
    container: str | None = None
    """Command put before Python on each node: "apptainer exec --nv image.sif"."""
    python: str | None = None
    """The interpreter on the nodes; null: the one that submits."""
    max_concurrent: int | None = None
    """How many jobs of a sweep may run at once; null: as many as fit."""
    save_s: int = 300
    """Seconds before the time limit at which the run saves and asks to be queued again; SLURM may be a minute early."""
    requeues: int = 3
    """How many times in a row a failed job is queued again without having reached a new checkpoint."""
    doctor: bool = False
    """Look at every node first; leave out those that are slow or wrong and queue again."""
    follow: bool = True
    """Show the job's log until it ends; Ctrl-C stops showing, not the job."""
    directory: str = "jobs"
    """Where scripts, submitted configurations and logs of jobs are kept, on a file system that the nodes share."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("cpus", "max_concurrent"), not_negative=("save_s", "requeues"))
        if self.time is not None:
            limit = seconds(self.time)
            if limit is None:
                raise ConfigError("time", self.time, "must read as sbatch's --time", ["90", "1:30:00", "2-00:00:00"])
            if limit <= self.save_s:
                reason = f"is not longer than the {self.save_s} s kept for saving"
                raise ConfigError("time", self.time, f"{reason}: ask for more, or lower launch.slurm.save_s")


@dataclass(frozen=True)
class LaunchConfig:
    """Taken by launch=inline, torchrun or slurm; the keys but `kind` belong to the last two, `slurm` to the last.
    `processes`: ranks on each node; null: one per GPU of this machine, or per two cores where there is none.

    With several nodes under `torchrun`, the same command is started on each, with a `node_rank` of its own and one
    `rendezvous` (host:port of node 0; [address]:port for IPv6).
    """

    kind: LaunchKind = LaunchKind.inline
    processes: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    restarts: int = 3
    """How often ranks are started again after one of them crashed; the run goes on from its last checkpoint."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("processes", "nodes"), not_negative=("restarts",))
        if self.kind is LaunchKind.inline:
            for key, usual in (("processes", None), ("nodes", 1)):
                if getattr(self, key) != usual:
                    reason = "one process has no others; add launch=torchrun or launch=slurm"
                    raise ConfigError(key, getattr(self, key), reason)
        if self.kind is LaunchKind.torchrun:
            self._check_torchrun()
        if self.kind is LaunchKind.slurm and self.processes is None:
            reason = "say how many ranks each node gets, usually its number of GPUs"
            raise ConfigError("processes", None, reason, [8])

    def _check_torchrun(self) -> None:
        if self.nodes == 1:
            for key in ("node_rank", "rendezvous"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "one node needs none; add launch.nodes=2")
            return
        if self.node_rank is None or not 0 <= self.node_rank < self.nodes:
            reason = "each node's command needs a number of its own"
            raise ConfigError("node_rank", self.node_rank, reason, list(range(min(self.nodes, 8))))
        if self.rendezvous is None:
            reason = "several nodes meet at a port of node 0: give the same HOST:PORT to each"
            raise ConfigError("rendezvous", None, reason, ["node0:29500"])
        self.endpoint  # noqa: B018 - refuses what is no address

    @property
    def ranks_per_node(self) -> int:
        return self.processes or torch.cuda.device_count() or max(1, cores() // 2)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of the rendezvous. An address of IPv6 is written in brackets, and comes without them."""
        host, _, port = (self.rendezvous or "").rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError("rendezvous", self.rendezvous, "must be HOST:PORT", ["node0:29500"])
        if ":" in host and host == bare:
            reason = "the address of IPv6 goes in brackets: [ADDRESS]:PORT"
            raise ConfigError("rendezvous", self.rendezvous, reason, [f"[{host}]:{port}"])
        return bare, int(port)


def seconds(time: str) -> int | None:
    """sbatch's time in seconds: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of them."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return None
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    else:
        hours, minutes, secs = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def check_interval(config: TrainConfig, slurm: SlurmConfig, step_s: float | None) -> None:
    """Refuse a time limit within which no checkpoint would be due. `step_s`: seconds per step, where they are known."""
    limit = seconds(slurm.time) if slurm.time else None
    if limit is None or step_s is None or config.checkpoint.every == 0:
        return
    interval = config.checkpoint.every * step_s
    if interval > limit - slurm.save_s:
        most = max(1, int((limit - slurm.save_s) / step_s))
        reason = (
            f"{interval:.0f} s at the {step_s:.2f} s per step seen so far, longer than launch.slurm.time={slurm.time}"
        )
        raise ConfigError("checkpoint.every", config.checkpoint.every, reason, [most])
