"""Inputs of a forward pass besides the tokens: positions, attention plans, rotary factors and global token count.

They are computed once per micro-batch for all layers. Positions on the host decide whether attention uses blocks, a
mask or segments, so that no layer synchronises with the device.

Shapes: B batch, T sequence, K head dim, N blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.memory import upload
from model.attention.rope import frequencies, rotation
from model.attention.segments import Segment, SegmentRun, document_bounds, plan_segments
from model.config import LayerConfig, ModelConfig
from model.vision.fusion import Images
from precision.config import AttentionKind
from precision.gemm import at_least_float32

SEGMENTED_FROM = 512
"""Sequence length from which packed documents use segments instead of a mask ([T, T], or [T, 2 * chunk] if chunked).

Measured on a CPU with documents of 50 to 2,000 tokens, forward and backward pass: segments were as fast as a mask at
length 256, 1 to 4 times as fast at 512 and up to 13 times as fast at 2,048.
"""


@dataclass(frozen=True)
class AttentionPlan:
    """How layers with the same `attention_chunk_size` attend.

    The sequence is split into blocks of `block` positions (None: one block). Queries attend to their own block. With
    `halo` they also attend to the previous block, because a chunk may begin there if its document starts inside a
    block. `mask` [B*N, 1, queries, keys] selects the pairs; without a mask, attention is causal within the block or, if
    not `causal`, includes every key. If `segments` is given, it replaces blocks and mask.
    """

    block: int | None = None
    halo: bool = False
    mask: Tensor | None = None
    segments: list[Segment] | None = None
    causal: bool = True


class KeyValueStore(Protocol):
    """Keeps keys and values from one forward pass to the next: `model.attention.cache`."""

    def joined(self, layer: object, join: Callable[[], Tensor]) -> Tensor | None:
        """Return the matrices of a layer that `join` joins to one, kept from token to token; None: multiply by each."""
        ...

    def extend(self, layer: object, chunk: int | None, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one layer, and return those that the queries may attend to."""
        ...


