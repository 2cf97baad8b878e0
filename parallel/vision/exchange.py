"""Spread tiles over ranks, and send the encoder's rows to the positions that show them.

The cp * tp ranks that hold parts of the same sequences each encode an equal share of their tiles: those of a
micro-batch or, if the ranks of all pipeline stages share them (`parallel.vision.ahead`), of a step. Data-parallel ranks
may share those of their sequences too. Every rank has the
whole encoder, so a tile is never split. All of these ranks know which tile each position of the whole sequences shows.
So they plan on the host, without communication, which rows they send to each other in one all-to-all.

Each position is on one rank only, so each row is sent to one rank, and the encoder's gradient on a rank is the part of
the sum that is due to its tiles. A rank without tiles encodes an empty batch: the collectives of FSDP2 and DeepSpeed in
the encoder need all ranks.

Shapes: B sequences, T tokens, N tiles that this rank encodes, S side of a tile in pixels, Q image tokens per tile,
M image tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.memory import upload
from model.vision.fusion import Images
from parallel.comm.collectives import all_to_all
from parallel.context_parallel import ContextShard
from parallel.mesh import MeshAxis, Meshes

PURPOSE = "images"


def tile_share(meshes: Meshes, tiles: int, ranks: int = 1) -> range:
    """Return which of `tiles` tiles this rank encodes: tiles of a micro-batch or, if all stages of a pipeline encode,
    of a step. `ranks`: the number of data-parallel ranks whose sequences show these tiles.
    """
    if meshes.pp.rank and not meshes.layout.encodes_ahead:
        return range(0)
    axis = meshes.encoders(ranks > 1)
    return _share(tiles, axis.size, axis.rank)


def _share(tiles: int, size: int, rank: int) -> range:
    return range(tiles * rank // size, tiles * (rank + 1) // size)


@dataclass(frozen=True, kw_only=True)
class SpreadImages(Images):
    """Images whose tiles several ranks encode. `chosen_M`: the rows that this rank sends, in the order of the receiving
    ranks. `send` and `receive`: the number of rows for and from each rank.
    """

    axis: MeshAxis
    chosen_M: Tensor
    send: list[int]
    receive: list[int]

    def deliver(self, rows_MD: Tensor) -> Tensor:
        return all_to_all(F.embedding(self.chosen_M, rows_MD), self.send, self.receive, self.axis, PURPOSE)


def spread(
    meshes: Meshes,
    shard: ContextShard,
    rows_BT: Tensor,
    tiles: int,
    tokens_per_tile: int,
    pixels_N3SS: Tensor,
    greys: Tensor | None,
    device: torch.device,
    ranks: int = 1,
) -> Images:
    """Return the images of this rank's positions. `rows_BT`: the encoder rows that the whole sequences show, on the
    host, those of `ranks` data-parallel ranks one after the other. `tiles`: the number of their tiles. `pixels_N3SS`:
    those of `tile_share`. The result's `rows_BT` stay on the host if the images are encoded ahead.
    """
    share, axis = tile_share(meshes, tiles, ranks), meshes.encoders(ranks > 1)
    where = torch.device("cpu") if meshes.layout.encodes_ahead else device
    assert len(pixels_N3SS) == len(share), f"{len(pixels_N3SS)} tiles are decoded, not tiles {share} of {tiles}"
    sequences = rows_BT.chunk(ranks)
    parts = [part for own in sequences for part in ([own] if shard.axis.size == 1 else shard.shards(own, 1))]
    places = [place for part in parts for place in part.chunk(meshes.tp.size, 1)]
    places += [sequences[0][:, :0]] * (axis.size - len(places))  # later stages have no positions
    here_BT = places[axis.rank].contiguous()
    if axis.size == 1 or tiles == 0:
        return Images(pixels_N3SS, upload(here_BT, where), greys)
    shown = [place[place >= 0].unique() for place in places]  # ascending, and so in the order of the sending ranks
    first, last = share.start * tokens_per_tile, share.stop * tokens_per_tile
    chosen = [rows[(rows >= first) & (rows < last)] - first for rows in shown]
    ends = torch.tensor([_share(tiles, axis.size, rank).stop * tokens_per_tile for rank in range(axis.size)])
    senders = torch.bucketize(shown[axis.rank], ends, right=True)
    numbers_BT = torch.searchsorted(shown[axis.rank], here_BT)
    return SpreadImages(
        pixels_N3SS,
        upload(torch.where(here_BT < 0, -1, numbers_BT), where),
        greys,
        axis=axis,
        chosen_M=upload(torch.cat(chosen), device),
        send=[len(rows) for rows in chosen],
        receive=torch.bincount(senders, minlength=axis.size).tolist(),
    )
