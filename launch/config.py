"""Configuration of launchers: the machines and the number of ranks of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from core.config import build
from core.errors import ConfigError, check_local, check_numbers
from launch.diagnose.machine import cores
from train.config import TrainConfig


class LaunchKind(Enum):
    inline = "inline"
    """One process: this one."""
    torchrun = "torchrun"
    """Ranks on this machine, or on several machines where the same command is started."""
    slurm = "slurm"
    """A SLURM job, which resumes by itself after failures and time limits."""


@dataclass(frozen=True)
class SlurmConfig:
    """Options of sbatch and of the job; null: the cluster's default."""

    time: str | None = None
    """Time limit in sbatch's format: minutes, H:M:S or D-H:M:S."""
    partition: str | None = None
    """Partition, or several separated by commas (sbatch's --partition)."""
    account: str | None = None
    """Account that is charged (--account)."""
    constraint: str | None = None
    """Features that the nodes must have (--constraint), such as h100."""
    gres: str | None = None
    """Generic resources per node (--gres), such as gpu:8."""
    cpus: int | None = None
    """CPUs per node; null: all CPUs with `exclusive`, else the cluster's default."""
    memory: str | None = None
    """Host memory per node (--mem), such as 500G; 0: all of it."""
    exclusive: bool = False
    """Take whole nodes, which no other job shares (--exclusive)."""
    exclude: list[str] = field(default_factory=list)
    """Names of nodes not to use (--exclude). Nodes found faulty later are added for the job."""
    dependency: str | None = None
    """Dependency in sbatch's format, such as afterok:1234. A job of this project may be given by its name."""
    options: list[str] = field(default_factory=list)
    """Further #SBATCH options, copied verbatim, such as "--qos=high"."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that the batch script loads first, each with `module load`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, stored in plain text in its folder. Keep secrets in your own environment, which
    sbatch forwards.
    """
    setup: list[str] = field(default_factory=list)
    """Shell lines that the batch script runs first, on the first node."""
    container: str | None = None
    """Command put before Python on each node, such as "apptainer exec --nv image.sif"."""
    python: str | None = None
    """Python interpreter on the nodes; null: the one that submits the job."""
    max_concurrent: int | None = None
    """Largest number of concurrent runs of a sweep; null: no limit."""
    save_s: int = 300
    """SLURM warns the run this many seconds before the time limit, or up to a minute earlier. The run then saves, and
    the job is requeued.
    """
    requeues: int = 3
    """Maximum number of failures in a row, without a new checkpoint, after which the job is still requeued."""
    doctor: bool = False
    """Check every node before training. If some are slow or faulty, exclude these nodes and requeue the job."""
    submit: bool = True
    """False: only write the job's folder, with its script. That needs no cluster."""
    follow: bool = True
    """Show the job's log until it ends. Ctrl-C stops the display, not the job."""
    directory: str = "jobs"
    """Folder for scripts, submitted configurations and logs of jobs, on a file system that the nodes share."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("cpus", "max_concurrent"), not_negative=("save_s", "requeues"))
        check_local("directory", self.directory)
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.isprintable():
                    raise ConfigError(name, text, "must be one line: it becomes a line of the batch script")
        if self.time is not None:
            limit = seconds(self.time)
            if limit is None:
                raise ConfigError("time", self.time, "must read as sbatch's --time", ["90", "1:30:00", "2-00:00:00"])
            if limit <= self.save_s:
                reason = f"is not longer than the {self.save_s} s reserved for saving"
                raise ConfigError("time", self.time, f"{reason}: increase it, or lower launch.slurm.save_s")


@dataclass(frozen=True)
class LocalLaunch:
    """launch=inline: in this process. launch=torchrun: in ranks of this machine. launch=slurm is for `train`
    only.
    """

    kind: LaunchKind = LaunchKind.inline
    """Where the ranks run."""
    processes: int | None = None
    """Ranks per node; null: one per GPU of this machine, or one per two CPU cores if it has no GPU."""
    restarts: int = 3
    """Maximum number of restarts after ranks crash. A run then resumes from its last checkpoint."""
    oversubscribe: bool = False
    """Allow more ranks than this machine can run well."""

    @property
    def ranks_per_node(self) -> int:
        if self.processes is not None:
            return self.processes
        import torch

        return torch.cuda.device_count() or max(1, cores() // 2)


@dataclass(frozen=True)
class LaunchConfig(LocalLaunch):
    """launch=slurm: in a SLURM job. For several nodes with launch=torchrun, start the same command on each node, with
    its own `node_rank` and the same `rendezvous`.
    """

    nodes: int = 1
    """Number of machines."""
    node_rank: int | None = None
    """For torchrun with several nodes: this machine's number, from 0. Null on one node."""
    rendezvous: str | None = None
    """Host:port of node 0; [address]:port for IPv6."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("processes", "nodes"), not_negative=("restarts",))
        if self.kind is LaunchKind.inline:
            for key, usual in (("processes", None), ("nodes", 1)):
                if getattr(self, key) != usual:
                    reason = "launch=inline is one process; add launch=torchrun or launch=slurm"
                    raise ConfigError(key, getattr(self, key), reason)
        if self.kind is LaunchKind.torchrun:
            self._check_torchrun()
        if self.kind is LaunchKind.slurm and self.processes is None:
            reason = "give the number of ranks per node, usually its number of GPUs"
            raise ConfigError("processes", None, reason, [8])

    def _check_torchrun(self) -> None:
        if self.nodes == 1:
            for key in ("node_rank", "rendezvous"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "does not apply to one node; add launch.nodes=2")
            return
        if self.node_rank is None or not 0 <= self.node_rank < self.nodes:
            reason = "each node's command needs its own number"
            raise ConfigError("node_rank", self.node_rank, reason, list(range(min(self.nodes, 8))))
        if self.rendezvous is None:
            reason = "several nodes need the same HOST:PORT of node 0"
            raise ConfigError("rendezvous", None, reason, ["node0:29500"])
        self.endpoint  # noqa: B018 - raises for an invalid address

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of the rendezvous. Brackets around an IPv6 address are removed."""
        host, _, port = (self.rendezvous or "").rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError("rendezvous", self.rendezvous, "must be HOST:PORT", ["node0:29500"])
        if ":" in host and host == bare:
            reason = "write an IPv6 address in brackets: [ADDRESS]:PORT"
            raise ConfigError("rendezvous", self.rendezvous, reason, [f"[{host}]:{port}"])
        return bare, int(port)


