"""Whole matrices out of their pieces and back, for an optimizer that must see each of them as one.

Tensor parallelism, or that of expert widths, cuts a matrix first, FSDP2 cuts what is left. One of the ranks that hold
its pieces puts it together, works on it and sends every other its piece of the result; experts that are cut by number
only are whole where they lie, and nothing is sent. This goes axis by axis: one all-to-all over the ranks that share the
storage, one over those that share the parameter, and the same way back. A rank hands each of them as many bytes as it
stores of the matrices, or as it was given, which differs between ranks by one matrix of a shape at most. Ranks along
`dp_replicate` do the same work each for themselves: they need no collective for it and stay equal bit for bit.

Every rank of a group makes the same plan, out of `ShardSpec`s alone, so collectives meet in the same order. Matrices of
one shape that are cut alike travel and are worked on together, as many at a time as `at_once` elements hold: that, what
arrives of it, and what the work itself takes is the memory that is needed beside the pieces.

Shapes: N matrices, O rows (outputs), I columns (inputs), of which a rank has o and i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from parallel.comm.collectives import all_to_all
from parallel.mesh import MeshAxis, Meshes
from parallel.sharding import ShardBlock, ShardSpec, Split

PURPOSE = "matrices"
AT_ONCE = 1 << 26
"""Elements of whole matrices on one rank at a time: 256 MiB of float32."""


@dataclass(frozen=True)
class MatrixSplit:
    """How the ranks of `axis` from `first` on share a matrix: `lengths` along `dim` (-2 rows, -1 columns).

    `name` is the axis that cuts. Parts of an expert's width have no group of their own: they travel over `experts`,
    where those of one expert are neighbours.
    """

    name: str
    axis: MeshAxis
    first: int
    dim: int
    lengths: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.axis.rank - self.first


@dataclass(frozen=True)
class GatherStage:
    """An all-to-all that makes pieces whole along one cut: the first `counts[0]` matrices on the cut's first rank, the
    next `counts[1]` on its second, and so on.
    """

    split: MatrixSplit
    counts: tuple[int, ...]

    def gather(self, pieces_Noi: Tensor) -> Tensor:
        """Pieces of all matrices to the whole of those that this rank is to have."""
        cut, mine = self.split, self.counts[self.split.rank]
        shapes = [_resized(pieces_Noi.shape[1:], cut.dim, length) for length in cut.lengths]
        send = [count * math.prod(pieces_Noi.shape[1:]) for count in self.counts]
        receive = [mine * math.prod(shape) for shape in shapes]
        parts = self._exchange(pieces_Noi.flatten(), send, receive).split(receive)
        return torch.cat([part.view(mine, *shape) for part, shape in zip(parts, shapes, strict=True)], cut.dim)

    def scatter(self, whole_Noi: Tensor) -> Tensor:
        """The way back: this rank's matrices, cut again, to its pieces of all of them."""
        cut, (rows, columns) = self.split, whole_Noi.shape[1:]
        shape = _resized((rows, columns), cut.dim, cut.lengths[cut.rank])
        parts = whole_Noi.split(cut.lengths, cut.dim)
        receive = [count * math.prod(shape) for count in self.counts]
        flat = torch.cat([part.flatten() for part in parts])
        return self._exchange(flat, [part.numel() for part in parts], receive).view(sum(self.counts), *shape)

    def _exchange(self, flat: Tensor, send: list[int], receive: list[int]) -> Tensor:
        before = [0] * self.split.first
        after = [0] * (self.split.axis.size - self.split.first - len(send))
        return all_to_all(flat, before + send + after, before + receive + after, self.split.axis, PURPOSE)


@dataclass(frozen=True)
class MatrixRange:
    """Matrices [start, stop) of those that this rank has a part of in the parameter `name`."""

    name: str
    start: int
    stop: int

    def of(self, part: Tensor) -> Tensor:
        """Of a tensor that is laid out as this rank's part of the parameter, these matrices [N, o, i], a view."""
        return part.view(math.prod(part.shape[:-2]), *part.shape[-2:])[self.start : self.stop]


