"""What a forward pass knows of its rows beside the tokens: positions, which keys a query may see, rotations.

Everything here is computed once per batch and shared by all layers. Which form of attention applies is decided from the
positions on the host, so that no layer asks the device.

Shapes: B batch, T sequence, K head width, C chunk, N blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.rope import frequencies, rotation
from model.attention.segments import Segment, SegmentRun, documents, pieces
from model.config import LayerConfig, ModelConfig
from precision.gemm import at_least_float32

PIECES_FROM = 512
"""Length of rows of several documents from which attention goes in pieces instead of under a mask, which is [T, T] in
layers that see whole rows and [T, 2 chunk] in chunked ones.
Measured on a CPU, forward and backward, documents of 50 to 2,000 tokens: as fast at 256, 1 to 4 times as fast at 512,
up to 13 times at 2,048.
"""


@dataclass(frozen=True)
class AttentionPlan:
    """How one kind of layer attends.

    The row is cut into blocks of `block` positions (None: the whole row is one). Queries see their own block and, with
    `halo`, the one before it (chunks of a document that starts inside a block may reach back there). `mask` [B*N, 1,
    queries, keys] says which pairs count; without one attention is causal within the block. With `parts` it goes in
    pieces over the whole row instead.
    """

    block: int | None = None
    halo: bool = False
    mask: Tensor | None = None
    parts: list[Segment] | None = None


class SequenceContext:
    """Positions of a batch and, made when first asked for, the plans and rotations that layers share.

    `positions_BT` (int64) restart at 0 with each document; a row may begin inside a document, at position 0.
    `routed_tokens` is the global number of tokens of this optimizer step, the divisor of every balancing term; without
    it balancing terms are refused. Pass positions that are still on the host, and the device the model is on.
    """

    def __init__(
        self, positions_BT: Tensor, device: torch.device | None = None, routed_tokens: Tensor | float | None = None
    ) -> None:
        self._host_positions = positions_BT.cpu()
        self.positions_BT = positions_BT.to(device) if device is not None else positions_BT
        self.routed_tokens = routed_tokens
        self._plans: dict[int | None, AttentionPlan] = {}
        self._rotations: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._temperature: Tensor | None = None  # float64, cast where it is used

    def plan(self, chunk: int | None) -> AttentionPlan:
        """The attention of layers with this chunk (None: full causal within the document)."""
        if chunk not in self._plans:
            self._plans[chunk] = self._make_plan(chunk)
        return self._plans[chunk]

    def rotation(self, model: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> Tensor:
        """[B, T, 1, K/2] complex. A chunked layer never looks past its chunk, so its angles start anew there: equal
        scores, and no loss of precision at positions in the millions.
        """
        key = (layer.attention_chunk_size, dtype)
        if key not in self._rotations:
            positions = (
                self.positions_BT
                if layer.attention_chunk_size is None
                else self.positions_BT % layer.attention_chunk_size
            )
            table = frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
            self._rotations[key] = rotation(positions, table, dtype)
        return self._rotations[key]

    def temperature(self, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """Scale of NoPE queries [B, T, 1, 1], in at least float32: 1 + scale * ln(1 + floor((p + 1) / floor))."""
        if self._temperature is None:
            steps = torch.floor((self.positions_BT + 1).double() / model.temperature_floor)
            self._temperature = (1 + model.temperature_scale * torch.log1p(steps))[:, :, None, None]
        return self._temperature.to(at_least_float32(dtype))

    def prepare(self, model: ModelConfig, dtype: torch.dtype) -> None:
        """Make at once what the layers would ask for, so that code which is traced only looks it up."""
        for layer in model.blocks:
            self.plan(layer.attention_chunk_size)
            if layer.rope:
                self.rotation(model, layer, dtype)
            if layer.temperature:
                self.temperature(model, dtype)

    def _make_plan(self, chunk: int | None) -> AttentionPlan:
        length = self._host_positions.shape[1]
        starts = self._host_positions == 0 if chunk is None else self._host_positions % chunk == 0
        if chunk is None or chunk >= length:
            if not bool(starts[:, 1:].any()):
                return AttentionPlan()
            if length >= PIECES_FROM:
                whole = [SegmentRun(0, length, 0)]
                return AttentionPlan(parts=pieces(documents(starts), whole, whole))
            return AttentionPlan(mask=self._whole_mask(starts))
        if bool((starts == on_grid(length, chunk)).all()):
            return AttentionPlan(block=chunk)
        if length >= PIECES_FROM:
            whole = [SegmentRun(0, length, 0)]
            return AttentionPlan(parts=pieces(documents(starts), whole, whole))
        return _blocked(starts, chunk, self.positions_BT.device)

    def _whole_mask(self, starts_BT: Tensor) -> Tensor:
        segments_BT = starts_BT.to(self.positions_BT.device).cumsum(1)
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        return same.tril()[:, None]


def on_grid(length: int, chunk: int) -> Tensor:
    """Where blocks begin: bool [T], on the host."""
    return torch.arange(length) % chunk == 0


def _blocked(starts_BT: Tensor, chunk: int, device: torch.device) -> AttentionPlan:
    """How chunked layers attend where chunks start at `starts_BT` (on the host), elsewhere than blocks do. No halo
    where none reaches from one block into the next.
    """
    halo = not bool(starts_BT[:, ::chunk].all())
    segments_BT = starts_BT.to(device).cumsum(1)
    queries = blocks(segments_BT, chunk, fill=-1)
    keys = queries
    if halo:  # a chunk of a document is no longer than a block, so it reaches no further
        before = queries.roll(1, dims=1)
        before[:, 0] = -2
        keys = torch.cat([before, queries], dim=2)
    places = torch.arange(keys.shape[2], device=device)
    order = places <= places[-chunk:, None]
    mask = (queries[..., :, None] == keys[..., None, :]) & order
    return AttentionPlan(block=chunk, halo=halo, mask=mask.flatten(0, 1)[:, None])


def blocks(x_BT: Tensor, block: int, fill: float = 0) -> Tensor:
    """Cut dimension 1 into blocks, padding the last one: [B, T, ...] -> [B, N, block, ...]."""
    missing = -x_BT.shape[1] % block
    if missing:
        x_BT = torch.cat([x_BT, x_BT.new_full((x_BT.shape[0], missing, *x_BT.shape[2:]), fill)], dim=1)
    return x_BT.unflatten(1, (-1, block))
