"""The layouts that this version is certified under, as a table: `python -m bench.layouts` writes docs/certified.md.

Each layout with top-1 and top-2 routing, top-2 under each recompute mode, and checkpoints of one resumed under others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.config import load
from core.files import write_text
from core.package_guard import sources_digest
from launch.rank_pool import Pool
from model.config import ModelConfig
from parallel.layout import ContextMethod, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Backend, Compute, PrecisionConfig, Recipe
from train.certify import fp8
from train.certify.compare import EXACT, GRADIENT_FP32
from train.certify.plan import CertifyConfig, Trial, compare_layouts, shrink
from train.certify.worker import CertifyCase, RunOnRanks, run_cases
from train.optim.optimizer import OptimizerConfig

LAYOUTS = {
    "fsdp2": (2, ParallelConfig()),
    "hsdp 2x2": (4, ParallelConfig(dp_replicate=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "ep4": (4, ParallelConfig(ep=4)),
    "etp2": (2, ParallelConfig(etp=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2 + ep2": (2, ParallelConfig(tp=2, ep=2)),
    "ep2 + efsdp2": (4, ParallelConfig(ep=2)),
    "tp2 + ep2 + fsdp2": (8, ParallelConfig(tp=2, ep=2)),
    "cp2 gather": (2, ParallelConfig(cp=2)),
    "cp2 ulysses": (2, ParallelConfig(cp=2, cp_method=ContextMethod.ulysses)),
    "cp2 ring": (2, ParallelConfig(cp=2, cp_method=ContextMethod.ring)),
    "cp4": (4, ParallelConfig(cp=4)),
    "tp2 + cp2": (4, ParallelConfig(cp=2, tp=2)),
    "cp2 + ep2": (2, ParallelConfig(cp=2, ep=2)),
    "cp2 + fsdp2": (4, ParallelConfig(cp=2)),
    **{f"pp2 {schedule.name}": (2, ParallelConfig(pp=2, schedule=schedule)) for schedule in PipelineSchedule},
    "pp4": (4, ParallelConfig(pp=4)),
    "pp2 + ep2": (4, ParallelConfig(pp=2, ep=2)),
    "pp2 + tp2": (4, ParallelConfig(pp=2, tp=2)),
    "pp2 + cp2": (4, ParallelConfig(pp=2, cp=2)),
    "pp2 + cp2 zbv, ring": (4, ParallelConfig(pp=2, cp=2, schedule=PipelineSchedule.zbv, cp_method=ContextMethod.ring)),
    "pp2 + tp2 + ep2 + fsdp2": (8, ParallelConfig(pp=2, tp=2, ep=2)),
}
"""Name -> ranks and degrees."""
RESUMED = (
    "fsdp2",
    "hsdp 2x2",
    "ep4",
    "etp2",
    "tp2 + ep2 + fsdp2",
    "cp2 gather",
    "tp2 + cp2",
    "pp2 one_f_one_b",
    "pp2 zbv",
    "pp2 + cp2",
    "pp2 + tp2 + ep2 + fsdp2",
)
"""Those whose checkpoints are resumed under each other."""
FLOAT8 = ("fsdp2", "ep2", "tp2", "tp2 + ep2", "cp2 + ep2", "pp2 one_f_one_b", "pp2 zbv", "pp2 + ep2")
"""Those certified with FP8 products; the recipes beside blockwise under some of them."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "certified.md"


def tiny(top_k: int) -> ModelConfig:
    """The smoke model, shrunk."""
    model = shrink(load("certify", CertifyConfig, []).model)
    return replace(model, router=replace(model.router, top_k=top_k))


def deep(top_k: int) -> ModelConfig:
    """The same with a layer for each stage of every pipeline here."""
    small = tiny(top_k)
    layers = [small.blocks[index % small.num_layers] for index in range(4)]
    return replace(small, num_layers=len(layers), layer_list=layers)


def proofs(ranks: RunOnRanks) -> Iterator[tuple[str, int, Recompute, bool, float, float]]:
    """Layout, top-k, recompute mode, whether all comparisons hold, and the largest differences in both formats.
    Recomputation is tried with top-2.
    """
    for top_k in (1, 2):
        for mode in Recompute if top_k == 2 else (Recompute.none,):
            layouts = [Trial((), replace(config, recompute=mode), count) for count, config in LAYOUTS.values()]
            for name, outcome in zip(LAYOUTS, compare_layouts(deep(top_k), layouts, 3, ranks), strict=True):
                yield name, top_k, mode, outcome.passed, outcome.largest(EXACT), outcome.largest(GRADIENT_FP32)


