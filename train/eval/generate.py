"""Sample continuations of texts.

With a whole model on this device, keys and values are cached, so the model computes each new token alone. A layout that
splits sequences, layers or heads (cp, pp, tp) runs the model on the whole window for every token. The model sees the
last `context` tokens: once a sequence is longer, its window moves with each token, every position changes, and the
whole window is computed again. Pictures are encoded once.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import LeviathanError
from data.images.tiles import GREYS
from model.attention.cache import KeyValueCache
from model.attention.plan import ForwardContext
from model.head import IGNORED
from model.vision.config import CHANNELS
from model.vision.fusion import Images
from parallel.comm.collectives import all_gather_no_grad
from parallel.comm.world import World
from parallel.parallelize import ParallelModel
from parallel.vision.exchange import tile_share
from precision.gemm import at_least_float32
from train.eval.config import GenerateConfig
from train.eval.pictures import PicturePrompt

NextLogits = Callable[[list[int]], Tensor]
"""Returns the logits [V] of the token that follows the given tokens."""
ImagesOf = Callable[[Tensor], Images | None]
"""Returns the images of prompts [B, T], padded at their ends with their first token."""
_IDLE = 0
"""The prompt of a rank that has none."""


class CachedModel:
    """A whole model on this device, which continues a batch of sequences by one token at a time.

    `forward` maps tokens [B, T] on the host to logits. `context`: the number of tokens that the model sees.
    `sharded`: whether FSDP gathers the weights of a layer when it runs. FSDP's hooks do not allow inference mode.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, ForwardContext], Tensor],
        context: int,
        device: torch.device | None = None,
        sharded: bool = False,
    ) -> None:
        self.forward, self.context, self.device = forward, context, device
        self.no_gradients: Callable[[], AbstractContextManager[Any]] = (
            torch.no_grad if sharded else torch.inference_mode
        )
        self.sequences: list[list[int]] = []
        self._has_images = False
        self._cache = KeyValueCache(joins=not sharded)

    def begin(self, prompts: Sequence[list[int]], images: ImagesOf | None = None) -> Tensor:
        """Read prompts, and return the logits [B, V] of the next token of each. Forgets earlier sequences.

        Prompts with images must leave room for their continuations, since images are read only once.
        """
        self.sequences = [prompt[-self.context :] for prompt in prompts]
        lengths = [len(sequence) for sequence in self.sequences]
        rows = [[*sequence, *sequence[:1] * (max(lengths) - len(sequence))] for sequence in self.sequences]
        tokens_BT = torch.tensor(rows)
        given = self._cache.prompts(lengths, self.device)
        given.images = images(tokens_BT) if images is not None else None
        self._has_images = images is not None
        return self._run(tokens_BT, given)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence, and return the logits [B, V] of the next ones."""
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.append(token)
        if max(map(len, self.sequences)) > self.context:
            if self._has_images:
                raise ValueError(f"{self.context} tokens leave no room for the continuation of prompts with pictures")
            return self.begin(self.sequences)
        return self._run(torch.tensor(tokens)[:, None], self._cache.next_token(self.device))

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all sequences but these."""
        self.sequences = [self.sequences[index] for index in indices]
        self._cache.keep(indices)

    def idle(self) -> Tensor:
        """Run a forward pass, because other ranks do, after the last sequence ended."""
        return self.begin([[_IDLE]])

    def next_logits(self, images: ImagesOf | None = None) -> NextLogits:
        """Return a function for `continue_tokens`, whose sequence grows by one token from call to call."""

        def logits(tokens: list[int]) -> Tensor:
            return (self.extend(tokens[-1:]) if self.sequences else self.begin([tokens], images))[0]

        self.sequences = []
        return logits

    def _run(self, tokens_BT: Tensor, given: ForwardContext) -> Tensor:
        # layers that are compiled would be compiled for each length
        with self.no_gradients(), torch.compiler.set_stance("force_eager"):
            return self.forward(tokens_BT, given)[:, -1]


