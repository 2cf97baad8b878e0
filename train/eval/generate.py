"""Continue a text with a run's last checkpoint.

The whole window is run again for every token: simple, and enough to look at what a model has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from core.errors import ConfigError
from parallel.comm.world import World
from parallel.parallelize import ParallelModel
from parallel.vocab_parallel_loss import whole_logits
from precision.config import Backend

NextLogits = Callable[[list[int]], torch.Tensor]
"""Logits [V] of what follows these tokens."""


@dataclass(frozen=True)
class GenerateConfig:
    """`run`: a run's directory. `temperature` 0 takes the likeliest token; `top_k` draws among that many."""

    run: str = "???"
    prompt: str = "def "
    tokens: int = 100
    temperature: float = 0.7
    top_k: int | None = 50
    seed: int = 0
    backend: Backend | None = None
    """Who does the matrix products; null: as in training."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError("tokens", self.tokens, "must be positive")
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "must be positive, or null for the whole vocabulary")


@torch.no_grad()
def continue_tokens(
    next_logits: NextLogits,
    prompt: list[int],
    context: int,
    config: GenerateConfig,
    stop: int,
    world: World | None = None,
) -> Iterator[int]:
    """Sampled token ids, until `stop` is drawn or `config.tokens` are out; the model sees the last `context` tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    tokens = list(prompt)
    for _ in range(config.tokens):
        logits_V = next_logits(tokens[-context:]).double().cpu()
        draw = partial(_sample, logits_V, config, generator)
        tokens.append(world.from_main(draw) if world else draw())  # the ranks' logits may differ in the last bit
        if tokens[-1] == stop:
            return
        yield tokens[-1]


def placed_logits(placed: ParallelModel, tokens: list[int]) -> torch.Tensor:
    """The same, of a model on many ranks, on every rank. The row is made as long as the layout needs; nothing looks
    ahead.
    """
    meshes, last = placed.meshes, len(tokens) - 1
    length = placed.padded_length(len(tokens))
    share = placed.context_shard(length)
    row_BT = torch.tensor([tokens + [0] * (length - len(tokens))])
    context = placed.sequence_context(torch.arange(length)[None])
    logits_BTV = placed.logits(share.take(row_BT).to(placed.device), context)
    at = (share.take(torch.arange(length)[None])[0] == last).nonzero()
    found_V = torch.zeros(placed.model.config.vocab_size, dtype=torch.float64, device=placed.device)
    if logits_BTV is not None and len(at):
        found_V += whole_logits(logits_BTV[0, int(at)], meshes.tp)
    for axis in (meshes.cp, meshes.pp):  # whoever has it tells the others
        axis.sum(found_V, "logits")
    return found_V


def _sample(logits_V: torch.Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    if config.temperature == 0:
        return int(logits_V.argmax())
    if config.top_k is not None and config.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(config.top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits_V / config.temperature).softmax(0), 1, generator=generator))
