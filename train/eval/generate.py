"""Sample a continuation of a text.

For every token the model runs on the whole window, without a KV cache. This is simple and enough to inspect a model.
Pictures are encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from core.errors import LeviathanError
from data.images.tiles import GREYS
from parallel.comm.world import World
from parallel.parallelize import ParallelModel
from parallel.vision.exchange import tile_share
from parallel.vocab_parallel_loss import whole_logits
from train.eval.config import GenerateConfig
from train.eval.pictures import PicturePrompt

NextLogits = Callable[[list[int]], torch.Tensor]
"""Returns the logits [V] of the token that follows the given tokens."""


@torch.no_grad()
def continue_tokens(
    next_logits: NextLogits,
    prompt: list[int],
    context: int,
    config: GenerateConfig,
    stop: int,
    world: World | None = None,
) -> Iterator[int]:
    """Yield up to `config.tokens` sampled ids; stop before the id `stop`. The model sees the last `context` tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    tokens = list(prompt)
    for _ in range(config.tokens):
        logits_V = next_logits(tokens[-context:]).double().cpu()
        draw = partial(_sample, logits_V, config, generator)
        tokens.append(world.from_main(draw) if world else draw())  # logits may differ between ranks in the last bit
        if tokens[-1] == stop:
            return
        yield tokens[-1]


def placed_logits(placed: ParallelModel, tokens: list[int], pictures: PicturePrompt | None = None) -> torch.Tensor:
    """Return the logits [V] of the token after `tokens`, float64 on every rank, under any layout. The sequence is
    padded at its end to a length that the layout supports. `pictures` are those at its beginning.
    """
    meshes, last = placed.meshes, len(tokens) - 1
    length = placed.padded_length(len(tokens))
    share = placed.context_shard(length)
    row_BT = torch.tensor([tokens + [0] * (length - len(tokens))])
    context = placed.sequence_context(torch.arange(length)[None])
    if pictures is not None:
        pixels, greys = pictures.pixels_N3SS, torch.tensor(GREYS, device=placed.device)
        mine = pixels[list(tile_share(meshes, len(pixels)))]
        images = placed.images(pictures.rows(row_BT), len(pixels), mine, greys)
        context.images = None if images is None else replace(images, kept=pictures.rows_kept)
    logits_BTV = placed.logits(share.take(row_BT).to(placed.device), context)
    at = (share.take(torch.arange(length)[None])[0] == last).nonzero()
    found_V = torch.zeros(placed.model.config.vocab_size, dtype=torch.float64, device=placed.device)
    if logits_BTV is not None and len(at):
        found_V += whole_logits(logits_BTV[0, int(at)], meshes.tp)
    for axis in (meshes.cp, meshes.pp):  # the other ranks have zeros
        axis.sum(found_V, "logits")
    return found_V


def _sample(logits_V: torch.Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    if logits_V.isnan().any():
        raise LeviathanError("the model computes NaN: its weights are damaged, or its training diverged")
    if config.temperature == 0:
        return int(logits_V.argmax())
    if config.top_k is not None and config.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(config.top_k).values[-1], -torch.inf)
    below_V = logits_V - logits_V.max()  # a tiny temperature then gives -inf, not +inf
    return int(torch.multinomial((below_V / config.temperature).softmax(0), 1, generator=generator))
