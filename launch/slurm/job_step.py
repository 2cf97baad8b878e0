"""One node of a SLURM job: `python -m launch.slurm.job_step train|doctor FOLDER`, started by srun on each node.

Its exit codes are for launch/slurm/requeue.py. srun hands on the largest of all nodes: what forbids another try
is larger than what a try may mend.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.agent import Node

FAILED_NODE = 97
"""The doctor found a node that should not be used."""
WARNED = 99
"""Saved after SLURM's warning; to be queued again."""
FINAL = 100
"""Plus the run's own exit code: an error that would come again."""
CANCELLED = 130
"""Saved after SIGTERM: somebody, or SLURM, wants this job to end."""
PORTS = range(20000, 60000)


def main(arguments: list[str]) -> int:
    """Run this node's ranks; returns a code for launch/slurm/requeue.py."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that went with its node is told in a line
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(WARNED))  # until the agent listens
    what, folder = arguments[0], Path(arguments[1])
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    from core.exit_codes import CRASHED, host_name

    if not (folder / f"config-{task}.yaml").exists():
        reason = "the job's folder must be on a file system that all nodes share (launch.slurm.directory)"
        print(f"leviathan: error: {host_name()} does not see {folder}: {reason}", file=sys.stderr)
        return FINAL + 2
    from core.errors import LeviathanError
    from core.package_guard import drop_working_directory
    from launch.agent import AgentInterrupted, NodesNotMet, Unreachable, run

    drop_working_directory()
    try:
        described = node(what, folder, task)
    except LeviathanError as error:  # the same on every node
        if os.environ.get("SLURM_NODEID") == "0":
            print(f"leviathan: error: {error}", file=sys.stderr)
        return FINAL + error.exit_code
    try:
        code = run(described)
    except AgentInterrupted as error:
        return WARNED if error.signal_number == signal.SIGUSR1 else CANCELLED
    except LeviathanError as error:
        print(f"leviathan: error: {host_name()}: {error}", file=sys.stderr)
        code = (
            CRASHED if isinstance(error, NodesNotMet | Unreachable) else error.exit_code
        )  # another try has another port
    return code_for(code)


def code_for(code: int) -> int:
    """What the ranks' own exit code says about another try."""
    from core.exit_codes import CRASHED, INTERRUPTED

    if code == INTERRUPTED:  # the ranks were warned, and this program was not, or later
        return WARNED
    if code in (1, 2):
        return FINAL + code
    return code if code in (0, FAILED_NODE) else CRASHED


def node(what: str, folder: Path, task: int) -> Node:
    """The part of this node, from what SLURM's environment and the submitted configuration say. Raises `ConfigError`
    where they do not go together.
    """
    from core.config import build
    from core.errors import ConfigError
    from launch.agent import Node
    from launch.config import LaunchConfig
    from train.run_directory import RunDirectory, read_config

    environment = os.environ
    path = folder / f"config-{task}.yaml"
    config = read_config(path)
    launch = build(LaunchConfig, config.launch, "launch")
    given = int(environment["SLURM_JOB_NUM_NODES"])
    if given != launch.nodes:
        reason = f"SLURM has given the job {given}: launch.slurm.options must not ask for another number"
        raise ConfigError("launch.nodes", launch.nodes, reason, [given])
    job, attempt = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    port = PORTS[(int(job) * 101 + int(attempt) * 13 + (what == "doctor")) % len(PORTS)]
    module = {
        "train": ("-m", "train", "--config", str(path)),
        "doctor": ("-m", "launch.diagnose.nodes", str(path), str(folder / f"doctor-{task}")),
    }
    return Node(
        command=module[what],
        ranks=launch.ranks_per_node,
        logs=RunDirectory.of(config).logs if what == "train" else folder / f"doctor-{task}" / "logs",
        nodes=launch.nodes,
        is_first=environment["SLURM_NODEID"] == "0",
        rendezvous=(environment["SLURM_LAUNCH_NODE_IPADDR"], port) if launch.nodes > 1 else None,
        restarts=launch.restarts if what == "train" else 0,
        job=f"{job}-{attempt}-{what}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
