"""Find silent corruption: blocks of weights, moments and buffers that several ranks hold must be the same to the bit.

A digest of each block is compared by two reductions, of the largest and of the smallest value, so the traffic does not
grow with the number of replicas. Ranks that hold no replica of anything, as under FSDP alone, compare only buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.exit_codes import host_name
from core.files import sha256_text
from parallel.comm.world import World
from parallel.mesh import MeshAxis
from train.checkpoint.state import TensorShard

REPLICAS = "replicas"
CORRUPT_HOSTS = "corrupt.jsonl"
"""Name of the file in a run's logs that names hosts whose replicas were wrong. A requeued job excludes them."""
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x5851F42D4C957F2D
_CHUNK = 1 << 22
_LIMITS = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class Mismatch:
    """A block that replicas hold differently. `digests`: by rank. `wrong`: the ranks of a minority, if there is one."""

    tensor: str
    digests: dict[int, int]
    wrong: tuple[int, ...]

    def against(self, truth: dict[str, int]) -> tuple[int, ...]:
        """Return the ranks that do not have the digest of a repetition. If no rank has it, because gradients have since
        carried the fault to all of them, or without a repetition, return the minority.
        """
        right = {rank for rank, digest in self.digests.items() if digest == truth.get(self.tensor)}
        return tuple(rank for rank in self.digests if rank not in right) if right else self.wrong


class Replicas:
    """Compares the state of the ranks of a run. All ranks call `compare` at the same steps."""

    def __init__(self, world: World, axis: MeshAxis) -> None:
        self.world, self.axis = world, axis
        self._shared: list[int] | None = None

    def compare(self, state: Sequence[TensorShard]) -> list[Mismatch]:
        """Return the blocks of a checkpoint's `state` that differ between ranks, the same on every rank."""
        if self.world.size == 1:
            return []
        shards = {_key(shard): shard for shard in state if shard.tensor.numel()}
        if self._shared is None:
            holders = Counter(key for keys in self.world.gather(list(shards), REPLICAS) for key in keys)
            self._shared = sorted(key for key, count in holders.items() if count > 1)
        if not self._shared:
            return []
        own = {key: digest(shards[key].tensor) for key in self._shared if key in shards}
        bounds = []
        for operation, absent in ((dist.ReduceOp.MAX, _LIMITS.min), (dist.ReduceOp.MIN, _LIMITS.max)):
            missing = torch.tensor(absent, device=self.world.device)
            found = torch.stack([own.get(key, missing) for key in self._shared])
            self.axis.reduce(found, REPLICAS, operation)
            bounds.append(found)
        places = (bounds[0] != bounds[1]).nonzero().flatten().tolist()
        if not places:
            return []
        wrong = [self._shared[place] for place in places]
        names = {key: _block(shards[key]) for key in wrong if key in shards}
        held = {key: int(own[key]) for key in wrong if key in own}
        return _mismatches(wrong, self.world.gather((names, held), REPLICAS))

    def hosts(self) -> list[str]:
        """Return the host of each rank, on every rank."""
        return self.world.gather(host_name(), REPLICAS)


def digest(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor's bits, an int64 scalar on its device: the sum of its elements, as integers, times
    odd numbers that depend on their places, modulo 2^64. A change of any one element changes it.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat.view(_AS_INTEGER[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].long()
        odd = (2 * torch.arange(start, start + len(part), device=tensor.device) + 1) * _ODD
        total += (part * odd).sum()
    return total


def digests(state: Sequence[TensorShard], names: Collection[str]) -> dict[str, int]:
    """Return the digests of the blocks with these names that this rank holds."""
    held = {_block(shard): shard.tensor for shard in state if shard.tensor.numel()}
    return {name: int(digest(tensor)) for name, tensor in held.items() if name in names}


def _block(shard: TensorShard) -> str:
    return f"{shard.name}{list(shard.offset)}{list(shard.tensor.shape)}" if shard.tensor.dim() else shard.name


def _key(shard: TensorShard) -> int:
    return int(sha256_text(_block(shard))[:15], 16)


def _mismatches(wrong: Sequence[int], ranks: Sequence[tuple[dict[int, str], dict[int, int]]]) -> list[Mismatch]:
    found = []
    for key in wrong:
        held: dict[int, Any] = {rank: digests[key] for rank, (_, digests) in enumerate(ranks) if key in digests}
        usual, count = Counter(held.values()).most_common(1)[0]
        minority = tuple(rank for rank, one in held.items() if one != usual) if 2 * count > len(held) else ()
        found.append(Mismatch(next(names[key] for names, _ in ranks if key in names), held, minority))
    return found
