"""Exit codes and environment common to ranks and their agents, and errors that another rank's failure causes."""

from __future__ import annotations

import os

INTERRUPTED = 130
"""The process ended because of a signal, after saving."""

CRASHED = 3
"""An unexpected error; the agent may restart the ranks. Only the agent sees this code; the user sees 1."""

HUNG = 4
"""A collective timed out (parallel/comm/watchdog.py); the agent may restart the ranks."""

ATTEMPT = "LEVIATHAN_ATTEMPT"
"""Environment variable: id of this attempt, equal on all ranks. Keys in torch.distributed's store begin with it."""


def host_name() -> str:
    """Return this machine's name, as SLURM calls it inside a job."""
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
