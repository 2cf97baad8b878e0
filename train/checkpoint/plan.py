"""Verify that the shards that all ranks write make up every tensor exactly once, without gathering them.

A rank knows the shards that it writes. Signed corners of boxes (see `index.py`) are replaced by hashes of (tensor,
corner), which are summed modulo 2^64. The shards tile all tensors if the sums of all ranks add up to zero and each
tensor has one shard at its origin, up to a hash collision. So a rank reports one number and the hashes of the tensors
whose origin it writes, and only when its plan is new.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.checkpoint.state import TensorShard

Words = NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Plan:
    """The shards that a rank writes: name, dtype, whole shape, offset and shape of each."""

    shards: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]

    @cached_property
    def report(self) -> PlanReport:
        return _report(self)


@dataclass(frozen=True)
class PlanReport:
    """What verifies a plan. `corners`: the sum of hashes of signed corners. `origins`: the hashes of the tensors whose
    first element this rank writes, as bytes of uint64.
    """

    corners: int
    origins: bytes


def plan_of(shards: Iterable[TensorShard], before: Plan | None = None) -> Plan:
    """Return the plan of the shards that a rank writes; the plan `before` if it is the same."""
    made = Plan(tuple((s.name, str(s.tensor.dtype), s.shape, s.offset, tuple(s.tensor.shape)) for s in shards))
    return before if before == made else made


def verify(reports: Iterable[PlanReport]) -> bool:
    """Return whether the plans of all ranks make up every tensor exactly once."""
    total, origins = 0, []
    for report in reports:
        total += report.corners
        origins.append(np.frombuffer(report.origins, np.uint64))
    joined = np.concatenate(origins) if origins else np.empty(0, np.uint64)
    return total % 2**64 == 0 and len(np.unique(joined)) == len(joined)


def faulty(plans: Sequence[Plan]) -> list[str]:
    """Return the names of the tensors that the plans of all ranks do not make up exactly once, sorted."""
    sums, origins = Counter[str](), Counter[str]()
    for plan in plans:
        for one in plan.shards:
            alone = _report(Plan((one,)))
            sums[one[0]] += alone.corners
            origins[one[0]] += bool(alone.origins)
    return sorted(name for name, total in sums.items() if total % 2**64 or origins[name] != 1)


def _report(plan: Plan) -> PlanReport:
    total, origins = 0, b""
    for dims in {len(shape) for _, _, shape, _, _ in plan.shards}:
        shards = [one for one in plan.shards if len(one[2]) == dims]
        ids = np.array([xxhash.xxh3_64_intdigest(repr(one[:3]).encode()) for one in shards], np.uint64)
        columns = [[one[place] for one in shards] for place in (2, 3, 4)]
        shape, offset, size = (np.array(column, np.uint64).reshape(len(shards), dims) for column in columns)
        first = ~offset.any(1)
        total += _corners(ids, offset, size) - _corners(ids[first], offset[first], shape[first])
        origins += ids[first].tobytes()
    return PlanReport(total % 2**64, origins)


def _corners(ids: Words, offset: Words, size: Words) -> int:
    """Return the sum of the hashes of the boxes' corners, each with its sign."""
    total = 0
    for far in itertools.product((0, 1), repeat=offset.shape[1]):
        corner, hashed = offset + size * np.array(far, np.uint64), ids
        for place in range(offset.shape[1]):
            hashed = _mixed(hashed ^ (corner[:, place] + np.uint64(place + 1)) * _ODD)
        total += (-1) ** sum(far) * int(hashed.sum(dtype=np.uint64))
    return total


def _mixed(words: Words) -> Words:
    """Return a bijective mix of the bits of each word: the finaliser of SplitMix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
