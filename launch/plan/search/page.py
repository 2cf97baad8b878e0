"""Write plan.html: the table of plans, their error bars, the pictures, and why other layouts were rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.files import write_text
from core.html import render
from launch.plan.memory import GIB
from launch.plan.search.finalists import LayoutPlan
from launch.plan.search.pictures import draw_plan
from launch.plan.search.report import NOT_TIMED, SearchReport
from launch.plan.search.uncertainty import short

_TEMPLATE = Path(__file__).with_name("plan.html")


def write_page(report: SearchReport, path: Path, usable: float, command: str) -> None:
    """Write the page. `usable`: bytes of a GPU that a run may allocate. `command`: trains with the best layout."""
    run, result, best = report.job.run, report.result, report.plans[0]
    content = render(
        _TEMPLATE,
        title=f"Plan for {short(report.parameters.total)} parameters on {report.world:,} {report.gpu.name}",
        subtitle=f"{run.global_batch_size:,} sequences of {run.seq_len:,} tokens per step; "
        f"the fullest expert rank gets {run.imbalance:g} times the mean",
        plans=[_row(report, plan) for plan in report.plans],
        time_bar=report.bar(best, "time").words,
        memory_bar=report.bar(best, "memory").words,
        note=NOT_TIMED if report.job.model.vision is not None else "",
        command=command,
        pictures=draw_plan(report, usable),
        counts=f"{result.tried:,} candidates had room for their training state; {result.fitting:,} of them fit.",
        rejected=[(reason, f"{count:,}") for reason, count in result.rejected.most_common()],
    )
    write_text(path, content)


def _row(report: SearchReport, plan: LayoutPlan) -> dict[str, Any]:
    time, memory = report.bar(plan, "time"), report.bar(plan, "memory")
    more = f"micro-batch {plan.micro_batch_size}, {plan.precision.value}, recompute={plan.layout.recompute.value}"
    return {
        "step": f"{plan.step_s:.2f} s",
        "step_between": f"{plan.step_s * time.low:.1f}-{plan.step_s * time.high:.1f}",
        "rate": f"{report.rate(plan):,.0f}",
        "mfu": f"{report.mfu(plan):.1%}",
        "memory": f"{plan.memory / GIB:.1f} GiB",
        "memory_between": f"{plan.memory / GIB * memory.low:.0f}-{plan.memory / GIB * memory.high:.0f}",
        "words": f"{plan.words}, {more}",
    }
