"""Tell in words what a run's ledger of recovery says. The file is not trusted: only expected fields are shown."""

from __future__ import annotations

from typing import Any, NamedTuple

from core.errors import counted, printable
from core.files import misfit

LINE = {
    "step": int,
    "event": str,
    "detector": (str, None),
    "statistics?": (None, {}),
    "verdict?": (str, None),
    "action?": (str, None),
    "trial?": (str, None),
    "outcome?": {},
    "documents?": [{"source": str, "start": int, "stop": int, "step": int, "name": (str, None)}],
    "checkpoint?": (int, None),
    "tokens_lost?": int,
}
SHOWN, LONGEST = 500, 400
"""Lines of a ledger, and characters of a cell, that are shown."""


class LedgerRow(NamedTuple):
    """A line of the ledger as a row of the report."""

    step: int
    event: str
    detector: str
    text: str


def ledger_rows(lines: list[dict[str, Any]]) -> list[LedgerRow]:
    """Return a row for each of the last lines that has the form of the ledger's."""
    sound = [line for line in lines[-SHOWN:] if not misfit(line, LINE)]
    return [
        LedgerRow(line["step"], printable(line["event"]), printable(line["detector"] or ""), _text(line)[:LONGEST])
        for line in sound
    ]


def _text(line: dict[str, Any]) -> str:
    parts = []
    statistics, outcome = line.get("statistics") or {}, line.get("outcome") or {}
    if line.get("trial"):
        parts.append(f"{line['trial']}:")
    if line.get("verdict"):
        parts.append(f"{line['verdict']}:")
    if line.get("action"):
        parts.append(line["action"])
    if line.get("checkpoint") is not None:
        parts.append(f"checkpoint {line['checkpoint']}")
    parts += [f"{key} {_short(value)}" for key, value in (statistics | outcome).items() if key != "documents"]
    for one in line.get("documents", [])[:5]:
        name = one["name"] or f"tokens {one['start']:,} to {one['stop']:,}"
        parts.append(f"{name} of {one['source']}, read by step {one['step']}")
    if "tokens_lost" in line:
        parts.append(f"{counted(line['tokens_lost'], 'token')} lost")
    return printable(" ".join(f"{part}," if not part.endswith(":") else part for part in parts).rstrip(","))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:LONGEST]
