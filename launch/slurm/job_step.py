"""Run one node of a SLURM job. srun starts `python -m launch.slurm.job_step train|doctor FOLDER` on each node.

launch/slurm/requeue.py reads the exit code. srun returns the largest code of all nodes, so codes that forbid another
attempt are larger than codes that allow one.
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
"""The doctor found a faulty node."""
WARNED = 99
"""The run has saved after SLURM's warning; requeue the job."""
FINAL = 100
"""Added to the run's own exit code after an error that another attempt would repeat."""
CANCELLED = 130
"""The run has saved after SIGTERM, from SLURM or a user."""
PORTS = range(20000, 60000)


def main(arguments: list[str]) -> int:
    """Run this node's ranks; return a code for launch/slurm/requeue.py."""
    from core.errors import LeviathanError
    from core.exit_codes import CRASHED, host_name
    from core.process import report
    from launch.agent import AgentInterrupted, NodesNotMet, Unreachable, run
    from launch.slurm.job import record_this_job

    what, folder = arguments[0], Path(arguments[1])
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    if not (folder / f"config-{task}.yaml").exists():
        reason = "the job's folder must be on a file system that all nodes share (launch.slurm.directory)"
        report(LeviathanError(f"{host_name()} does not see {folder}: {reason}"))
        return FINAL + 2
    try:
        described = node(what, folder, task)
    except LeviathanError as error:  # every node raises the same error
        if os.environ.get("SLURM_NODEID") == "0":
            report(error)
        return FINAL + error.exit_code
    if described.is_first:
        record_this_job(folder)
        if what == "train":
            predict(folder / f"config-{task}.yaml")
    try:
        return code_for(run(described))
    except AgentInterrupted as error:
        return WARNED if error.signal_number == signal.SIGUSR1 else CANCELLED
    except (NodesNotMet, Unreachable) as error:  # another attempt may succeed: it uses another port
        report(error, host_name())
        return CRASHED
    except LeviathanError as error:
        report(error, host_name())
        return code_for(error.exit_code)


def predict(path: Path) -> None:
    """Print and store what the planner predicts for a submitted configuration, if this node has a GPU."""
    import torch

    if torch.cuda.is_available():
        from core.config import build
        from launch.config import LaunchConfig
        from launch.plan.search.predict import announce
        from train.run_directory import read_config

        config = read_config(path)
        announce(config, build(LaunchConfig, config.launch, "launch"))


def code_for(code: int) -> int:
    """Convert the ranks' exit code to one for launch/slurm/requeue.py."""
    from core.exit_codes import CRASHED, INTERRUPTED

    if code == INTERRUPTED:  # the ranks got the warning, perhaps before this process
        return WARNED
    if code in (1, 2):
        return FINAL + code
    return code if code in (0, FAILED_NODE) else CRASHED


def node(what: str, folder: Path, task: int) -> Node:
    """Describe this node from SLURM's environment and the submitted configuration. Raises `ConfigError` if they do not
    match.
    """
    from core.config import build
    from core.errors import ConfigError
    from launch.agent import Node
    from launch.config import LaunchConfig
    from train.run_directory import RunDirectory, read_config

    path = folder / f"config-{task}.yaml"
    config = read_config(path)
    launch = build(LaunchConfig, config.launch, "launch")
    given = int(os.environ["SLURM_JOB_NUM_NODES"])
    if given != launch.nodes:
        reason = f"SLURM allocated {given} nodes: launch.slurm.options must not request another number"
        raise ConfigError("launch.nodes", launch.nodes, reason, [given])
    job, attempt = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
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
        is_first=os.environ["SLURM_NODEID"] == "0",
        rendezvous=(os.environ["SLURM_LAUNCH_NODE_IPADDR"], port) if launch.nodes > 1 else None,
        restarts=launch.restarts if what == "train" else 0,
        job=f"{job}-{attempt}-{what}",
    )


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the agent reports a lost store in one line
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(WARNED))  # until the agent handles the signal
    from core.process import run_process

    sys.exit(run_process(main))
