"""Exit codes and an environment variable for ranks and torchrun's agents, and errors that a lost rank causes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

DONE = 0
FAILED = 1
"""The command failed, or what it checks does not hold."""

INVALID = 2
"""The configuration is invalid."""

INTERRUPTED = 130
"""The process ended because of a signal. A training run saves first."""

CRASHED = 3
"""An unexpected error; the agent may restart the ranks. Only the agent sees this code; the user sees 1."""

HUNG = 4
"""A collective timed out (parallel/comm/watchdog.py); the agent may restart the ranks."""

ATTEMPT = "LEVIATHAN_ATTEMPT"
"""Environment variable: id of this start of the ranks, equal on all. Part of the key prefix in torch's store."""


AGENT = "LEVIATHAN_AGENT"
"""Environment variable of a rank: the process id of its agent."""


def parent_watch() -> Callable[[], bool]:
    """Return a function that tells whether the process that started this one has ended.

    Our agent tells its ranks its id, so that a rank also notices an agent that ended while the rank was starting.
    """
    parent, agent = os.getppid(), os.environ.get(AGENT, "")
    if has_agent() and agent.isdecimal():
        with suppress(PermissionError, OverflowError):
            try:
                os.kill(int(agent), 0)  # sends nothing
            except ProcessLookupError:
                return lambda: True
    return lambda: os.getppid() != parent


def has_agent() -> bool:
    """Return whether torchrun's agent, ours or another, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_rank() -> bool:
    """Return whether this process is one of several ranks."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def host_name() -> str:
    """Return this machine's name; inside a SLURM job, the node name that SLURM uses."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


class RankFailure(AssertionError):
    """A function that ran on several ranks raised an error on one of them, or did not return."""


_CONSEQUENCES = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "connectFullMesh",
    "Timed out",
    "Broken pipe",
    "Socket",
    "remote process exited",
    "recvValue failed",
)


def is_consequence(text: str) -> bool:
    """Return whether the last line of an error only says that another rank is gone."""
    lines = text.strip().splitlines()
    return bool(lines) and any(sign in lines[-1] for sign in _CONSEQUENCES)
