"""Keep the keys and values of a batch of growing sequences, so that each new token is computed alone.

The first forward pass reads whole prompts, each later one a token of every sequence:

    cache = KeyValueCache()
    logits_B1V = model(prompts_BT, cache.prompts(lengths, device))
    logits_B1V = model(tokens_B1, cache.next_token(device))

A layer has a slot for each position; a chunked layer only for those of a chunk, since no later query attends to an
earlier chunk. A sequence fills its slots from the first one on, so prompts of different lengths are padded at their
ends, and a mask hides the slots that a sequence has not filled yet.

Shapes: B batch, T sequence, S slots, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.plan import AttentionPlan, ForwardContext
from model.config import LayerConfig, ModelConfig

_SPARE_SLOTS = 64
"""Slots beyond those of the prompts. They are doubled when they are full."""
_AHEAD = 64
"""New tokens for which rotary factors and temperatures are computed at once."""


class TokenContext(ForwardContext):
    """Context of one token for each sequence, at `positions`, whose keys and values are in a cache already.

    Rotary factors and temperatures are rows of those of `ahead`, a context of the positions from `first` on, which many
    steps share.
    """

    def __init__(
        self, positions: Sequence[int], device: torch.device | None, ahead: ForwardContext, first: int
    ) -> None:
        super().__init__(torch.tensor(positions)[:, None], device)
        self.positions, self._ahead = positions, ahead
        self._rows_B = None if _all_equal(positions) else self.positions_BT[:, 0] - first
        self._row = positions[0] - first
        self._slots: dict[int | None, Slots] = {}

    def rotation(self, model: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> Tensor:
        key = (layer.attention_chunk_size, dtype)
        if key not in self._rotations:
            self._rotations[key] = self._take(self._ahead.rotation(model, layer, dtype))
        return self._rotations[key]

    def temperature(self, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        if self._temperature is None:
            self._temperature = self._take(self._ahead.temperature(model, dtype))
        return self._temperature

    def _take(self, table: Tensor) -> Tensor:
        """Return the rows of these positions, [B, 1, ...] or [1, 1, ...], of a table [1, positions, ...]."""
        if self._rows_B is None:
            return table[:, self._row : self._row + 1]
        return table[0].index_select(0, self._rows_B)[:, None]

    def slots(self, chunk: int | None) -> Slots:
        """Return where layers with this chunk size store the tokens."""
        if chunk not in self._slots:
            numbers = [slot(position, chunk) for position in self.positions]
            same = numbers[0] if _all_equal(numbers) else None
            numbers_B = None if same is not None else torch.tensor(numbers, device=self.positions_BT.device)
            self._slots[chunk] = Slots(max(numbers) + 1, same, numbers_B)
        return self._slots[chunk]

    def _make_plan(self, chunk: int | None) -> AttentionPlan:
        slots = self.slots(chunk)
        if slots.numbers_B is None:
            return AttentionPlan(causal=False)
        filled_BS = torch.arange(slots.count, device=slots.numbers_B.device) <= slots.numbers_B[:, None]
        return AttentionPlan(mask=filled_BS[:, None, None])


@dataclass(frozen=True)
class Slots:
    """Slots of one token for each sequence. `count`: the number of slots up to the last of them. `same`: the slot of
    all sequences, if it is the same; otherwise `numbers_B` has the slot of each.
    """

    count: int
    same: int | None
    numbers_B: Tensor | None


def slot(position: int, chunk: int | None) -> int:
    """Return the slot of a position in layers with this chunk size."""
    return position if chunk is None else position % chunk


class KeyValueCache:
    """Keys and values of every layer for a batch of sequences, whose last documents have `lengths` tokens.

    `joins`: whether to keep a copy of the query, key and value matrices of each layer, joined to one, from the first
    token after the prompts until the next prompts. Not for sharded weights, which would stay whole.
    """

    def __init__(self, joins: bool = True) -> None:
        self.joins = joins
        self.lengths: list[int] = []
        self._ends: list[int] = []
        self._joined: dict[object, Tensor] = {}
        self._layers: dict[object, _LayerCache] = {}
        self._token: TokenContext | None = None
        self._ahead: ForwardContext | None = None
        self._first = self._end = 0

    def prompts(
        self, lengths: Sequence[int], device: torch.device | None = None, positions_BT: Tensor | None = None
    ) -> ForwardContext:
        """Return the context of the first pass: over prompts of these lengths, padded at their ends to the longest. The
        model returns logits [B, 1, V] after the last token of each. Forgets earlier sequences.

        `positions_BT`, on the host, restart at 0 with each document of packed prompts, as in training. The new tokens
        belong to the last document. None: a prompt is one document.
        """
        if positions_BT is None:
            positions_BT = torch.arange(max(lengths)).expand(len(lengths), -1)
        self.lengths = [int(row_T[length - 1]) + 1 for row_T, length in zip(positions_BT, lengths, strict=True)]
        self._ends, self._layers, self._joined, self._token, self._ahead = list(lengths), {}, {}, None, None
        context = ForwardContext(positions_BT, device)
        context.last_B = torch.tensor(self._ends, device=device) - 1
        context.cache = self
        return context

    def next_token(self, device: torch.device | None = None) -> ForwardContext:
        """Return the context of a pass over one more token of each sequence, [B, 1]."""
        if self._ahead is None or max(self.lengths) >= self._end:
            self._first, self._end = min(self.lengths), max(self.lengths) + _AHEAD
            self._ahead = ForwardContext(torch.arange(self._first, self._end)[None], device)
        self._token = context = TokenContext(self.lengths, device, self._ahead, self._first)
        self.lengths = [length + 1 for length in self.lengths]
        context.cache = self
        return context

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but those with these indices."""
        self.lengths = [self.lengths[index] for index in sequences]
        for layer in self._layers.values():
            layer.keep(sequences)

    def joined(self, layer: object, join: Callable[[], Tensor]) -> Tensor | None:
        """Return the matrices of a layer that `join` joins to one, or None while the prompts are read."""
        if self._token is None or not self.joins:
            return None
        if layer not in self._joined:
            self._joined[layer] = join()
        return self._joined[layer]

    def extend(self, layer: object, chunk: int | None, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one layer, and return those that the queries may attend to."""
        if self._token is not None:
            return self._layers[layer].write(self._token.slots(chunk), k_BTGK, v_BTGK)
        self._layers[layer] = _LayerCache(chunk, self._ends, self.lengths, k_BTGK, v_BTGK)
        return k_BTGK, v_BTGK


class _LayerCache:
    """Keys and values of one layer, each [B, S, G, K]."""

    def __init__(self, chunk: int | None, ends: list[int], lengths: list[int], k_BTGK: Tensor, v_BTGK: Tensor) -> None:
        """Take, from sequences that end at `ends`, what the last document of each, of `lengths` tokens, needs."""
        longest = k_BTGK.shape[1]
        self.most = chunk
        self.slots = _at_most(longest + _SPARE_SLOTS, chunk)
        # zeros, because a masked NaN would still reach the sum over values
        self.keys, self.values = (x.new_zeros(len(x), self.slots, *x.shape[2:]) for x in (k_BTGK, v_BTGK))
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            kept = slot(length, chunk)  # positions of the chunk to which the next token belongs
            self.keys[row, :kept] = k_BTGK[row, end - kept : end]
            self.values[row, :kept] = v_BTGK[row, end - kept : end]

    def write(self, slots: Slots, k_B1GK: Tensor, v_B1GK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of each sequence, and return the slots [B, S, G, K] up to the last one in use."""
        if slots.count > self.slots:
            self._grow()
        for stored, new in ((self.keys, k_B1GK), (self.values, v_B1GK)):
            if slots.same is not None:
                stored.narrow(1, slots.same, 1).copy_(new)
            else:
                stored[torch.arange(len(new), device=new.device), slots.numbers_B] = new[:, 0]
        return self.keys[:, : slots.count], self.values[:, : slots.count]

    def keep(self, sequences: Sequence[int]) -> None:
        chosen = torch.tensor(sequences, dtype=torch.int64, device=self.keys.device)
        self.keys, self.values = (x.index_select(0, chosen) for x in (self.keys, self.values))

    def _grow(self) -> None:
        more = _at_most(2 * self.slots, self.most) - self.slots
        self.keys, self.values = (
            torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], 1) for x in (self.keys, self.values)
        )
        self.slots += more


def _all_equal(numbers: Sequence[int]) -> bool:
    return numbers.count(numbers[0]) == len(numbers)


def _at_most(slots: int, most: int | None) -> int:
    return slots if most is None else min(slots, most)