@dataclass(frozen=True)
class Round:
    """Matrices that are worked on together: of one whole `shape` (rows, columns), and cut alike."""

    shape: tuple[int, int]
    pieces: tuple[MatrixRange, ...]
    stages: tuple[GatherStage, ...]

    def gather(self, pieces_Noi: Tensor) -> Tensor:
        """This rank's pieces, in the order of `pieces`, to whole matrices [N, O, I]: other ones, and maybe none."""
        for stage in self.stages:
            pieces_Noi = stage.gather(pieces_Noi)
        return pieces_Noi

    def scatter(self, whole_NOI: Tensor) -> list[Tensor]:
        """What became of the whole matrices to this rank's pieces of it, one tensor [N, o, i] for each of `pieces`."""
        for stage in reversed(self.stages):
            whole_NOI = stage.scatter(whole_NOI)
        return list(whole_NOI.split([piece.stop - piece.start for piece in self.pieces]))


def rounds(specs: Mapping[str, ShardSpec], meshes: Meshes, at_once: int = AT_ONCE) -> list[Round]:
    """The plan for the matrices of these parameters, their last two dimensions: each is whole on one rank in one round.

    All ranks that share a parameter must ask with the same `specs` of it, in the same order.
    """
    alike: dict[tuple[int, int, tuple[tuple[str, int], ...]], list[str]] = {}
    for name, spec in specs.items():
        cut_how = tuple((cut.name, cut.dim) for cut in matrix_splits(spec, meshes))
        rows, columns = spec.info.shape[-2:]
        alike.setdefault((rows, columns, cut_how), []).append(name)
    found, shares = [], _Shares()
    for (rows, columns, _), names in alike.items():
        cut_by = matrix_splits(specs[names[0]], meshes)
        together = max(1, at_once // (rows * columns)) * math.prod(len(cut.lengths) for cut in cut_by)
        work = rows * columns * min(rows, columns)
        for pieces in _batches(specs, names, together):
            held, stages = sum(piece.stop - piece.start for piece in pieces), []
            for cut in cut_by:
                stages.append(GatherStage(cut, shares.take(cut, held, work)))
                held = stages[-1].counts[cut.rank]
            found.append(Round((rows, columns), pieces, tuple(stages)))
    return found


def matrix_splits(spec: ShardSpec, meshes: Meshes) -> tuple[MatrixSplit, ...]:
    """What divides each matrix of a parameter, last cut first."""
    found: list[MatrixSplit] = []
    block, dims = ShardBlock((0,) * len(spec.info.shape), tuple(spec.info.shape)), len(spec.info.shape)
    for split in (*spec.splits, spec.fsdp_split):
        if split.axis.size > 1 and split.dim >= dims - 2:
            parts = [block.shard(Split(replace(split.axis, rank=rank), split.dim)) for rank in range(split.axis.size)]
            lengths = tuple(part.shape[split.dim] for part in parts)
            axis, first = split.axis, 0
            if axis.name == meshes.etp.name:
                axis, first = meshes.experts, meshes.ep.rank * meshes.etp.size
            found.append(MatrixSplit(split.axis.name, axis, first, split.dim - dims, lengths))
        block = block.shard(split)
    return tuple(reversed(found))


def _batches(specs: Mapping[str, ShardSpec], names: list[str], together: int) -> Iterator[tuple[MatrixRange, ...]]:
    """This rank's matrices of these parameters in order, so many at a time."""
    batch: list[MatrixRange] = []
    room = together
    for name in names:
        count, start = math.prod(specs[name].local_block.shape[:-2]), 0
        while start < count:
            piece = MatrixRange(name, start, min(count, start + room))
            batch.append(piece)
            room -= piece.stop - start
            start = piece.stop
            if not room:
                yield tuple(batch)
                batch, room = [], together
    if batch:
        yield tuple(batch)


@dataclass
class _Shares:
    """Who does how much: equal numbers of each shape, and what does not divide goes to who has least to do so far."""

    loads: dict[str, list[int]] = field(default_factory=dict)

    def take(self, cut: MatrixSplit, matrices: int, work: int) -> tuple[int, ...]:
        """How many of these matrices each rank of the cut gets."""
        ranks = len(cut.lengths)
        loads = self.loads.setdefault(cut.name, [0] * ranks)
        least = sorted(range(ranks), key=lambda rank: (loads[rank], rank))[: matrices % ranks]
        counts = tuple(matrices // ranks + (rank in least) for rank in range(ranks))
        for rank, count in enumerate(counts):
            loads[rank] += count * work
        return counts


def _resized(shape: tuple[int, ...], dim: int, length: int) -> tuple[int, int]:
    rows, columns = shape
    return (length, columns) if dim == -2 else (rows, length)
