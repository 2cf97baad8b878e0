"""Memory of our own code on a rank, for arrays of candidates.

Parameters, gradients and optimizer state are those of `parallel.cost.static_bytes`, to the byte. Saved activations are
those that `bench.budget` counts, in closed form: tests compare both. What FSDP2 holds for a moment, workspaces and the
backward pass's own tensors are estimates.

Shapes: T tokens of a micro-batch on a rank of cp, D hidden size, F hidden size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from launch.plan.calibration import Calibration
from launch.plan.memory import MIB
from launch.plan.search.grid import RECOMPUTE, Table
from launch.plan.search.outline import ModelOutline, ParameterBlock
from launch.plan.search.rules import IS_V, SCHEDULES, Columns
from model.config import QKNorm, WeightsOn
from model.roles import Role
from parallel.layout import Recompute
from parallel.pipeline.stages import PipelineSchedule
from precision.config import ELIGIBLE

COMPONENTS = ("weights", "quantised", "gradients", "optimizer", "activations", "logits", "buffers", "workspace")
"""Parts of a rank's memory. `quantised`: FP8 copies of weights that a pipeline keeps while they are gathered."""
NONE, FULL = RECOMPUTE.index(Recompute.none), RECOMPUTE.index(Recompute.full)
MASTER, NARROW = 4, 2
"""Bytes of float32 and of bfloat16."""
HEAD_BLOCK = 128 * MIB
"""Logits that the head computes at a time: `model.head`."""
FP8_PADDING = 15
"""Most rows that pad an expert's rows for FP8 products."""


class StateCounts:
    """Parameters of each layout by column of `ModelOutline.columns`, as arrays [columns, layouts]. `dense`, `experts`:
    elements that a rank computes with, without routers; `dense_shards`, `expert_shards`: their shards. `stored`: all
    that a rank keeps, with routers. `optimizer`: bytes of its state. `fp8`: elements of products in FP8.
    """

    def __init__(self, outline: ModelOutline, layouts: Table, moment_bytes: int, muon: bool) -> None:
        shape = (len(outline.columns), len(layouts["tp"]))
        zeros = lambda: np.zeros(shape, dtype=np.int64)  # noqa: E731
        self.dense, self.experts, self.dense_shards, self.expert_shards = (zeros() for _ in range(4))
        self.stored, self.optimizer, self.fp8 = (zeros() for _ in range(3))
        for at, blocks in enumerate(outline.columns):
            self._add(at, blocks, layouts, moment_bytes, muon)
        if outline.model.tie_embeddings:  # the last stage has a copy of the table, which the first one has anyway
            table = [one for one in outline.columns[-2] if one.role is Role.embedding]
            piped = np.flatnonzero(layouts["pp"] > 1)
            self._add(-1, table, {name: column[piped] for name, column in layouts.items()}, moment_bytes, muon, piped)

    def _add(
        self,
        at: int,
        blocks: list[ParameterBlock],
        layouts: Table,
        moment_bytes: int,
        muon: bool,
        where: np.ndarray | slice = slice(None),
    ) -> None:
        for block in blocks:
            whole, stored = block.sizes(layouts)
            if block.role.is_expert:
                self.experts[at][where] += whole
                self.expert_shards[at][where] += stored
            elif block.role is not Role.router:
                self.dense[at][where] += whole
                self.dense_shards[at][where] += stored
            if block.role.products in ELIGIBLE:
                self.fp8[at][where] += whole
            self.stored[at][where] += stored
            moments = 1 if muon and block.role.is_matrix else 2
            steps = 4 * block.count if moments == 2 and moment_bytes else 0
            self.optimizer[at][where] += moments * moment_bytes * stored + steps


