"""What the processes of a run and those that start them agree on: exit codes, and which error is only a neighbour's."""

from __future__ import annotations

import os

INTERRUPTED = 130
"""After a signal, with everything saved."""

CRASHED = 3
"""An error that nobody foresaw: the ranks may be started again. Between ranks and their agent only; a user sees 1."""

HUNG = 4
"""A collective waited too long (parallel/comm/watchdog.py): likewise."""

ATTEMPT = "LEVIATHAN_ATTEMPT"
"""Environment: the word of this attempt, the same on every rank; keys in the store begin with it."""


def host_name() -> str:
    """This machine, as SLURM calls it where SLURM has started us."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


class RankFailure(AssertionError):
    """A function that ran on several ranks raised on one of them, or did not end."""


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
    """Whether the last line of an error says no more than that another rank is gone."""
    lines = text.strip().splitlines()
    return bool(lines) and any(sign in lines[-1] for sign in _CONSEQUENCES)
