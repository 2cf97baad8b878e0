"""Training on this machine: in this process, or in several started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum

import torch

from core.config import build
from core.errors import ConfigError
from train.config import TrainConfig, check


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
    """Train as `launch` says. The configuration has been checked as far as one process can, so that an error comes once
    and with exit code 2, whatever torchrun makes of its workers'.
    """
    launch = build(LaunchConfig, config.launch, "launch")
    if launch.kind is LaunchKind.inline:
        from train.trainer import run

        return run(config)
    check(config, launch.ranks)
    return _torchrun(launch.ranks, overrides)


def _torchrun(ranks: int, overrides: list[str]) -> int:
    """Start torchrun and pass Ctrl-C on: it interrupts its workers, which save. Returns 130 then.

    A worker's exit code 2 or 130 is found in the error that torchrun reports last, since torchrun itself returns 1.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment.setdefault("TORCHELASTIC_ERROR_FILE", "")
    process = subprocess.Popen([*command, "-m", "train", *overrides], env=environment)
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            if not interrupted:
                process.send_signal(signal.SIGINT)
            interrupted = True
    return 130 if interrupted else code
