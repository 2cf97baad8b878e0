"""Training on this machine: in this process, or in several started by torchrun's agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from dataclasses import dataclass
from enum import Enum

import torch

from core.config import build
from core.errors import ConfigError, LeviathanError
from train.config import TrainConfig, check

INTERRUPTED = 130
_PATIENCE_S = "600"  # for ranks that save after Ctrl-C; torch would kill them after 30 s


class LaunchKind(Enum):
    inline = "inline"
    torchrun = "torchrun"


@dataclass(frozen=True)
class LaunchConfig:
    """`processes`: ranks on this machine; null: one per GPU, or per two cores where there is none."""

    kind: LaunchKind = LaunchKind.inline
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError("processes", self.processes, "must be positive")

    @property
    def ranks(self) -> int:
        return self.processes or torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // 2)


def train(config: TrainConfig, overrides: list[str]) -> int:
    """Train as `launch` says; returns the exit code. The configuration is checked here as far as one process can, so
    that an error comes once and before any rank is started.
    """
    launch = build(LaunchConfig, config.launch, "launch")
    if launch.kind is LaunchKind.inline and launch.processes is not None:
        raise ConfigError("launch.processes", launch.processes, "one process has no others; add launch=torchrun")
    if launch.kind is LaunchKind.inline:
        from train.trainer import run

        return run(config)
    check(config, launch.ranks)
    return _torchrun(launch.ranks, overrides)


def _torchrun(ranks: int, overrides: list[str]) -> int:
    """Do what `torchrun --standalone --nproc-per-node RANKS -m train OVERRIDES` does, with the agent in this process:
    that command ends with 1 whatever its workers say, here the first one's exit code is the run's.

    Ctrl-C and SIGTERM are passed on to the workers, which save; 130 then.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # told below instead
    os.environ["PYTHONSAFEPATH"] = "1"  # a train.py in the current folder would win against `-m train`
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE_S)
    agent = AgentConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the host's own name need not resolve
        max_restarts=0,
    )
    try:
        elastic_launch(agent, sys.executable)("-u", "-m", "train", *overrides)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
            advice = "the same command with the run's run.name goes on from its last checkpoint"
            raise LeviathanError(f"rank {rank} was ended by {how}; {advice}") from None
        return failure.exitcode
    return 0