def local_launch(values: dict[str, Any] | None) -> LocalLaunch:
    """Build the section `launch` of a verb that runs on this machine only. Raises `ConfigError` for anything else."""
    given, here = values or {}, "this verb runs on this machine only"
    if given.get("kind") == LaunchKind.slurm.name:
        raise ConfigError("launch.kind", LaunchKind.slurm, f"{here}; in a SLURM job, use launch=torchrun")
    for key, usual in (("nodes", 1), ("node_rank", None), ("rendezvous", None)):
        if given.get(key, usual) != usual:
            raise ConfigError(f"launch.{key}", given[key], f"{here}; remove it")
    return build(LaunchConfig, given, "launch")


def seconds(time: str) -> int | None:
    """Convert sbatch's time (minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S) to seconds; None if it is none of these."""
    if not re.fullmatch(r"(\d{1,9}-)?\d{1,9}(:\d{1,9}){0,2}", time, re.ASCII):
        return None
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:  # without hours, minutes come first
        parts = [0, *parts]
    hours, minutes, secs = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def check_interval(config: TrainConfig, slurm: SlurmConfig, step_s: float | None) -> None:
    """Raise `ConfigError` if no checkpoint is due within the time limit. `step_s`: seconds per step, if known."""
    limit = seconds(slurm.time) if slurm.time else None
    if limit is None or step_s is None or config.checkpoint.every == 0:
        return
    interval = config.checkpoint.every * step_s
    if interval > limit - slurm.save_s:
        most = max(1, int((limit - slurm.save_s) / step_s))
        speed = f"takes {interval:.0f} s at {step_s:.2f} s per step"
        reason = f"{speed}, too long for launch.slurm.time={slurm.time}"
        raise ConfigError("checkpoint.every", config.checkpoint.every, reason, [most])