def saved_activations(outline: ModelOutline, kind: int, c: Table) -> np.ndarray:
    """Return the bytes that a layer of a kind keeps of a micro-batch from its forward to its backward pass."""
    model, of = outline.model, outline.kinds[kind]
    t, fp8, kept = c["tp"], c["fp8"], c["recompute"] == NONE
    tokens = c["micro_batch_size"] * outline.run.seq_len // c["cp"]
    local = tokens / t
    hidden, query, key = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    inputs = np.where(fp8, 1, NARROW * kept) * hidden * tokens  # of a product that needs them for its weights' gradient
    found = 2 * NARROW * hidden * local + inputs  # the residual before and after attention
    keys = 2 * NARROW * key * (c["cp"] if of.chunk is None else 1)
    numbers = (NARROW * 2 + fp8) * query + keys + 4 * model.num_heads
    if of.qk_norm is not QKNorm.none:
        numbers = numbers + 4 * (model.num_heads + model.num_kv_heads)
    if of.qk_norm in (QKNorm.per_head, QKNorm.full):
        numbers = numbers + NARROW * (query + key)
    found = found + numbers * tokens / t
    wide = model.shared_hidden_size if of.is_moe else model.dense_hidden_size
    if wide:
        found = found + (2 * NARROW * kept + fp8) * wide * tokens / t
        found = found + inputs * ((not of.is_moe) | fp8 | (t > 1))  # a shared expert's input is the router's, unless...
    full = NARROW * hidden * local
    if of.is_moe:
        top_k = model.router.top_k
        found = found + kept * NARROW * hidden * local + (8 * model.num_experts + 40 + 28 * top_k) * local
        sent = (c["ep"] * c["etp"] > 1) | kept
        rows = local * top_k * c["etp"] * np.where(c["ep"] > 1, outline.run.imbalance, 1.0)
        rows = rows + fp8 * FP8_PADDING * (model.num_experts // c["ep"])
        found = found + np.where(fp8, 1, NARROW * sent) * hidden * rows
        found = found + (2 * NARROW + fp8) * (model.expert_hidden_size / c["etp"]) * rows
        if model.router.weights_on is WeightsOn.output:
            found = found + NARROW * hidden * local * top_k
        full = full + 16 * top_k * local
    return np.asarray(np.where(c["recompute"] == FULL, full, found))


def passing_activations(outline: ModelOutline, kind: int, c: Table) -> np.ndarray:
    """Return the bytes of tensors that live only while a layer's backward pass runs. An estimate."""
    model, of = outline.model, outline.kinds[kind]
    tokens = c["micro_batch_size"] * outline.run.seq_len // c["cp"]
    wide = model.shared_hidden_size if of.is_moe else model.dense_hidden_size
    inner = np.where(c["recompute"] == NONE, 3, 5) * NARROW * wide * tokens / c["tp"]
    if of.is_moe:
        rows = tokens / c["tp"] * model.router.top_k * np.where(c["ep"] > 1, outline.run.imbalance, 1.0)
        inner = np.maximum(inner, 3 * NARROW * model.expert_hidden_size * rows)
    again = dict(c) | {"recompute": np.full_like(c["recompute"], NONE)}
    remade = saved_activations(outline, kind, again) - saved_activations(outline, kind, c)
    return np.asarray(inner + 2 * NARROW * model.hidden_size * tokens + remade * (c["recompute"] == FULL))


def in_flight(c: Table, rank: int) -> np.ndarray:
    """Return how many stages' activations of a micro-batch rank `rank` of pp holds at its peak. Counted in torch's
    orders of work, and found to be these closed forms.
    """
    pp, per_rank = c["pp"], c["per_rank"]
    batches = c["micro_batches"]
    per_round = batches // np.maximum(1, batches // pp)
    by_schedule = {
        PipelineSchedule.gpipe: batches,
        PipelineSchedule.one_f_one_b: np.minimum(pp - rank, batches),
        PipelineSchedule.interleaved: np.minimum(
            2 * (pp - rank - 1) + (per_rank - 1) * per_round + 1, batches * per_rank
        ),
        PipelineSchedule.interleaved_zero_bubble: np.minimum(per_rank * per_round, batches * per_rank),
        PipelineSchedule.zbv: np.minimum(2 * pp, 2 * batches),
        PipelineSchedule.dualpipev: np.minimum(2 * pp + 1, 2 * batches),
    }
    return np.choose(c["schedule"], [by_schedule[one] for one in SCHEDULES])


def groups(c: Columns) -> Iterator[tuple[np.ndarray, int, int, bool]]:
    """Yield the candidates with the same pipeline: their places, pp, stages per rank, and whether it is a V."""
    key = (c["pp"] * 64 + c["per_rank"]) * 2 + IS_V[c["schedule"]]
    if not len(key):
        return
    values, inverse = np.unique(key, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse, minlength=len(values)))
    for value, places in zip(values.tolist(), np.split(order, ends[:-1]), strict=True):
        yield places, value // 2 // 64, value // 2 % 64, bool(value % 2)


def taken(c: Columns, places: np.ndarray) -> Table:
    return {name: column[places] for name, column in c.items()}


def footprint(outline: ModelOutline, counts: StateCounts, c: Table, calibration: Calibration) -> Table:
    """Return the bytes of the fullest rank of each candidate by component, and `stage`, its rank along pp."""
    found = {name: np.zeros(len(c["pp"])) for name in (*COMPONENTS, "stage")}
    for places, pp, per_rank, is_v in groups(c):
        part = taken(c, places)
        costs = _RankBytes(outline, counts, part, calibration)
        best = np.full(len(places), -1.0)
        for row, _, first in zip(*outline.rows(pp, per_rank, is_v), strict=True):
            rank = costs.of_rank(row, int(first))
            peak = sum(rank.values())
            better = peak > best
            best = np.where(better, peak, best)
            for name, value in (rank | {"stage": np.float64(first)}).items():
                found[name][places] = np.where(better, value, found[name][places])
    return found


def of_stages(
    outline: ModelOutline, counts: StateCounts, c: Table, calibration: Calibration
) -> list[tuple[int, int, Table]]:
    """Return, for candidates that share a pipeline, the memory of ranks that are alike: the first, their number, and
    the bytes of the first, which holds the most, by component.
    """
    (_, pp, per_rank, is_v), *others = groups(c)
    assert not others
    costs = _RankBytes(outline, counts, c, calibration)
    rows = zip(*outline.rows(pp, per_rank, is_v), strict=True)
    return [(int(first), int(ranks), costs.of_rank(row, int(first))) for row, ranks, first in rows]


