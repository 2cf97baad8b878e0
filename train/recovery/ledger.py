"""The ledger of recovery: recovery.jsonl in the run's directory, a line for each alarm, verdict and action.

A line is appended in one write before what it announces happens. A kill may truncate the last line, which the next
attempt removes.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.exit_codes import ATTEMPT
from core.files import misfit, read_text, write_text
from train.metrics import Log, append_or_log
from train.run_directory import parse_lines, unreadable

ALARM, NOTE, EVIDENCE, VERDICT, ACTION, STOP = "alarm", "note", "evidence", "verdict", "action", "stop"
"""The events, in the order of one recovery. `note`: a spike that healed by itself."""
FIELDS = ("detector", "statistics", "verdict", "action")
"""Fields of every line, null where they say nothing."""
SHAPE = {"time": float, "run": str, "attempt": str, "step": int, "event": str}


@dataclass
class Ledger:
    """Appends lines on rank 0; other ranks have no `path`. `identity`: a hash of what makes the run, in each line."""

    path: Path | None
    identity: str
    log: Log
    lines: list[dict[str, Any]] = field(default_factory=list)
    """All lines, including those of earlier attempts, which rank 0 reads."""

    def read(self) -> list[dict[str, Any]]:
        """Read the lines of earlier attempts, on rank 0. Raises `ConfigError` if they are damaged or of another run."""
        if self.path is None or not self.path.exists():
            return []
        try:
            text = read_text(self.path)
        except (OSError, UnreadableFileError) as error:
            raise unreadable(self.path, error) from None
        whole, cut, _ = text.rpartition("\n")
        if len(whole) + len(cut) < len(text):  # a kill has truncated the last line
            write_text(self.path, whole + cut)
        lines = []
        for number, line in enumerate(parse_lines(whole), 1):
            if line is None or misfit(line, SHAPE):
                reason = f"line {number} of {self.path} is damaged: remove the line, or move the file away"
                raise ConfigError("run.name", self.path.parent.name, reason)
            if line["run"] != self.identity:
                reason = f"{self.path} is of another run: move it away"
                raise ConfigError("run.name", self.path.parent.name, reason)
            lines.append(line)
        return lines

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append a line. A failure (a full disk) is logged and does not end the run; `lines` has the line anyway."""
        line = {
            "time": round(time.time(), 3),
            "run": self.identity,
            "attempt": os.environ.get(ATTEMPT, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "step": step,
            "event": event,
            **dict.fromkeys(FIELDS),
            **fields,
        }
        self.lines.append(line)
        if self.path is not None:
            append_or_log(self.path, line, self.log)
