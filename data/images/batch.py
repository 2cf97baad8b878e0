"""The images of a batch: which tiles its sequences show, and which encoder row each placeholder stands for.

Everything but the pixels is a pure function of (seed, manifest, phase, step), known to every rank. Each rank decodes
only the tiles that it encodes.

Shapes: B sequences, T tokens, N tiles, S side of a tile in pixels, Q image tokens per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TileRef:
    """A tile of a stored picture: the stream's name, the picture's number in it, the tile's number in the picture."""

    stream: str
    image: int
    tile: int


Decode = Callable[[TileRef], NDArray[np.uint8]]
MODALITIES = ("images", "text")
"""The kinds of documents that losses and loads are reported for: with images, and of text alone."""


@dataclass
class BatchImages:
    """`rows_BT` (int64): for a placeholder tile * Q + q, where `tile` counts the tiles of its own sequence; -1: text.
    `tiles`: the tiles of each sequence, in the order of their placeholders.
    """

    rows_BT: Tensor
    tiles: list[list[TileRef]]
    tokens_per_tile: int
    decode: Decode | None = None
    """Returns a tile, uint8 [3, S, S]."""
    side: int = 0
    """S."""
    ranks: int = 1
    """Number of data-parallel ranks whose sequences these are: see `interleaved`."""
    own_BT: Tensor | None = None
    """`rows_BT` of this rank's sequences alone, if these are of several ranks."""
    pixels: list[Tensor] = field(default_factory=list)
    """For each micro-batch the tiles that this rank encodes, uint8 [N, 3, S, S]: see `load`."""

    @property
    def local_rows_BT(self) -> Tensor:
        """The encoder row of each placeholder in this rank's sequences, -1 elsewhere."""
        return self.rows_BT if self.own_BT is None else self.own_BT

    def documents_with_images(self, positions_BT: Tensor) -> Tensor:
        """Return whether the document of each position shows an image in the same sequence, bool [B, T]."""
        documents_BT = (positions_BT == 0).cumsum(1)
        placeholders_BT = torch.zeros(len(positions_BT), positions_BT.shape[1] + 1, dtype=torch.int64)
        placeholders_BT.scatter_add_(1, documents_BT, (self.local_rows_BT >= 0).long())
        return placeholders_BT.gather(1, documents_BT) > 0

    def slice(self, start: int, stop: int) -> BatchImages:
        """Return sequences [start, stop), without pixels."""
        return replace(self, rows_BT=self.rows_BT[start:stop], tiles=self.tiles[start:stop], pixels=[])

    def interleaved(self, ranks: int, micro_batch_size: int, rank: int) -> BatchImages:
        """Return the images of the same sequences in another order, without pixels. Those of `ranks` ranks, one rank
        after the other, become the first micro-batch of each rank, then the second of each. `rank`: this one.
        """
        order = torch.arange(len(self.tiles)).view(ranks, -1, micro_batch_size).transpose(0, 1).flatten()
        tiles = [self.tiles[number] for number in order.tolist()]
        own_BT = self.rows_BT.chunk(ranks)[rank]
        return replace(self, rows_BT=self.rows_BT[order], tiles=tiles, ranks=ranks, own_BT=own_BT, pixels=[])

    def concat(self, other: BatchImages) -> BatchImages:
        rows = torch.cat([self.rows_BT, other.rows_BT])
        return replace(self, rows_BT=rows, tiles=self.tiles + other.tiles, pixels=[])

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, list[TileRef]]]:
        """Yield, for each `size` sequences, the encoder row of each placeholder, counted over all their tiles, and the
        tiles.
        """
        for start in range(0, len(self.tiles), size):
            part = self.slice(start, start + size)
            firsts = np.cumsum([0, *map(len, part.tiles)])[:-1] * self.tokens_per_tile
            offsets = torch.from_numpy(firsts).to(torch.int64)[:, None]
            rows_BT = torch.where(part.rows_BT < 0, part.rows_BT, part.rows_BT + offsets)
            yield rows_BT, [tile for tiles in part.tiles for tile in tiles]

    def load(self, decode: Decode, micro_batch_size: int, side: int, share: Callable[[int], range] = range) -> None:
        """Decode the tiles that this rank encodes, as `share` selects them from the tiles of each micro-batch."""
        self.pixels = []
        for _, tiles in self.micro_batches(micro_batch_size):
            mine = [decode(tiles[number]) for number in share(len(tiles))]
            found = np.stack(mine) if mine else np.zeros((0, 3, side, side), np.uint8)
            self.pixels.append(torch.from_numpy(found))
