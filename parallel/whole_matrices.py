"""Gather sharded matrices and scatter them again, for an optimizer that needs each matrix whole.

Tensor parallelism, or expert tensor parallelism, splits a matrix first, and FSDP2 then shards it. One of the ranks that
hold shards of a matrix gathers it, updates it and sends every other rank its shard of the result. If experts are
split by number only, their matrices are whole already and nothing is sent. Gathering takes one all-to-all per split
axis, the last split first, and scattering takes as many. The bytes that ranks send differ by at most one matrix per
shape. Ranks along `dp_replicate` do the same work without a collective and stay equal bit for bit.

Ranks that hold shards of the same matrices make the same plan, from `ShardSpec`s alone, so they issue collectives in
the same order. Matrices of one shape that are split alike are sent and updated together, up to `at_once` elements at a
time. Besides the shards, memory is needed for these elements, the receive buffers and the update itself.

Shapes: N matrices, O rows (outputs), I columns (inputs), of which a rank has o and i.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.comm.collectives import all_to_all
from parallel.mesh import MeshAxis, Meshes
from parallel.sharding import ShardBlock, ShardSpec, Split

PURPOSE = "matrices"
AT_ONCE = 1 << 26
"""Default of `at_once`: the elements of whole matrices on one rank at a time, 256 MiB of float32."""


@dataclass(frozen=True)
class MatrixSplit:
    """How a matrix is split over the ranks of `axis` from `first` on: into `lengths` along `dim` (-2 rows, -1 columns).

    `name`: the axis of the layout that splits the matrix. etp has no group of its own, so slices of an expert's hidden
    size are sent over `experts`, where the ranks with slices of one expert are neighbours.
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
    """An all-to-all that joins shards along one split: the first `counts[0]` matrices on the split's first rank, the
    next `counts[1]` on its second, and so on.
    """

    split: MatrixSplit
    counts: tuple[int, ...]

    def gather(self, shards_Noi: Tensor) -> Tensor:
        """Exchange this rank's shards of all matrices for the matrices that are joined on this rank."""
        split, mine, shape = self.split, self.counts[self.split.rank], shards_Noi.shape[1:]
        shapes = [_resized(shape, split.dim, length) for length in split.lengths]
        send = [count * math.prod(shape) for count in self.counts]
        receive = [mine * math.prod(shape) for shape in shapes]
        parts = self._exchange(shards_Noi.flatten(), send, receive).split(receive)
        return torch.cat([part.view(mine, *shape) for part, shape in zip(parts, shapes, strict=True)], split.dim)

    def scatter(self, whole_Noi: Tensor) -> Tensor:
        """Invert `gather`: exchange the matrices joined on this rank for its shards of all matrices."""
        split = self.split
        shape = _resized(whole_Noi.shape[1:], split.dim, split.lengths[split.rank])
        parts = whole_Noi.split(split.lengths, split.dim)
        receive = [count * math.prod(shape) for count in self.counts]
        flat = torch.cat([part.flatten() for part in parts])
        return self._exchange(flat, [part.numel() for part in parts], receive).view(sum(self.counts), *shape)

    def _exchange(self, flat: Tensor, send: list[int], receive: list[int]) -> Tensor:
        before = [0] * self.split.first
        after = [0] * (self.split.axis.size - self.split.first - len(send))
        return all_to_all(flat, before + send + after, before + receive + after, self.split.axis, PURPOSE)


@dataclass(frozen=True)
class MatrixRange:
    """Matrices [start, stop) of this rank's shard of the parameter `name`."""

    name: str
    start: int
    stop: int

    def of(self, part: Tensor) -> Tensor:
        """View these matrices as [N, o, i] in a tensor that is laid out as this rank's shard of the parameter."""
        return part.view(math.prod(part.shape[:-2]), *part.shape[-2:])[self.start : self.stop]


@dataclass(frozen=True)
class Round:
    """Matrices that are updated together. They have the same whole `shape` (rows, columns) and are split alike."""

    shape: tuple[int, int]
    ranges: tuple[MatrixRange, ...]
    stages: tuple[GatherStage, ...]

    def gather(self, shards_Noi: Tensor) -> Tensor:
        """Exchange this rank's shards, in the order of `ranges`, for the whole matrices [N, O, I] to update, if any."""
        for stage in self.stages:
            shards_Noi = stage.gather(shards_Noi)
        return shards_Noi

    def scatter(self, whole_NOI: Tensor) -> list[Tensor]:
        """Exchange updated whole matrices for this rank's shards, one tensor [N, o, i] for each of `ranges`."""
        for stage in reversed(self.stages):
            whole_NOI = stage.scatter(whole_NOI)
        return list(whole_NOI.split([one.stop - one.start for one in self.ranges]))


def rounds(specs: Mapping[str, ShardSpec], meshes: Meshes, at_once: int = AT_ONCE) -> list[Round]:
    """Plan the rounds for the matrices (last two dimensions) of parameters. Each is whole in one round on one rank.

    All ranks that hold shards of a parameter must pass the same `specs` of it, in the same order.
    """
    alike: dict[tuple[int, int, tuple[tuple[str, int], ...]], list[str]] = {}
    for name, spec in specs.items():
        splits_alike = tuple((split.name, split.dim) for split in matrix_splits(spec, meshes))
        rows, columns = spec.info.shape[-2:]
        alike.setdefault((rows, columns, splits_alike), []).append(name)
    found, loads = [], defaultdict[str, Counter[int]](Counter)
    for (rows, columns, _), names in alike.items():
        splits = matrix_splits(specs[names[0]], meshes)
        together = max(1, at_once // (rows * columns)) * math.prod(len(split.lengths) for split in splits)
        work = rows * columns * min(rows, columns)
        for ranges in _batches(specs, names, together):
            held, stages = sum(one.stop - one.start for one in ranges), []
            for split in splits:
                stages.append(GatherStage(split, _shares(loads[split.name], len(split.lengths), held, work)))
                held = stages[-1].counts[split.rank]
            found.append(Round((rows, columns), ranges, tuple(stages)))
    return found


def matrix_splits(spec: ShardSpec, meshes: Meshes) -> tuple[MatrixSplit, ...]:
    """Return the splits of each matrix of a parameter, the last one first."""
    found: list[MatrixSplit] = []
    dims = len(spec.info.shape)
    block = ShardBlock((0,) * dims, tuple(spec.info.shape))
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
    """Yield this rank's matrices of these parameters in order, `together` at a time."""
    counts = {name: math.prod(specs[name].local_block.shape[:-2]) for name in names}
    matrices = [(name, number) for name, count in counts.items() for number in range(count)]
    for first in range(0, len(matrices), together):
        batch: dict[str, list[int]] = {}
        for name, number in matrices[first : first + together]:
            batch.setdefault(name, []).append(number)
        yield tuple(MatrixRange(name, numbers[0], numbers[-1] + 1) for name, numbers in batch.items())


def _shares(loads: Counter[int], ranks: int, matrices: int, work: int) -> tuple[int, ...]:
    """Divide the matrices of a shape among ranks: equal numbers, and the remainder to the ranks with the least work so
    far. Returns the number for each rank. `loads` counts the work of each rank and is updated.
    """
    least = sorted(range(ranks), key=lambda rank: (loads[rank], rank))[: matrices % ranks]
    counts = tuple(matrices // ranks + (rank in least) for rank in range(ranks))
    loads.update({rank: count * work for rank, count in enumerate(counts)})
    return counts


def _resized(shape: tuple[int, ...], dim: int, length: int) -> tuple[int, int]:
    rows, columns = shape
    return (length, columns) if dim == -2 else (rows, length)