class WindowModel:
    """Any model, which reads the whole window of one sequence for every token. It encodes pictures once.

    `last_logits` maps tokens [1, T] on the host, and their images or None, to the logits [1, V] of the next token.
    `context`: the number of tokens that the model sees.
    """

    def __init__(self, last_logits: Callable[[Tensor, Images | None], Tensor], context: int) -> None:
        self.last_logits, self.context = last_logits, context
        self.sequence: list[int] = []
        self._images: Images | None = None

    def begin(self, prompts: Sequence[list[int]], images: ImagesOf | None = None) -> Tensor:
        """Read one prompt, and return the logits [1, V] of the next token. Forgets the earlier sequence."""
        (prompt,) = prompts
        self.sequence = list(prompt)
        found = None if images is None else images(torch.tensor([prompt]))
        self._images = None if found is None else replace(found, kept=[])
        return self.idle()

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Append a token, and return the logits [1, V] of the next one."""
        self.sequence += tokens
        return self.idle()

    def keep(self, indices: Sequence[int]) -> None:
        """Keep the only sequence."""

    def idle(self) -> Tensor:
        """Read the window as it is."""
        tokens_BT = torch.tensor([self.sequence[-self.context :]])
        images = None if self._images is None else _lengthened(self._images, tokens_BT.shape[1])
        with torch.no_grad():
            return self.last_logits(tokens_BT, images)


@dataclass
class Continuation:
    """A prompt, how to continue it, and the tokens found so far. `goes_on`: whether another token is wanted."""

    prompt: list[int]
    config: GenerateConfig
    goes_on: Callable[[list[int]], bool] = lambda found: True
    pixels_N3SS: Tensor | None = None
    found: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def take(self, token: int, stop: int) -> bool:
        """Append a token unless it is `stop`, and return whether another one is wanted."""
        if token == stop:
            return False
        self.found.append(token)
        return len(self.found) < self.config.tokens and self.goes_on(self.found)


def batches(asked: Sequence[Continuation], size: int) -> Iterator[list[Continuation]]:
    """Yield prompts of similar lengths, at most `size` at a time. Those with pictures go apart, since their windows
    cannot move.
    """
    for pictures in (False, True):
        some = [one for one in asked if (one.pixels_N3SS is not None) is pictures]
        some.sort(key=lambda one: -len(one.prompt))
        for start in range(0, len(some), size):
            yield some[start : start + size]


def continue_batch(
    model: CachedModel | WindowModel,
    asked: Sequence[Continuation],
    stop: int,
    images: ImagesOf | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Continue prompts side by side, each until its own limit or the id `stop`. Fills `found` of each.

    `images`: those of all prompts, in the order of `asked`. `any_rank` returns whether its argument is true on any
    rank: while it is, this rank runs forward passes too, so that all ranks run equally many. `asked` may be empty. An
    error is raised once all ranks are ready.
    """
    error: LeviathanError | None = None
    logits_BV, asked = model.begin([one.prompt for one in asked] or [[_IDLE]], images), list(asked)
    while True:
        tokens, going = list[int](), list[int]()
        try:
            tokens = draw(logits_BV, asked) if asked else []
            going = [i for i, (one, token) in enumerate(zip(asked, tokens, strict=True)) if one.take(token, stop)]
        except LeviathanError as caught:
            error = caught
        if not any_rank(bool(going)):
            break
        if going and len(going) < len(asked):
            model.keep(going)
        asked, tokens = [asked[i] for i in going], [tokens[i] for i in going]
        logits_BV = model.extend(tokens) if going else model.idle()
    if error is not None:
        raise error


def until(stops: Sequence[str], decode: Callable[[list[int]], str]) -> Callable[[list[int]], bool]:
    """Return a function that says whether the text of some tokens has none of the stop strings."""

    def goes_on(found: list[int]) -> bool:
        if not stops:
            return True
        text = decode(found)
        return not any(stop in text for stop in stops)

    return goes_on


def before_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stop strings in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def draw(logits_BV: Tensor, asked: Sequence[Continuation]) -> list[int]:
    """Sample the next token of each sequence."""
    if any(one.config.temperature for one in asked):
        rows = logits_BV.double().cpu()
        return [_sample(row_V, one.config, one.generator) for row_V, one in zip(rows, asked, strict=True)]
    best_B = logits_BV.argmax(-1)
    _check(logits_BV.gather(1, best_B[:, None]))  # NaN counts as the largest
    found: list[int] = best_B.tolist()
    return found


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


def placed_model(placed: ParallelModel, context: int) -> CachedModel | None:
    """Return the model with a cache, or None under a layout that splits sequences, layers or heads."""
    meshes = placed.meshes
    if max(meshes.tp.size, meshes.cp.size, meshes.pp.size) > 1:
        return None

    def forward(tokens_BT: Tensor, given: ForwardContext) -> Tensor:
        found = placed.outputs(tokens_BT.to(placed.device), given)
        assert found is not None
        return found

    return CachedModel(forward, context, placed.device, sharded=meshes.world.size > 1)


def placed_images(placed: ParallelModel, pictures: PicturePrompt, row_BT: Tensor) -> Images | None:
    """Return the images of a sequence that begins with pictures."""
    return _spread(placed, _images(placed, pictures, row_BT))


def placed_logits(placed: ParallelModel, tokens: list[int], pictures: PicturePrompt | None = None) -> Tensor:
    """Return the logits [V] of the token after `tokens`, float64 on every rank, under any layout. `pictures` are those
    at its beginning.
    """
    row_BT = torch.tensor([tokens])
    images = None if pictures is None else _images(placed, pictures, row_BT)
    return sequence_logits(placed, row_BT, images, only_last=True)[0, 0].double()


