"""Ranks plan the exchange of the encoder's rows alike, and every position gets its row."""

from __future__ import annotations

import pytest
import torch

from parallel.context_parallel import ContextShard
from parallel.layout import ContextMethod, ParallelConfig
from parallel.mesh import meshes_of_rank
from parallel.vision.config import EncoderStages, VisionParallelConfig
from parallel.vision.exchange import SpreadImages, spread, tile_share

PER_TILE, LENGTH, UNIT = 4, 32, 4


def exchanged(rows_BT: torch.Tensor, tiles: int, cp: int, tp: int, pp: int = 1) -> tuple[torch.Tensor, list[range]]:
    """Return the row that each position gets, -1 for text, and the tiles that each rank encodes. With a pipeline the
    ranks of all stages encode, and those of the first have the positions.
    """
    vision = VisionParallelConfig(EncoderStages.all if pp > 1 else EncoderStages.first)
    count = pp * cp * tp
    layout = ParallelConfig(pp=pp, cp=cp, tp=tp, vision=vision).resolve(count)
    planned, sent, shares, parts = [], [], [], []
    for rank in range(count):
        meshes = meshes_of_rank(layout, rank)
        shard = ContextShard(meshes.cp, LENGTH, UNIT, ContextMethod.gather)
        share = tile_share(meshes, tiles)
        pixels = torch.zeros(len(share), 3, 4, 4)
        images = spread(meshes, shard, rows_BT, tiles, PER_TILE, pixels, None, torch.device("cpu"))
        assert isinstance(images, SpreadImages)
        encoded = torch.arange(share.start * PER_TILE, share.stop * PER_TILE)
        sent.append(encoded[images.chosen_M].split(images.send))
        planned.append(images)
        shares.append(share)
    for rank, images in enumerate(planned):
        pieces = [sent[other][rank] for other in range(count)]
        assert [len(piece) for piece in pieces] == images.receive
        received = torch.cat([*pieces, torch.tensor([-1])])
        parts.append(received[images.rows_BT])  # -1 reads the last element
    whole = [torch.cat(parts[at : at + tp], 1) for at in range(0, cp * tp, tp)]
    return ContextShard(meshes.cp, LENGTH, UNIT, ContextMethod.gather).unshard(whole, 1), shares


@pytest.mark.parametrize("cp, tp, pp", [(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (1, 1, 2), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("tiles", [1, 2, 5, 9])
def test_every_position_gets_its_row(cp, tp, pp, tiles):
    """Tiles follow each other at random distances; one is cut at its end, as by the end of a sequence."""
    generator = torch.Generator().manual_seed(tiles)
    places = torch.randperm(2 * LENGTH, generator=generator)[: tiles * PER_TILE - 1].sort().values
    rows = torch.full((2 * LENGTH,), -1)
    rows[places] = torch.arange(len(places))
    rows_BT = rows.view(2, LENGTH)
    found, shares = exchanged(rows_BT, tiles, cp, tp, pp)
    assert torch.equal(found, rows_BT)
    assert [tile for share in shares for tile in share] == list(range(tiles))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_later_stages_encode_nothing():
    layout = ParallelConfig(pp=2, tp=2).resolve(4)
    assert [len(tile_share(meshes_of_rank(layout, rank), 6)) for rank in range(4)] == [3, 3, 0, 0]