class ForwardContext:
    """Positions of a micro-batch, and the plans and rotary factors that layers share, built on first use.

    `positions_BT` (int64) restart at 0 at each document, and a document starts at the first position of each sequence.
    Pass them on the host, and the model's device as `device`. `routed_tokens`: the global number of tokens of the
    optimizer step, by which every balancing loss is divided.
    """

    def __init__(
        self, positions_BT: Tensor, device: torch.device | None = None, routed_tokens: Tensor | float | None = None
    ) -> None:
        self._host_positions = positions_BT.cpu()
        self.positions_BT = upload(positions_BT, device)
        self.routed_tokens = routed_tokens
        self.images: Images | None = None
        """The images of the micro-batch; None: it has none."""
        self.is_image_BT: Tensor | None = None
        """Which positions show an image, where the MoE layers run (after tp's split of the sequence), to count the
        experts' loads of images. None: they are not counted.
        """
        self.cache: KeyValueStore | None = None
        """Keys and values of earlier passes, for generation; None: every sequence is whole."""
        self.labels_BT: Tensor | None = None
        """Labels, for which the model returns the losses instead of logits; negative ones have none."""
        self.likeliest = False
        """Whether the model returns [B, T, 2]: the losses of the labels, and the ids of the likeliest words."""
        self.is_static = False
        """Whether compiled layers read the plans, which must not be compiled again for each batch. The longest document
        is then taken to be a whole sequence or chunk, and the number of documents is a dynamic size.
        """
        self.last_B: Tensor | None = None
        """The position of each sequence for which alone logits are computed; None: for all."""
        self._plans: dict[int | None, AttentionPlan] = {}
        self._borders: dict[int | None, tuple[Tensor, int]] = {}
        self._rotations: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._temperature: Tensor | None = None  # float64, cast at use

    def plan(self, chunk: int | None) -> AttentionPlan:
        """Return the plan of layers with this chunk size (None: full causal attention within the document)."""
        if chunk not in self._plans:
            self._plans[chunk] = self._make_plan(chunk)
        return self._plans[chunk]

    def borders(self, chunk: int | None) -> tuple[Tensor, int]:
        """Return the first positions of documents and chunks among those of all sequences, with the end of the last
        one, int32 on the device, and a length that none exceeds: that of the longest.
        """
        if chunk not in self._borders:
            ends = piece_borders(self._host_positions, chunk)
            ends_on_device = upload(ends.int(), self.positions_BT.device)
            if self.is_static:
                length = self._host_positions.shape[1]
                longest = min(length, chunk or length)
                torch._dynamo.mark_dynamic(ends_on_device, 0)
            else:
                longest = int(ends.diff().max())
            self._borders[chunk] = ends_on_device, longest
        return self._borders[chunk]

    def rotation(self, model: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> Tensor:
        """Return cosines and sines, [B, T, 1, K/2, 2]. In a chunked layer angles restart with each chunk. This leaves
        the scores unchanged and keeps their precision at positions in the millions.
        """
        key = (layer.attention_chunk_size, dtype)
        if key not in self._rotations:
            chunk = layer.attention_chunk_size
            positions = self.positions_BT if chunk is None else self.positions_BT % chunk
            width = model.head_dim if model.latent is None else model.latent.rope_dim
            scaling = model.rope_scaling or model.rope_yarn
            turns = rotation(positions, frequencies(width, model.rope_theta, scaling, positions.device), dtype)
            self._rotations[key] = turns if model.rope_yarn is None else turns * model.rope_yarn.rotation_factor
        return self._rotations[key]

    def temperature(self, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """Return the scale of NoPE queries at positions p, [B, T, 1, 1] in at least float32:
        1 + scale * ln(1 + floor((p + 1) / floor)).
        """
        if self._temperature is None:
            steps = torch.floor((self.positions_BT + 1).double() / model.temperature_floor)
            self._temperature = (1 + model.temperature_scale * torch.log1p(steps))[:, :, None, None]
        return self._temperature.to(at_least_float32(dtype))

    def prepare_attention(self, model: ModelConfig, attention: AttentionKind) -> None:
        """Do the work of attention that reads positions on the host, for every chunk size of the model."""
        for chunk in dict.fromkeys(layer.attention_chunk_size for layer in model.blocks):
            match attention:
                case AttentionKind.varlen:
                    self.borders(chunk)
                case AttentionKind.segments:
                    self.plan(chunk)
                case AttentionKind.auto:
                    raise ValueError("attention=auto: `resolve` it first")

    def tensors(self) -> list[Tensor]:
        """Return the tensors on the device that exist so far."""
        masks = [plan.mask for plan in self._plans.values() if plan.mask is not None]
        images = [] if self.is_image_BT is None else [self.is_image_BT]
        return [self.positions_BT, *(ends for ends, _ in self._borders.values()), *masks, *images]

    def prepare(
        self, model: ModelConfig, dtype: torch.dtype, attention: AttentionKind = AttentionKind.segments
    ) -> None:
        """Build everything that the layers need, so that traced code only reads it, and no layer waits for the host."""
        self.prepare_attention(model, attention)
        for layer in model.blocks:
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
            if length < SEGMENTED_FROM:
                return AttentionPlan(mask=self._document_mask(starts))
        elif bool((starts == on_grid(length, chunk)).all()):
            return AttentionPlan(block=chunk)
        elif length < SEGMENTED_FROM:
            return _blocked(starts, chunk, self.positions_BT.device)
        whole = [SegmentRun(0, length, 0)]
        return AttentionPlan(segments=plan_segments(document_bounds(starts), whole, whole))

    def _document_mask(self, starts_BT: Tensor) -> Tensor:
        segments_BT = upload(starts_BT, self.positions_BT.device).cumsum(1)
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        return same.tril()[:, None]


def piece_borders(positions_BT: Tensor, chunk: int | None) -> Tensor:
    """Return where each document begins among the positions of all sequences or, with `chunk`, each chunk of one, and
    the end of the last, int64. All on the host.
    """
    starts_BT = (positions_BT if chunk is None else positions_BT % chunk) == 0
    starts_BT[:, 0] = True
    return torch.cat([starts_BT.flatten().nonzero()[:, 0], torch.tensor([starts_BT.numel()])])


def squared_lengths(positions_BT: Tensor, chunk: int | None) -> int:
    """Return the sum of the squared lengths of packed documents, or of their chunks. Twice the query-key pairs that a
    layer with this chunk size computes for them. `positions_BT` on the host: see `ForwardContext`.
    """
    return int(piece_borders(positions_BT, chunk).diff().square().sum())


def on_grid(length: int, chunk: int) -> Tensor:
    """Return whether a block begins at each position: bool [T], on the host."""
    return torch.arange(length) % chunk == 0


def _blocked(starts_BT: Tensor, chunk: int, device: torch.device) -> AttentionPlan:
    """Make the plan for chunks that start at `starts_BT` (on the host) rather than at block boundaries. A halo is
    needed only if a chunk crosses a block boundary.
    """
    halo = not bool(starts_BT[:, ::chunk].all())
    segments_BT = upload(starts_BT, device).cumsum(1)
    queries = blocks(segments_BT, chunk, fill=-1)
    keys = queries
    if halo:  # a chunk is at most one block long, so one previous block is enough
        before = queries.roll(1, dims=1)
        before[:, 0] = -2
        keys = torch.cat([before, queries], dim=2)
    places = torch.arange(keys.shape[2], device=device)
    order = places <= places[-chunk:, None]
    mask = (queries[..., :, None] == keys[..., None, :]) & order
    return AttentionPlan(block=chunk, halo=halo, mask=mask.flatten(0, 1)[:, None])


def blocks(x_BT: Tensor, block: int, fill: float = 0) -> Tensor:
    """Split dimension 1 into blocks and pad the last one: [B, T, ...] -> [B, N, block, ...]."""
    missing = -x_BT.shape[1] % block
    if missing:
        x_BT = torch.cat([x_BT, x_BT.new_full((x_BT.shape[0], missing, *x_BT.shape[2:]), fill)], dim=1)
    return x_BT.unflatten(1, (-1, block))
