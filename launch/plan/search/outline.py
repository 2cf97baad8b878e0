"""What the search needs to know of a model: its kinds of layers, its parameters, and the layers of each rank.

Everything here is computed once per search. Parameters come from the model itself, built on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from launch.plan.search.config import RunShape
from launch.plan.workload import ExpertShapes, Shapes
from model.config import FeedForward, LayerConfig, ModelConfig, QKNorm
from model.roles import Role, registry
from parallel.layout import split_unit
from parallel.parallelize import on_meta
from parallel.pipeline.stages import PipelineSchedule, balanced, layer_costs
from parallel.sharding import EXPERT_HIDDEN_DIM, TENSOR_DIM
from precision.config import Compute, PrecisionConfig

Ints = np.ndarray


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same. `chunk`: tokens of an attention chunk, if it is shorter than the sequence."""

    is_moe: bool
    chunk: int | None
    qk_norm: QKNorm


@dataclass(frozen=True)
class ParameterBlock:
    """Parameters of one role and shape, `count` times in a layer or at an end of the model."""

    role: Role
    shape: tuple[int, ...]
    tp_dim: int | None
    count: int = 1

    def sizes(self, axes: Mapping[str, Ints]) -> tuple[Ints, Ints]:
        """Return the elements that a rank computes with and those that it stores, for each layout in `axes`. The same
        as `parallel.sharding.ShardSpec` for the first rank.
        """
        sides = [np.full_like(axes["tp"], side) for side in self.shape]
        if self.role.is_expert:
            sides[0] = -(-sides[0] // axes["ep"])
            sides[EXPERT_HIDDEN_DIM] = -(-sides[EXPERT_HIDDEN_DIM] // axes["etp"])
        elif self.tp_dim is not None:
            sides[self.tp_dim] = -(-sides[self.tp_dim] // axes["tp"])
        whole = np.prod(sides, axis=0)
        if self.role is Role.router or self.role.is_logit:
            return self.count * whole, self.count * whole
        shards = axes["efsdp"] if self.role.is_expert else axes["fsdp"]
        stored, is_split = np.zeros_like(whole), np.zeros(whole.shape, bool)
        for side in sides if self.role.is_expert else ():
            even = ~is_split & (side % shards == 0)
            stored = np.where(even, whole // shards, stored)
            is_split |= even
        stored = np.where(is_split, stored, -(-sides[0] // shards) * (whole // sides[0]))
        return self.count * whole, self.count * stored


class ModelOutline:
    """A model as the search sees it. The pipeline's ranks are rows of numbers: layers of each kind, then whether the
    rank has the embedding (and the vision encoder), and the head.
    """

    def __init__(self, model: ModelConfig, run: RunShape) -> None:
        self.model, self.run = model, run
        of_layer = [self._kind(layer) for layer in model.blocks]
        self.kinds = list(dict.fromkeys(of_layer))
        self.kind_of = np.array([self.kinds.index(kind) for kind in of_layer])
        self.split_unit = split_unit(model, run.seq_len)
        self._rows: dict[tuple[int, int, bool], tuple[Ints, Ints, Ints]] = {}

    def _kind(self, layer: LayerConfig) -> LayerKind:
        chunk, length = layer.attention_chunk_size, self.run.seq_len
        is_moe = layer.feed_forward is FeedForward.moe
        return LayerKind(is_moe, chunk if chunk is not None and chunk < length else None, layer.qk_norm)

    @cached_property
    def columns(self) -> list[list[ParameterBlock]]:
        """The parameters of one layer of each kind, of the first and of the last stage's end."""
        found: list[Counter[tuple[Role, tuple[int, ...]]]] = [Counter() for _ in range(len(self.kinds) + 2)]
        seen: dict[int, int] = {}
        for name, info in registry(on_meta(self.model, PrecisionConfig(compute=Compute.bfloat16))).items():
            place, _, rest = name.partition(".")
            if place == "layers":
                layer = int(rest.partition(".")[0])
                column = self.kind_of[layer]
                if seen.setdefault(column, layer) != layer:
                    continue
            else:
                column = len(self.kinds) + (place in ("final_norm", "head"))
            found[column][info.role, tuple(info.shape)] += 1
        return [
            [ParameterBlock(role, shape, self._tp_dim(role, shape), count) for (role, shape), count in column.items()]
            for column in found
        ]

    def _tp_dim(self, role: Role, shape: tuple[int, ...]) -> int | None:
        if role is Role.qk_norm and shape[0] != self.model.head_dim:
            return 0
        return TENSOR_DIM.get(role)

    def rows(self, pp: int, per_rank: int, is_v: bool) -> tuple[Ints, Ints, Ints]:
        """Return the different rows of a pipeline's ranks, how many ranks each stands for, and its first rank."""
        key = (pp, per_rank, is_v and pp > 1)
        if key not in self._rows:
            stages = pp * per_rank
            sizes = balanced(layer_costs(self.model), stages)
            ends = np.cumsum(sizes)
            table = np.zeros((pp, len(self.kinds) + 2), dtype=np.int64)
            for stage, (end, size) in enumerate(zip(ends, sizes, strict=True)):
                rank = min(stage, 2 * pp - 1 - stage) if key[2] else stage % pp
                np.add.at(table[rank], self.kind_of[end - size : end], 1)
                table[rank, -2] += stage == 0
                table[rank, -1] += stage == stages - 1
            rows, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
            self._rows[key] = rows, counts, first
        return self._rows[key]

    def shapes(self, kind: int) -> Shapes:
        """Return the shapes of a model of one layer of a kind, for the planner's model of time."""
        model, of = self.model, self.kinds[kind]
        experts = None
        if of.is_moe:
            experts = ExpertShapes(
                model.num_experts, model.router.top_k, model.expert_hidden_size, model.shared_hidden_size
            )
        return Shapes(
            hidden=model.hidden_size,
            layers=1,
            ffn=model.dense_hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            vocab=model.vocab_size,
            head_dim=model.head_dim,
            tied=model.tie_embeddings,
            experts=experts,
            chunk=of.chunk,
        )

    def pipelines(self, schedules: list[PipelineSchedule], per_rank: list[int]) -> list[tuple[PipelineSchedule, int]]:
        """Return the schedules with the stages per rank that each takes."""
        found = []
        for one in schedules:
            counts = [1] if one.is_single else [2] if one.is_v else [n for n in per_rank if n > 1]
            found += [(one, count) for count in counts]
        return found
