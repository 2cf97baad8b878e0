"""Print the counts of `bench.budget` beside earlier ones, as docs/performance.md has them: `python -m
bench.budget_table`.
"""

from __future__ import annotations

from typing import Any

from bench import budget

BEFORE = {"launches": {"1": 269, "8": 450, "32": 1074}, "saved": {"none": 294e3}, "loss": 20e9}
"""The counts of commit ed0cbce of 2026-11-26: the same layer on meta tensors; the peak of the loss by arithmetic."""
MOST_LAUNCHES, MOST_SAVED, MOST_LOSS = 150, {"none": 185e3, "selective": 80e3, "full": 12e3}, 1.5e9


def table(found: dict[str, Any]) -> str:
    """Return the counts of `bench.budget.report` as a Markdown table."""
    rows = [("what", "before", "now", "at most"), ("---", "---:", "---:", "---:")]
    for documents, count in found["launches"].items():
        before = f"{BEFORE['launches'][documents]:,}"
        name = "document" if documents == "1" else "documents"
        rows.append((f"launches of a layer, {documents} {name} a row", before, f"{count:,}", f"{MOST_LAUNCHES:,}"))
    rows.append(("host synchronisations of a layer", "", f"{found['syncs']}", "0"))
    for mode, count in found["saved_bytes"].items():
        before = BEFORE["saved"].get(mode)
        cells = [f"{x / 1e3:.0f} kB" if x else "" for x in (before, count, MOST_SAVED[mode])]
        rows.append((f"activations a token keeps in a layer, `recompute={mode}`", *cells))
    for key, name in (("loss_peak_bytes", ""), ("loss_peak_bytes_tp2", ", `tp=2`")):
        before = BEFORE["loss"] if key == "loss_peak_bytes" else None
        cells = [f"{x / 1e9:.2f} GB" if x else "" for x in (before, found[key], MOST_LOSS)]
        rows.append((f"peak memory of head and loss{name}", *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    print(table(budget.report()), end="")
