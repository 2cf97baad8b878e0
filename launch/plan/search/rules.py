"""The rules of layouts, for arrays of candidates: the same as those of `parallel.layout` and `resolve_layout`.

A test compares both on random candidates. The framework's own checks are made once more on the layouts that the search
returns, and give the messages that `train` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from launch.plan.search.outline import ModelOutline
from parallel.pipeline.stages import PipelineSchedule

Columns = Mapping[str, np.ndarray]
SCHEDULES = list(PipelineSchedule)
INDIVISIBLE = "the degrees do not divide the GPUs"
_IN_ROUNDS = np.array([one.in_rounds for one in SCHEDULES])
IS_V = np.array([one.is_v for one in SCHEDULES])


@dataclass(frozen=True)
class LayoutRule:
    """`allows` returns a mask of candidates, from the columns in `needs`."""

    reason: str
    needs: frozenset[str]
    allows: Callable[[Columns], np.ndarray]

    @classmethod
    def of(cls, reason: str, needs: str, allows: Callable[[Columns], np.ndarray]) -> LayoutRule:
        """Make a rule. `needs`: names of columns, with spaces between them."""
        return cls(reason, frozenset(needs.split()), allows)


def layout_rules(outline: ModelOutline, world: int) -> list[LayoutRule]:
    """Return the rules of the degrees, in the order in which the framework checks them."""
    model, run = outline.model, outline.run
    kinds = {kind.is_moe for kind in outline.kinds}
    sizes = [model.num_heads, model.num_kv_heads, model.vocab_size]
    sizes += [model.dense_hidden_size] if False in kinds else []
    sizes += [model.shared_hidden_size] if True in kinds else []
    split = math.gcd(*sizes)

    def experts(c: Columns) -> np.ndarray:
        if True not in kinds:
            return np.asarray((c["ep"] == 1) & (c["etp"] == 1))
        slices = (model.expert_hidden_size % c["etp"] == 0) & (model.expert_hidden_size // c["etp"] % 8 == 0)
        return np.asarray((model.num_experts % c["ep"] == 0) & slices)

    def length(c: Columns) -> np.ndarray:
        unit = outline.split_unit
        whole = run.seq_len % (c["cp"] * np.lcm(unit, c["tp"])) == 0
        return np.asarray(whole & ((unit == 1) | (run.seq_len >= unit * c["cp"])))

    return [
        LayoutRule.of(
            INDIVISIBLE,
            "pp dp_replicate cp tp",
            lambda c: world % (c["pp"] * c["dp_replicate"] * c["cp"] * c["tp"]) == 0,
        ),
        LayoutRule.of("more stages than layers", "pp", lambda c: c["pp"] <= model.num_layers),
        LayoutRule.of("tp does not divide heads, vocabulary or hidden sizes", "tp", lambda c: split % c["tp"] == 0),
        LayoutRule.of("cp and tp do not divide the sequence", "cp tp", length),
        LayoutRule.of(
            "data parallelism does not divide the global batch",
            "pp cp tp",
            lambda c: run.global_batch_size % np.maximum(1, world // (c["pp"] * c["cp"] * c["tp"])) == 0,
        ),
        LayoutRule.of("ep and etp do not divide the experts", "ep etp", experts),
        LayoutRule.of(
            "ep * etp does not divide dp_shard * cp * tp",
            "pp dp_replicate ep etp",
            lambda c: world // (c["pp"] * c["dp_replicate"]) % (c["ep"] * c["etp"]) == 0,
        ),
    ]


def candidate_rules(outline: ModelOutline, multiple: int) -> list[LayoutRule]:
    """Return the rules of schedules, micro-batches and precision. `multiple`: of FP8 products' sizes."""
    model, run = outline.model, outline.run

    def fills(c: Columns) -> np.ndarray:
        batches = run.global_batch_size // (c["dp"] * c["micro_batch_size"])
        least = np.where(IS_V[c["schedule"]], c["pp"] * c["per_rank"], c["pp"])
        rounds = np.maximum(1, batches // c["pp"])
        fits = (batches >= least) & (~_IN_ROUNDS[c["schedule"]] | (batches % rounds == 0))
        return np.asarray((c["pp"] == 1) | fits)

    def in_fp8(c: Columns) -> np.ndarray:
        tp, etp, ok = c["tp"], c["etp"], model.hidden_size % multiple == 0
        fits = np.full(tp.shape, ok)
        for heads in (model.num_heads, model.num_kv_heads):
            fits &= heads * model.head_dim // tp % multiple == 0
        for layer in {kind.is_moe for kind in outline.kinds}:
            wide = model.shared_hidden_size if layer else model.dense_hidden_size
            fits &= wide // tp % multiple == 0
            fits &= (model.expert_hidden_size // etp % multiple == 0) | (not layer)
        return np.asarray(~c["fp8"] | fits)

    return [
        LayoutRule.of("more stages than layers", "pp per_rank", lambda c: c["pp"] * c["per_rank"] <= model.num_layers),
        LayoutRule.of(
            "tied embeddings with both ends on one rank",
            "pp schedule",
            lambda c: (c["pp"] == 1) | ~IS_V[c["schedule"]] | (not model.tie_embeddings),
        ),
        LayoutRule.of(
            "the micro-batch does not divide a rank's sequences",
            "dp micro_batch_size",
            lambda c: run.global_batch_size % (c["dp"] * c["micro_batch_size"]) == 0,
        ),
        LayoutRule.of("too few micro-batches for the pipeline", "pp per_rank schedule dp micro_batch_size", fills),
        LayoutRule.of("sizes that FP8 products cannot take", "tp etp fp8", in_fp8),
    ]
