"""Pipeline schedules, the layers of each stage, and the rank that runs it.

A pipeline of pp ranks has pp * stages_per_rank stages. Looped schedules give rank r the stages r, r + pp, ...
V-schedules give it the stages r and 2 * pp - 1 - r, so that the first and the last stage are on the same rank. Nothing
here needs a process group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum

from core.errors import ConfigError
from model.config import ModelConfig
from model.flops import active_parameters, attention_width, vision_flops

V_SCHEDULES_SINCE = (2, 13)
"""The first torch version in which V-schedules run on gloo. In earlier versions a rank could not send to itself."""


class PipelineSchedule(Enum):
    """The order of forward and backward passes, as in torch.distributed.pipelining.

    `gpipe`: all forward passes, then all backward passes (Huang et al. 2019). `one_f_one_b`: a backward pass as soon as
    one can run (Narayanan et al. 2021). `interleaved`: the same with several stages per rank. `interleaved_zero_bubble`
    and `zbv`: computing weight gradients fills the bubbles (Qi et al. 2024). `dualpipev`: forward and backward passes
    of two directions overlap (DeepSeek-V3's DualPipe, cut in half).
    """

    gpipe = "gpipe"
    one_f_one_b = "one_f_one_b"
    interleaved = "interleaved"
    interleaved_zero_bubble = "interleaved_zero_bubble"
    zbv = "zbv"
    dualpipev = "dualpipev"

    @property
    def is_v(self) -> bool:
        return self in (PipelineSchedule.zbv, PipelineSchedule.dualpipev)

    @property
    def is_single(self) -> bool:
        return self in (PipelineSchedule.gpipe, PipelineSchedule.one_f_one_b)

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed separately from those of activations."""
        return self.is_v or self is PipelineSchedule.interleaved_zero_bubble

    @property
    def in_rounds(self) -> bool:
        """Whether micro-batches run in rounds of equal size, each of at least pp micro-batches."""
        return not (self.is_single or self.is_v)

    def least_micro_batches(self, pp: int, per_rank: int) -> int:
        return pp * per_rank if self.is_v else pp

    def accepts(self, micro_batches: int, pp: int, per_rank: int) -> bool:
        """Return whether micro-batches are enough to fill the pipeline and, if in rounds, form equal rounds."""
        if micro_batches < self.least_micro_batches(pp, per_rank):
            return False
        return not self.in_rounds or micro_batches % (micro_batches // pp) == 0


@dataclass(frozen=True)
class Stages:
    """`layers`: the layer numbers of each stage. `owners`: the rank along pp that runs each stage."""

    layers: tuple[range, ...]
    owners: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def of(self, rank: int) -> list[int]:
        """Return the stages on this rank of the pp axis, first to last."""
        return [stage for stage, owner in enumerate(self.owners) if owner == rank]


def stages(
    model: ModelConfig,
    pp: int,
    schedule: PipelineSchedule,
    per_rank: int,
    given: list[int] | None,
    image_token_share: float = 0.0,
) -> Stages:
    """Spread the layers over pp * per_rank stages so that the cost of the costliest stage is as low as possible,
    or put `given[i]` layers on stage i. Raises `ConfigError` if a stage would have no layer.
    """
    count, costs = pp * per_rank, layer_costs(model, image_token_share=image_token_share)
    if count > model.num_layers:
        least = 1 if schedule is PipelineSchedule.one_f_one_b else 2  # other schedules need pp > 1
        legal = list(range(least, model.num_layers // per_rank + 1))
        reason = f"times {per_rank} stages per rank = {count} stages, more than the model's {model.num_layers} layers"
        raise ConfigError("parallel.pp", pp, reason, legal[-4:])
    sizes = given if given is not None else balanced(costs, count)
    if len(sizes) != count or sum(sizes) != model.num_layers or min(sizes) < 1:
        reason = f"must name {count} stages of at least one layer, {model.num_layers} layers together"
        raise ConfigError("parallel.layers_per_stage", sizes, reason, [balanced(costs, count)])
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    owners = [min(stage, 2 * pp - 1 - stage) if schedule.is_v else stage % pp for stage in range(count)]
    return Stages(tuple(range(begin, end) for begin, end in bounds), tuple(owners))


def layer_costs(model: ModelConfig, seq_len: int = 4096, image_token_share: float = 0.0) -> list[float]:
    """Return the multiply-adds of each layer's forward pass per token: one per active parameter, plus attention
    at this sequence length. On average a query attends to half of the sequence or chunk. The head's matmul counts
    towards the last layer, the embedding's lookup of a row towards the first. If the first stage encodes tiles, the
    vision encoder counts towards the first layer too: `image_token_share` is the fraction of tokens that show a tile.
    """
    reaches = [min(seq_len, layer.attention_chunk_size or seq_len) for layer in model.blocks]
    costs: list[float] = [
        active_parameters(model, layer) + reach * attention_width(model)
        for layer, reach in zip(model.blocks, reaches, strict=True)
    ]
    costs[0] += model.hidden_size
    costs[-1] += model.hidden_size * model.vocab_size
    if model.vision is not None and image_token_share:
        tiles = image_token_share / model.vision.tokens_per_tile
        costs[0] += tiles * vision_flops(model.vision, model.hidden_size).total / 6
    return costs


def balanced(costs: list[float], parts: int) -> list[int]:
    """Split `costs` into consecutive non-empty parts so that the cost of the costliest part is as low as possible.
    Returns the sizes of the parts. Of splits that cost the same, takes the one with the most equal sizes.
    """
    count, totals = len(costs), list(itertools.accumulate(costs, initial=0.0))
    # best[n]: (highest cost, unevenness, sizes) of the first n layers in `part` parts
    best: dict[int, tuple[float, int, list[int]]] = {n: (totals[n], n * n, [n]) for n in range(1, count + 1)}
    for part in range(2, parts + 1):
        best = {
            n: min(
                (max(high, totals[n] - totals[m]), uneven + (n - m) ** 2, [*sizes, n - m])
                for m, (high, uneven, sizes) in best.items()
                if m < n
            )
            for n in range(part, count + 1)
        }
    return best[count][2]