@torch.no_grad()
def sequence_logits(
    placed: ParallelModel, tokens_BT: Tensor, images: Images | None = None, only_last: bool = False
) -> Tensor:
    """Return the logits [B, T, V] of whole sequences, or with `only_last` [B, 1, V] after them, under any layout, on
    every rank that has these sequences. They are padded at their ends to a length that the layout supports. `images`
    are those of the whole sequences.
    """
    first = tokens_BT.shape[1] - 1 if only_last else 0
    return _whole_outputs(placed, tokens_BT, images, placed.model.config.vocab_size, first)


@torch.no_grad()
def sequence_scores(
    placed: ParallelModel, tokens_BT: Tensor, labels_BT: Tensor, images: Images | None = None
) -> Tensor:
    """Return the losses of labels and the ids of the likeliest words of whole sequences, [B, T, 2], as
    `sequence_logits` returns logits.
    """
    return _whole_outputs(placed, tokens_BT, images, 2, labels_BT=labels_BT)


def _whole_outputs(
    placed: ParallelModel,
    tokens_BT: Tensor,
    images: Images | None,
    width: int,
    first: int = 0,
    labels_BT: Tensor | None = None,
) -> Tensor:
    """Return the model's results at the positions of whole sequences from `first` on, [B, positions, width]."""
    meshes, (count, length) = placed.meshes, tokens_BT.shape
    missing = placed.padded_length(length) - length
    tokens_BT = F.pad(tokens_BT, (0, missing))
    positions_BT = torch.arange(tokens_BT.shape[1])[None]
    share = placed.context_shard(tokens_BT.shape[1])
    context = placed.sequence_context(positions_BT.expand(count, -1))
    if images is None and meshes.layout.encodes_ahead:  # other ranks may have pictures
        images = _no_tiles(placed, tokens_BT)
    if images is not None:
        context.images = _spread(placed, _lengthened(images, tokens_BT.shape[1]))
    if labels_BT is not None:
        labels_BT = share.take(F.pad(labels_BT, (0, missing), value=IGNORED)).to(placed.device)
        context.labels_BT, context.likeliest = labels_BT, True
    here = placed.outputs(share.take(tokens_BT).to(placed.device), context)
    found = torch.zeros(
        count, length - first, width, dtype=at_least_float32(placed.model.compute_dtype), device=placed.device
    )
    if here is not None:
        here_T = share.take(positions_BT)[0]
        wanted = ((here_T >= first) & (here_T < length)).nonzero()[:, 0]
        at = (here_T[wanted] - first).to(placed.device)
        part = here[:, wanted.to(placed.device)]
        found[:, at] = (all_gather_no_grad(part, meshes.tp, 2, "logits") if labels_BT is None else part).to(found.dtype)
    for axis in (meshes.cp, meshes.pp):  # the other ranks have zeros
        axis.sum(found, "logits")
    return found


def _images(placed: ParallelModel, pictures: PicturePrompt, row_BT: Tensor) -> Images:
    greys = torch.tensor(GREYS, device=placed.device)
    return Images(pictures.pixels_N3SS, pictures.rows(row_BT), greys, pictures.rows_kept)


def _no_tiles(placed: ParallelModel, tokens_BT: Tensor) -> Images:
    vision = placed.model.config.vision
    assert vision is not None
    pixels_N3SS = torch.zeros(0, CHANNELS, vision.tile_size, vision.tile_size, dtype=torch.uint8)
    return Images(pixels_N3SS, torch.full_like(tokens_BT, -1), torch.tensor(GREYS, device=placed.device))


def _lengthened(images: Images, length: int) -> Images:
    """Return images whose sequences have more tokens, which show none."""
    return replace(images, rows_BT=F.pad(images.rows_BT, (0, length - images.rows_BT.shape[1]), value=-1))


def _spread(placed: ParallelModel, images: Images) -> Images | None:
    """Return this rank's part of the images of whole sequences."""
    tiles_N3SS = images.tiles_N3SS
    mine_N3SS = tiles_N3SS[list(tile_share(placed.meshes, len(tiles_N3SS)))]
    found = placed.images(images.rows_BT.cpu(), len(tiles_N3SS), mine_N3SS, images.greys)
    return None if found is None else replace(found, kept=images.kept)


def _check(logits: Tensor) -> None:
    if logits.isnan().any():
        raise LeviathanError("the model computes NaN: its weights are damaged, or its training diverged")


def _sample(logits_V: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    _check(logits_V)
    if config.temperature == 0:
        return int(logits_V.argmax())
    if config.top_k is not None and config.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(config.top_k).values[-1], -torch.inf)
    below_V = logits_V - logits_V.max()  # a tiny temperature then gives -inf, not +inf
    return int(torch.multinomial((below_V / config.temperature).softmax(0), 1, generator=generator))
