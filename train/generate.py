"""Continue a text with a run's last checkpoint.

The whole window is run again for every token: simple, and enough to look at what a model has learnt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from core.errors import ConfigError
from model.context import SequenceContext
from model.transformer import Transformer
from parallel.mesh import Axis
from parallel.vocabulary import whole_logits
from parallel.world import World, connect


@dataclass(frozen=True)
class GenerateConfig:
    """`run`: a run's directory. `temperature` 0 takes the likeliest token; `top_k` draws among that many."""

    run: str = "???"
    prompt: str = "def "
    tokens: int = 100
    temperature: float = 0.7
    top_k: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError("tokens", self.tokens, "must be positive")
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "must be positive, or null for the whole vocabulary")


@torch.no_grad()
def continue_tokens(
    model: Transformer,
    prompt: list[int],
    context: int,
    config: GenerateConfig,
    stop: int,
    tp: Axis | None = None,
    world: World | None = None,
) -> Iterator[int]:
    """Sampled token ids, until `stop` is drawn or `config.tokens` are out; the model sees the last `context` tokens."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    tokens = list(prompt)
    for _ in range(config.tokens):
        window = tokens[-context:]
        last = len(window) - 1
        window += [0] * (-len(window) % (tp.size if tp else 1))  # each rank has an equal part; nothing looks ahead
        positions = SequenceContext(torch.arange(len(window))[None], device)
        logits_V = model(torch.tensor([window], device=device), positions)[0, last]
        logits_V = (whole_logits(logits_V, tp) if tp else logits_V).double().cpu()
        draw = partial(_sample, logits_V, config, generator)
        tokens.append(world.from_main(draw) if world else draw())  # the ranks' logits may differ in the last bit
        if tokens[-1] == stop:
            return
        yield tokens[-1]


def _sample(logits_V: torch.Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    if config.temperature == 0:
        return int(logits_V.argmax())
    if config.top_k is not None and config.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(config.top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits_V / config.temperature).softmax(0), 1, generator=generator))


def run(config: GenerateConfig) -> int:
    """Print the prompt and its continuation."""
    from train.restore import restore

    world = connect()
    try:
        restored = restore(Path(config.run), world)
        tokenizer = restored.corpus.tokenizer
        prompt = [tokenizer.bos_id, *tokenizer.encode([config.prompt])[0]]
        restored.model.eval()
        context = restored.phase.context
        drawn = continue_tokens(restored.model, prompt, context, config, tokenizer.eos_id, restored.meshes.tp, world)
        tokens = list(drawn)
        if world.is_main:
            sys.stdout.write(config.prompt + tokenizer.decode(tokens) + "\n")
        return 0
    finally:
        world.close()
