"""Write the audit of a curation: `audit.json`, `entries.parquet` with the matches of each entry, and the balance curve.

Shapes: E entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files import write_bytes, write_json
from core.plotting import COLOURS, figure, png
from data.curation.balance import keep_probabilities
from data.curation.config import CurationRules
from data.curation.matching import Metadata
from data.curation.tally import Fate
from data.filter.store import writing

AUDIT, CURVE, ENTRIES = "audit.json", "balance.png", "entries.parquet"
_MOST_SHOWN = 20
"""Most frequent entries that the audit lists."""
_POINTS = 2000
"""Points of a curve."""


def write_audit_files(
    folder: Path,
    metadata: Metadata,
    rules: CurationRules,
    before_E: NDArray[np.int64],
    after_E: NDArray[np.int64],
    files: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Write the three files and return what audit.json holds. `before_E`, `after_E`: matches of each entry in all pairs
    and in the kept ones. `files`: what `FileTally.plain` says of each file.
    """
    fates = sum((Counter(one["fates"]) for one in files), Counter[str]())
    frequent = np.argsort(-before_E, kind="stable")[:_MOST_SHOWN]
    audit = {
        "rules": asdict(rules),
        "metadata": {
            "fingerprint": metadata.fingerprint,
            "entries": len(metadata.entries),
            "repeated": metadata.repeated,
            "impossible": len(metadata.impossible),
            "unmatched": int((before_E == 0).sum()),
            "above_t": int((before_E > rules.t).sum()),
        },
        "records": {"all": sum(fates.values()), **{fate.name: fates[fate.name] for fate in Fate}},
        "matches": {
            "before": int(before_E.sum()),
            "after": int(after_E.sum()),
            "tail_before": _tail_share(before_E, before_E, rules.t),
            "tail_after": _tail_share(after_E, before_E, rules.t),
        },
        "frequent": [
            {"entry": metadata.entries[n], "before": int(before_E[n]), "after": int(after_E[n])} for n in frequent
        ],
        "files": list(files),
    }
    with writing(folder):
        write_json(folder / AUDIT, audit)
        write_bytes(folder / CURVE, balance_curve(before_E, after_E, rules.t))
        _write_entries(folder / ENTRIES, metadata, before_E, after_E, rules.t)
    return audit


def _tail_share(counts_E: NDArray[np.int64], before_E: NDArray[np.int64], t: int) -> float:
    """Return the share of the matches that belongs to entries with at most `t` of them before balancing."""
    return float(counts_E[before_E <= t].sum() / max(1, counts_E.sum()))


def _write_entries(
    path: Path, metadata: Metadata, before_E: NDArray[np.int64], after_E: NDArray[np.int64], t: int
) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "entry": list(metadata.entries),
        "before": before_E,
        "after": after_E,
        "probability": keep_probabilities(before_E, t),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def balance_curve(before_E: NDArray[np.int64], after_E: NDArray[np.int64], t: int) -> bytes:
    """Draw the cumulative matches over the matched entries, from the rarest to the most frequent, as a PNG."""
    order = np.argsort(before_E, kind="stable")[(before_E == 0).sum() :]
    rank = np.arange(1, len(order) + 1)
    shown = np.unique(np.linspace(0, len(order) - 1, _POINTS).astype(int)) if len(order) else rank
    with figure(6.4, 3.6) as (drawn, (axes,)):
        for name, counts_E, colour in (("before", before_E, COLOURS[0]), ("after", after_E, COLOURS[1])):
            axes.plot(rank[shown], counts_E[order].cumsum()[shown], color=colour, label=name)
        tail = int((before_E[order] <= t).sum())
        axes.axvline(tail, color="0.6", linewidth=1, linestyle="--", label=f"{t:,} matches (t)")
        axes.set(xlabel="entries, from the rarest to the most frequent", ylabel="matches, cumulative", ylim=(0, None))
        axes.legend(frameon=False)
        return png(drawn)


def summary(audit: dict[str, Any]) -> list[str]:
    """Return the lines that the command prints: the records and the balance, and one line for each problem."""
    records, matches, entries = audit["records"], audit["matches"], audit["metadata"]
    dropped = [f"{fate.name.replace('_', ' ')} {records[fate.name]:,}" for fate in Fate if fate is not Fate.kept]
    lines = [
        f"kept {records['kept']:,} of {records['all']:,} records: {', '.join(dropped)}",
        f"matches: {matches['before']:,} before and {matches['after']:,} after balancing; of entries with at most t"
        f" {matches['tail_before']:.1%} and {matches['tail_after']:.1%}",
    ]
    if entries["impossible"]:
        advice = "captions have spaces around , . ; : ? ! `, so entries need them too"
        lines.append(f"warning: entries that no caption can match: {entries['impossible']:,}; {advice}")
    problems = [problem for one in audit["files"] for problem in one["problems"]]
    lines += [f"warning: {problem}" for problem in problems[:_MOST_SHOWN]]
    if len(problems) > _MOST_SHOWN:
        lines.append(f"warning: {len(problems) - _MOST_SHOWN:,} more problems are in {AUDIT}")
    return lines
