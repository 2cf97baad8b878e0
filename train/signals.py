"""Turn signals into a flag that the training loop reads between steps, so that it saves before it ends.

The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (SLURM's warning before the time
limit). The death of torchrun's agent sets the flag as well: orphaned workers would otherwise keep writing into a run
that has been restarted.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from core.exit_codes import has_agent, parent_watch


class SignalFlag:
    """A context in which these signals set `requested`. Outside the main thread it handles no signals."""

    def __init__(self) -> None:
        self._signalled = False
        self._previous: dict[int, Any] = {}
        self._agent_has_ended = parent_watch() if has_agent() else lambda: False

    @property
    def requested(self) -> bool:
        return self._signalled or self._agent_has_ended()

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
