"""Enumerate layouts and the choices beside them, as arrays. Layouts that no rule allows are counted by their reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from core.errors import divisors
from launch.plan.cluster import Generation, Gpu
from launch.plan.search.config import PlanPrecision, SearchConfig
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import INDIVISIBLE, SCHEDULES, Columns, LayoutRule, candidate_rules, layout_rules
from parallel.layout import Recompute
from parallel.pipeline.stages import PipelineSchedule

Table = dict[str, np.ndarray]
RECOMPUTE = list(Recompute)
SHORTEST_PART = 1024
"""Tokens of the shortest part of a sequence that the search tries."""
STATE_TOO_LARGE = "weights, gradients and optimizer state do not fit"
BLOCK = 400_000
"""Candidates that are evaluated together."""


def layouts(outline: ModelOutline, gpu: Gpu, world: int, search: SearchConfig, rejected: Counter[str]) -> Table:
    """Return the layouts that the rules allow, a column per degree. `rejected` counts the others by reason."""
    every = divisors(world)
    inside = [d for d in every if d <= gpu.domain]
    part = [d for d in every if outline.run.seq_len // d >= SHORTEST_PART or d == 1]
    allowed = {
        "pp": search.pp or every,
        "dp_replicate": search.dp_replicate or every,
        "cp": search.cp or part,
        "tp": search.tp or inside,
        "ep": search.ep or every,
        "etp": search.etp or inside,
    }
    rules, names = layout_rules(outline, world), list(allowed)
    table: Table = {}
    for at, (name, values) in enumerate(allowed.items()):
        rest = 1
        for later in names[at + 1 :]:
            rest *= len(set(allowed[later]))
        choices = np.unique(np.array(values, dtype=np.int64))
        fitting = choices[world % choices == 0]
        rejected[INDIVISIBLE] += (len(choices) - len(fitting)) * (len(table[names[0]]) if at else 1) * rest
        table = _crossed(table, {name: fitting})
        for rule in rules:
            if name in rule.needs and rule.needs <= table.keys():
                table = _kept(table, rule, rejected, rest)
    table["dp_shard"] = world // (table["pp"] * table["dp_replicate"] * table["cp"] * table["tp"])
    table["dp"] = table["dp_replicate"] * table["dp_shard"]
    table["sequences"] = outline.run.global_batch_size // table["dp"]
    table["fsdp"] = table["dp_shard"] * table["cp"]
    table["efsdp"] = table["fsdp"] * table["tp"] // (table["ep"] * table["etp"])
    return table


def candidates(
    outline: ModelOutline,
    gpu: Gpu,
    table: Table,
    search: SearchConfig,
    rejected: Counter[str],
    has_room: Callable[[Columns], np.ndarray],
) -> Iterator[Table]:
    """Yield blocks of candidates: layouts with schedules, reductions, recomputation, precision and micro-batches. The
    column `layout` has the row of the layout. `has_room`: whether the training state alone fits.
    """
    table = {**table, "layout": np.arange(len(table["pp"]))}
    rules = candidate_rules(outline, 32 if gpu.generation is Generation.blackwell else 16)
    room = LayoutRule(STATE_TOO_LARGE, frozenset(), has_room)
    choices: dict[str, Sequence[int]] = {
        "recompute": [RECOMPUTE.index(one) for one in dict.fromkeys(search.recompute)],
        "micro_batch_size": sorted(set(search.micro_batch_size)),
        "fp8": [one is PlanPrecision.fp8 for one in precisions(gpu, search)],
    }
    common = _product(choices)
    flat = table["pp"] == 1
    several = (table["fsdp"] > 1) | (table["dp_replicate"] > 1)
    whole = (table["efsdp"] > 1) & outline.model.has_experts
    plain = SCHEDULES.index(PipelineSchedule.one_f_one_b)
    for reduce_once, gather_once in ((False, False), (True, False), (False, True), (True, True)):
        chosen = flat & (several | (not reduce_once)) & (whole | (not gather_once))
        options = _options(plain, 1, reduce_once, gather_once)
        yield from _blocks(_crossed(_rows(table, chosen), options), common, room, rules, rejected)
    for schedule, per_rank in outline.pipelines(search.schedule, search.stages_per_rank):
        options = _options(SCHEDULES.index(schedule), per_rank, True, True)
        yield from _blocks(_crossed(_rows(table, ~flat), options), common, room, rules, rejected)


def _options(schedule: int, per_rank: int, reduce_once: bool, gather_once: bool) -> Table:
    flags = {"reduce_once": [reduce_once], "gather_once": [gather_once]}
    return _product({"schedule": [schedule], "per_rank": [per_rank], **flags})


def precisions(gpu: Gpu, search: SearchConfig) -> list[PlanPrecision]:
    """Return the dtypes to try on a GPU."""
    return [one for one in dict.fromkeys(search.precision) if one is PlanPrecision.bf16 or gpu.fp8]


def _blocks(
    table: Table, options: Table, room: LayoutRule, rules: list[LayoutRule], rejected: Counter[str]
) -> Iterator[Table]:
    many = len(options["fp8"])
    for rule in [one for one in rules if one.needs <= table.keys()]:
        table = _kept(table, rule, rejected, many)
    table = _kept(table, room, rejected, many)
    size = max(1, BLOCK // many)
    for start in range(0, len(table["pp"]), size):
        block = _crossed({name: column[start : start + size] for name, column in table.items()}, options)
        for rule in rules:
            block = _kept(block, rule, rejected)
        if len(block["pp"]):
            block["micro_batches"] = block["sequences"] // block["micro_batch_size"]
            yield block


def _product(choices: Mapping[str, Sequence[int]]) -> Table:
    table: Table = {}
    for name, values in choices.items():
        table = _crossed(table, {name: np.array(values, dtype=bool if name in _FLAGS else np.int64)})
    return table


_FLAGS = ("fp8", "reduce_once", "gather_once")


def _crossed(left: Table, right: Table) -> Table:
    """Return every row of one table with every row of the other."""
    if not left:
        return dict(right)
    many, times = len(next(iter(left.values()))), len(next(iter(right.values())))
    found = {name: np.repeat(column, times) for name, column in left.items()}
    return found | {name: np.tile(column, many) for name, column in right.items()}


def _rows(table: Table, chosen: np.ndarray) -> Table:
    return {name: column[chosen] for name, column in table.items()}


def _kept(table: Table, rule: LayoutRule, rejected: Counter[str], weight: int = 1) -> Table:
    allowed = rule.allows(table)
    if allowed.all():
        return table
    rejected[rule.reason] += weight * int(np.count_nonzero(~allowed))
    return _rows(table, allowed)
