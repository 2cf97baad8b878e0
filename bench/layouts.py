"""Certify all layouts: `python -m bench.layouts [LAYOUT ...]` writes the table docs/certified.md.

Each layout is certified with top-1 and top-2 routing, and with top-2 routing under each recompute mode. Checkpoints of
some layouts are resumed under others. If layouts are named, only these are certified and no file is written.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.config import load
from core.files import write_text
from core.package_guard import sources_digest
from launch.rank_pool import Pool
from model.config import ModelConfig
from parallel.layout import ContextMethod, GatherExperts, ParallelConfig, Recompute, ReduceEvery
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Backend, Compute, PrecisionConfig, Recipe
from train.certify import fp8
from train.certify.compare import EXACT, GRADIENT_FP32
from train.certify.config import CertifyConfig
from train.certify.plan import Trial, compare_layouts, shrink
from train.certify.worker import CertifyCase, RunOnRanks, run_cases
from train.optim.config import OptimizerConfig

LAYOUTS = {
    "fsdp2": (2, ParallelConfig()),
    "hsdp 2x2": (4, ParallelConfig(dp_replicate=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "ep4": (4, ParallelConfig(ep=4)),
    "ep4 by node": (4, ParallelConfig(ep=4, exchange_node_size=2)),
    "etp2": (2, ParallelConfig(etp=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2 + ep2": (2, ParallelConfig(tp=2, ep=2)),
    "ep2 + efsdp2": (4, ParallelConfig(ep=2)),
    "ep2 + efsdp2, gradients reduced once": (4, ParallelConfig(ep=2, reduce_every=ReduceEvery.step)),
    "ep2 + efsdp2, experts gathered once": (4, ParallelConfig(ep=2, gather_experts=GatherExperts.step)),
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
"""The number of ranks and the parallel degrees of each layout, by name."""
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
"""Layouts whose checkpoints are resumed under every one of these layouts."""
FLOAT8 = ("fsdp2", "ep2", "tp2", "tp2 + ep2", "cp2 + ep2", "pp2 one_f_one_b", "pp2 zbv", "pp2 + ep2")
"""Layouts certified with FP8 matmuls in the blockwise recipe. The other recipes are certified under fewer layouts."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "certified.md"


def tiny(top_k: int) -> ModelConfig:
    """Return the shrunk smoke model with `top_k` experts per token."""
    model = shrink(load("certify", CertifyConfig, []).model)
    return replace(model, router=replace(model.router, top_k=top_k))


def deep(top_k: int) -> ModelConfig:
    """Return the model of `tiny` with four layers: one per stage of the deepest pipeline in LAYOUTS."""
    small = tiny(top_k)
    layers = [small.blocks[index % small.num_layers] for index in range(4)]
    return replace(small, num_layers=len(layers), layer_list=layers)


def certified_layouts(
    ranks: RunOnRanks, names: Sequence[str]
) -> Iterator[tuple[str, int, Recompute, bool, float, float]]:
    """Yield the layout, top-k, recompute mode, whether all comparisons pass, and the largest differences in float64 and
    float32. Recompute modes are tried with top-2 only.
    """
    for top_k in (1, 2):
        for mode in Recompute if top_k == 2 else (Recompute.none,):
            chosen = [LAYOUTS[name] for name in names]
            layouts = [Trial((), replace(config, recompute=mode), count) for count, config in chosen]
            for name, outcome in zip(names, compare_layouts(deep(top_k), layouts, 3, ranks), strict=True):
                yield name, top_k, mode, outcome.passed, outcome.largest(EXACT), outcome.largest(GRADIENT_FP32)