def resumes(ranks: RunOnRanks, names: list[str]) -> Iterator[tuple[str, str, float]]:
    """Written under, resumed under, and by how much the next two losses differ at most from one process's run that was
    not interrupted (relative, float64, AdamW). The first shows lost weights, the second lost moments.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = CertifyCase(deep(2), PrecisionConfig(Compute.float64), OptimizerConfig(lr=1e-2), clip_norm=0.05, steps=3)
        whole = replace(run, steps=4)
        wanted = ranks(1, run_cases, ParallelConfig(), {"run": whole})[0]["run"].loss[2:]
        for name in names:
            count, config = LAYOUTS[name]
            ranks(count, run_cases, config, {"run": replace(run, save=Path(folder) / name)})
        for name in names:
            count, config = LAYOUTS[name]
            cases = {other: replace(whole, resume=Path(folder) / other) for other in names}
            found = ranks(count, run_cases, config, cases)
            for other in names:
                pairs = zip(found[0][other].loss, wanted, strict=True)
                yield other, name, max(abs(a - b) / b for a, b in pairs)


def float8_proofs(ranks: RunOnRanks) -> Iterator[tuple[str, str, bool, float | None, float]]:
    """Layout, recipe, whether all holds, the largest difference of products with the same tiles (None: there are none),
    and the largest error of a gradient over one process's.
    """
    for recipe in (Recipe.blockwise, Recipe.tensorwise, Recipe.rowwise, Recipe.mxfp8):
        for name in FLOAT8 if recipe is Recipe.blockwise else ("ep2", "tp2", "pp2 zbv"):
            count, parallel = LAYOUTS[name]
            precision = PrecisionConfig(Compute.bfloat16, backend=Backend.emulated, recipe=recipe)
            model = shrink(tiny(1), parallel, fp8.TILE)
            found = list(fp8.compare_fp8(model, precision, parallel, count, ranks))
            exact = [one.largest for one in found if one.gate == EXACT]
            error = next(one.largest for one in found if one.gate == fp8.ERROR)
            yield name, recipe.value, all(one.passed for one in found), max(exact, default=None), error


def main() -> None:
    pool = Pool()
    try:
        proven = list(_told(proofs(pool)))
        resumed = list(_told(resumes(pool, list(RESUMED))))
        eight = list(_told(float8_proofs(pool)))
    finally:
        pool.close()
    lines = [
        "# Certified layouts",
        "",
        "Made by `python -m bench.layouts`; not edited by hand. Each row: a shrunk smoke model, packed documents,",
        "every balancing term on, against one process. The figures are the largest difference of anything compared",
        "(losses, every parameter's gradient, clip norm, each balancing term alone, updated weights, evaluation,",
        "resumed runs): float64 must stay below 1e-9, float32 gradients below 1e-5, float32 losses below 5e-6.",
        "",
        f"Code {sources_digest()}, torch {torch.__version__}.",
        "",
        "| layout | top-k | recompute | holds | float64 | float32 gradients |",
        "|---|---|---|---|---|---|",
        *(f"| {n} | {k} | {m.value} | {'yes' if p else 'NO'} | {a:.1e} | {b:.1e} |" for n, k, m, p, a, b in proven),
        "",
        "## A checkpoint written under one layout, resumed under another",
        "",
        "The largest relative difference of the next two losses from one process's run that was not interrupted",
        "(float64, AdamW).",
        "",
        f"| written \\ resumed | {' | '.join(RESUMED)} |",
        "|---" * (len(RESUMED) + 1) + "|",
        *(
            f"| {written} | {' | '.join(f'{d:.0e}' for w, _, d in resumed if w == written)} |"
            for written in RESUMED
        ),
        "",
        "## FP8",
        "",
        "Products in FP8 by the reference, float64 otherwise. Where a layout cuts no tile its bytes are one process's,",
        "so everything is (1e-9 allowed); elsewhere no gradient may be farther from what it is without FP8 than 1.5",
        "times what one process's is.",
        "",
        "| layout | recipe | holds | same tiles | error over one process's |",
        "|---|---|---|---|---|",
        *(
            f"| {n} | {r} | {'yes' if p else 'NO'} | {'-' if same is None else f'{same:.1e}'} | {error:.2f} |"
            for n, r, p, same, error in eight
        ),
        "",
    ]  # fmt: skip
    write_text(PAGE, "\n".join(lines))
    holds = [row[3] for row in proven] + [row[2] <= EXACT for row in resumed] + [row[2] for row in eight]
    if not all(holds):
        raise SystemExit("not everything holds: see docs/certified.md")


def _told(rows: Iterator[Any]) -> Iterator[Any]:
    for row in rows:
        print(*row, flush=True)
        yield row


if __name__ == "__main__":
    main()