def state_floor(outline: ModelOutline, counts: StateCounts, c: Columns) -> np.ndarray:
    """Return the bytes of weights, gradients and optimizer state of the fullest rank in bfloat16. They do not depend on
    micro-batches and recomputation.
    """
    most = np.zeros(len(c["pp"]))
    for places, pp, per_rank, is_v in groups(c):
        costs = _StateBytes(counts, taken(c, places))
        rows = outline.rows(pp, per_rank, is_v)[0]
        most[places] = np.max([sum(costs.state(row).values(), np.float64(0)) for row in rows], axis=0)
    return most


class _StateBytes:
    """The training state of candidates that share a pipeline."""

    def __init__(self, counts: StateCounts, c: Table) -> None:
        self.c, layout = c, c["layout"]
        self.dense, self.experts = counts.dense[:, layout], counts.experts[:, layout]
        self.dense_shards, self.expert_shards = counts.dense_shards[:, layout], counts.expert_shards[:, layout]
        self.stored, self.optimizer, self.fp8 = (
            part[:, layout] for part in (counts.stored, counts.optimizer, counts.fp8)
        )
        self.alone = (c["fsdp"] * c["dp_replicate"] * c["tp"] * c["pp"] == 1) & (c["ep"] * c["etp"] == 1)

    def state(self, row: np.ndarray) -> Table:
        """Return the bytes of one rank's training state by component. `row`: see `ModelOutline.rows`.

        Gradients that are reduced once per step are whole sums until then, when activations are gone: their shards take
        the place of the sums, one unit after the other.
        """
        c, spread = self.c, ~self.alone
        dense, experts = row @ self.dense, row @ self.experts
        stored = row @ self.stored
        once = c["reduce_once"] | c["gather_once"]
        whole = spread * (np.where(c["reduce_once"], dense - row @ self.dense_shards, 0))
        whole = whole + spread * np.where(once, experts - row @ self.expert_shards, 0)
        piped = c["pp"] > 1
        gathered = spread * (np.where(piped, dense, 0) + experts * np.where(piped, True, c["gather_once"]))
        in_fp8 = c.get("fp8", np.False_) & piped
        return {
            "weights": MASTER * stored + NARROW * gathered,
            "quantised": np.where(in_fp8, 2 * (row @ self.fp8), 0),
            "gradients": MASTER * (stored + whole),
            "optimizer": row @ self.optimizer,
        }


class _RankBytes(_StateBytes):
    """All memory of candidates that share a pipeline."""

    def __init__(self, outline: ModelOutline, counts: StateCounts, c: Table, calibration: Calibration) -> None:
        super().__init__(counts, c)
        self.outline, self.calibration = outline, calibration
        kinds = range(len(outline.kinds))
        self.saved = [saved_activations(outline, kind, c) for kind in kinds]
        self.passing = [passing_activations(outline, kind, c) for kind in kinds]

    def of_rank(self, row: np.ndarray, rank: int) -> Table:
        """Return the bytes of one rank by component. `rank`: its place along pp."""
        held = in_flight(self.c, rank) / self.c["per_rank"]
        activations = sum(held * n * saved for n, saved in zip(row, self.saved, strict=False))
        return self.state(row) | {
            "activations": activations,
            "logits": self._logits() * row[-1],
            "buffers": self._buffers(row),
            "workspace": np.full(len(held), (self.calibration.base_mib + 64) * MIB),
        }

    def _logits(self) -> np.ndarray:
        c, model = self.c, self.outline.model
        tokens = c["micro_batch_size"] * self.outline.run.seq_len // c["cp"]
        block = NARROW * tokens * model.vocab_size / c["tp"]
        blocks = np.where(block > HEAD_BLOCK, 2.25 * HEAD_BLOCK, 5 * block)
        return np.asarray(NARROW * tokens * model.hidden_size * np.where(c["tp"] > 1, 2, 1) + blocks)

    def _buffers(self, row: np.ndarray) -> np.ndarray:
        """Return the bytes of the layer whose backward pass runs: its tensors, and FSDP2's units. Without a pipeline,
        this layer and the next one are gathered in bfloat16, and its gradients exist in bfloat16 and, while they are
        reduced, in float32. In a pipeline, parameters and sums of gradients are counted as weights and gradients.
        """
        c, most = self.c, np.zeros(len(self.c["pp"]))
        for kind, count in enumerate(row[:-2]):
            if not count:
                continue
            apart = np.where(c["gather_once"], 0, self.experts[kind]) + self.dense[kind]
            unit = np.where(c["pp"] > 1, NARROW * (self.dense[kind] + self.experts[kind]), 0)
            unit = np.where(c["pp"] == 1, (3 * NARROW + MASTER) * apart, unit) * ~self.alone
            most = np.maximum(most, self.passing[kind] + unit)
        return most
