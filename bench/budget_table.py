"""Print the counts of `bench.budget` beside earlier ones, as docs/performance.md has them: `python -m
bench.budget_table`.
"""

from __future__ import annotations

from typing import Any

from bench import budget

LAUNCHES_BEFORE, SAVED_BEFORE, LOSS_BEFORE = {"1": 269, "8": 450, "32": 1074}, {"none": 294e3}, 20e9
"""The counts of commit ed0cbce of 2026-11-26: the same layer on meta tensors; the peak of the loss by arithmetic."""
MOST_LAUNCHES, MOST_LOSS = 139, 0.5e9
MOST_SAVED = {"none": 145e3, "selective": 80e3, "full": 12e3}
MOST_SAVED_FP8 = {"none": 161e3, "selective": 118e3, "full": 12e3}
MOST_RECOMPUTED = {"none": MOST_LAUNCHES, "selective": 145, "full": 182}
MOST_GATHERED, MOST_PREPARED, MOST_EP = 134, 33, 170
MOST_MOVED = {"_to_copy": 14e9, "add_": 26.5e9}
MOST_LOSS_LAUNCHES = {"": 213, "_tp2": 122}


def table(found: dict[str, Any]) -> str:
    """Return the counts of `bench.budget.report` as a Markdown table."""
    rows = [["what", "before", "now", "at most"], ["---", "---:", "---:", "---:"]]
    for documents, count in found["launches"].items():
        what = f"launches of a layer, {documents} document{'' if documents == '1' else 's'} a row"
        rows.append([what, *(f"{x:,}" for x in (LAUNCHES_BEFORE[documents], count, MOST_LAUNCHES))])
    layer = "launches of a layer, 32 documents a row"
    for mode in ("selective", "full"):
        count, most = found["launches_recompute"][mode], MOST_RECOMPUTED[mode]
        rows.append([f"{layer}, `recompute={mode}`", "", str(count), str(most)])
    rows.append(
        [f"{layer}, bf16 weights as FSDP2 gathers them", "", str(found["launches_gathered"]), str(MOST_GATHERED)]
    )
    rows.append([f"{layer}, one of 8 ranks of `ep`", "", str(found["launches_ep"]), str(MOST_EP)])
    prepared = max(found["launches_prepare"].values())
    rows.append(["launches once per micro-batch, for all layers", "", str(prepared), str(MOST_PREPARED)])
    for name, what in (("_to_copy", "cast"), ("add_", "add up")):
        moved = (_in(1e9, "GB", 1, x) for x in (None, found["moved_bytes"][name], MOST_MOVED[name]))
        rows.append([f"memory traffic of a layer to {what} gradients (`{name}`)", *moved])
    rows.append(["host synchronisations of a layer", "", str(found["syncs"]), "0"])
    rows.append(["host synchronisations of a layer, one of 8 ranks of `ep`", "", str(found["syncs_ep"]), "1"])
    rows.append(["host synchronisations of a layer, `precision=fp8`", "", str(found["syncs_fp8"]["none"]), "1"])
    for mode, count in found["saved_bytes"].items():
        what = f"activations a token keeps in a layer, `recompute={mode}`"
        rows.append([what, *(_in(1e3, "kB", 0, x) for x in (SAVED_BEFORE.get(mode), count, MOST_SAVED[mode]))])
    for mode, count in found["saved_bytes_fp8"].items():
        what = f"activations a token keeps in a layer, `precision=fp8`, `recompute={mode}`"
        rows.append([what, *(_in(1e3, "kB", 0, x) for x in (None, count, MOST_SAVED_FP8[mode]))])
    what = "peak memory of head and loss"
    rows.append([what, *(_in(1e9, "GB", 2, x) for x in (LOSS_BEFORE, found["loss_peak_bytes"], MOST_LOSS))])
    rows.append([f"{what}, `tp=2`", *(_in(1e9, "GB", 2, x) for x in (None, found["loss_peak_bytes_tp2"], MOST_LOSS))])
    for suffix, note in (("", ""), ("_tp2", ", `tp=2`")):
        count = found[f"loss_launches{suffix}"]
        rows.append([f"launches of head and loss{note}", "", f"{count:,}", str(MOST_LOSS_LAUNCHES[suffix])])
    rows.append(["host synchronisations of a step", "", str(found["step_syncs"]), "0"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _in(unit: float, name: str, digits: int, value: float | None) -> str:
    return "" if value is None else f"{value / unit:.{digits}f} {name}"


if __name__ == "__main__":
    print(table(budget.report()), end="")