def resumes(ranks: RunOnRanks, names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Yield the layout that saved, the layout that resumed, and the largest relative difference of the next two losses
    from an uninterrupted run in one process (float64, AdamW). The first loss detects lost weights, the second detects
    lost moments.
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


def certified_fp8(ranks: RunOnRanks, names: Sequence[str]) -> Iterator[tuple[str, str, bool, float | None, float]]:
    """Yield the layout, the recipe, whether all comparisons pass, the largest difference of matmuls with the same tiles
    as in one process (None without such matmuls), and the largest ratio of a gradient's error to that in one process.
    """
    for recipe in (Recipe.blockwise, Recipe.tensorwise, Recipe.rowwise, Recipe.mxfp8):
        for name in FLOAT8 if recipe is Recipe.blockwise else ("ep2", "tp2", "pp2 zbv"):
            if name not in names:
                continue
            count, parallel = LAYOUTS[name]
            precision = PrecisionConfig(Compute.bfloat16, backend=Backend.emulated, recipe=recipe)
            model = shrink(tiny(1), parallel, fp8.TILE)
            found = list(fp8.compare_fp8(model, precision, parallel, count, ranks))
            exact = [one.largest for one in found if one.gate == EXACT]
            error = next(one.largest for one in found if one.gate == fp8.ERROR)
            yield name, recipe.value, all(one.passed for one in found), max(exact, default=None), error


def main(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise SystemExit(f"unknown layout {unknown[0]!r}; choose from {', '.join(LAYOUTS)}")
    pool, chosen = Pool(), list(names) or list(LAYOUTS)
    try:
        layouts = list(_printed(certified_layouts(pool, chosen)))
        resumed = list(_printed(resumes(pool, [name for name in RESUMED if name in chosen])))
        eight = list(_printed(certified_fp8(pool, chosen)))
    finally:
        pool.close()
    passed = [row[3] for row in layouts] + [row[2] <= EXACT for row in resumed] + [row[2] for row in eight]
    if not names:
        write_text(PAGE, _page(layouts, resumed, eight))
    if not all(passed):
        raise SystemExit("some comparisons failed: see the rows with False or NO")


def _page(
    layouts: Sequence[tuple[str, int, Recompute, bool, float, float]],
    resumed: Sequence[tuple[str, str, float]],
    eight: Sequence[tuple[str, str, bool, float | None, float]],
) -> str:
    lines = [
        "# Certified layouts",
        "",
        "Generated by `python -m bench.layouts`; do not edit. Each row compares a layout with one process: a shrunk",
        "smoke model, packed documents, every balancing term. The figures are the largest difference of anything",
        "compared: losses, gradients of every parameter, gradient norm, each balancing term alone, updated weights,",
        "evaluation, resumed runs. Gates: 1e-9 in float64; in float32 1e-5 for gradients and 5e-6 for losses. A layout",
        "passes only if a recorded run has no race between streams, no deadlock and no late gather.",
        "",
        f"Code {sources_digest()}, torch {torch.__version__}.",
        "",
        "| layout | top-k | recompute | passed | float64 | float32 gradients |",
        "|---|---|---|---|---|---|",
        *(f"| {n} | {k} | {m.value} | {'yes' if p else 'NO'} | {a:.1e} | {b:.1e} |" for n, k, m, p, a, b in layouts),
        "",
        "## Checkpoints saved under one layout, resumed under another",
        "",
        "The largest relative difference of the next two losses from an uninterrupted run in one process (float64,",
        "AdamW).",
        "",
        f"| saved \\ resumed | {' | '.join(RESUMED)} |",
        "|---" * (len(RESUMED) + 1) + "|",
        *(
            f"| {written} | {' | '.join(f'{d:.0e}' for w, _, d in resumed if w == written)} |"
            for written in RESUMED
        ),
        "",
        "## FP8",
        "",
        "Emulated FP8 products, float64 otherwise. If a layout cuts no tile, its bytes are those of one process, and",
        "everything else agrees (gate 1e-9). Otherwise the error of each gradient, relative to training without FP8,",
        "may be at most 1.5 times its error in one process.",
        "",
        "| layout | recipe | passed | same tiles | error over one process's |",
        "|---|---|---|---|---|",
        *(
            f"| {n} | {r} | {'yes' if p else 'NO'} | {'-' if same is None else f'{same:.1e}'} | {error:.2f} |"
            for n, r, p, same, error in eight
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _printed(rows: Iterator[Any]) -> Iterator[Any]:
    for row in rows:
        print(*row, flush=True)
        yield row


if __name__ == "__main__":
    main(sys.argv[1:])
