"""Compare a distributed run with the same run in one process by the largest difference in each quantity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.sharding import ShardBlock
from precision.config import Compute
from train.certify.worker import Blocks, CertifyCase, RankResults

EXACT, LOSS_FP32, GRADIENT_FP32 = 1e-9, 5e-6, 1e-5
"""Tolerances: nats for the training loss that `compare` checks in float32, relative for everything else."""
_LABELS = {"counts": "tokens per expert", "aux": "aux loss", "z": "z loss", "entropy": "router entropy"}


@dataclass(frozen=True)
class Comparison:
    """The largest difference in one quantity, and the parameter in which it occurs. `gate`: the tolerance. `first`: in
    the model's order, the first parameter whose difference exceeds the tolerance.
    """

    name: str
    largest: float
    gate: float
    parameter: str | None = None
    first: str | None = None

    @property
    def passed(self) -> bool:
        return self.largest <= self.gate and self.first is None


def compare(name: str, wanted: RankResults, found: Sequence[RankResults], case: CertifyCase) -> Iterator[Comparison]:
    """Compare every result of all ranks (`found`) with that of the single-process run (`wanted`)."""
    narrow = case.precision.compute is not Compute.float64
    loss, gate = gates(case)
    yield Comparison(f"{name}: loss", largest_difference("loss", wanted, found, relative=not narrow), loss)
    yield Comparison(f"{name}: gradient norm", largest_difference("norm", wanted, found), gate)
    yield compare_blocks(f"{name}: gradients", wanted.gradients, [f.gradients for f in found], gate)
    yield compare_blocks(f"{name}: updated weights", wanted.weights, [f.weights for f in found], gate)
    yield Comparison(f"{name}: held-out loss", max(_relative(f.held_out, wanted.held_out) for f in found), loss)
    if narrow:  # rounding may change which of two experts with nearly equal scores is chosen
        return
    for key, steps in wanted.balance.items():
        pairs = [pair for f in found for pair in zip(f.balance[key], steps, strict=True)]
        yield Comparison(f"{name}: {_LABELS.get(key, key)}", max(_relative(a, b) for a, b in pairs), EXACT)
    largest = max((_relative(f.routers[k], wanted.routers[k]) for f in found for k in f.routers), default=0.0)
    if {key for f in found for key in f.routers} != set(wanted.routers):
        largest = math.inf
    yield Comparison(f"{name}: routers' state", largest, EXACT)


def gates(case: CertifyCase) -> tuple[float, float]:
    """Return the tolerance for losses and that for all other quantities."""
    return (EXACT, EXACT) if case.precision.compute is Compute.float64 else (LOSS_FP32, GRADIENT_FP32)


def compare_resumed(
    name: str, wanted: RankResults, found: Sequence[RankResults], case: CertifyCase
) -> Iterator[Comparison]:
    """Compare the end of a resumed run with the end of the uninterrupted one."""
    loss, gate = gates(case)
    yield Comparison(f"{name}: loss", max(_relative(f.loss[-1], wanted.loss[-1]) for f in found), loss)
    yield compare_blocks(f"{name}: weights", wanted.weights, [f.weights for f in found], gate)


def largest_difference(key: str, wanted: RankResults, found: Sequence[RankResults], relative: bool = True) -> float:
    """Return the largest difference in `key` (`loss` or `norm`) over all ranks and steps."""
    pairs = [pair for f in found for pair in zip(getattr(f, key), getattr(wanted, key), strict=True)]
    return max(_relative(a, b) if relative else _nan_to_inf(abs(a - b)) for a, b in pairs)


def _relative(found: Tensor | float, wanted: Tensor | float) -> float:
    """Return the Euclidean distance over the norm of `wanted`: 0 for equal values, infinite if only the norm is 0."""
    a, b = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
    return _ratio(float((a - b).norm()), float(b.norm()))


def _ratio(distance: float, norm: float) -> float:
    if distance == 0:
        return 0.0
    return _nan_to_inf(distance / norm) if norm else math.inf


def _nan_to_inf(value: float) -> float:
    """Replace NaN with infinity, because `max` may ignore NaN."""
    return math.inf if math.isnan(value) else value


def compare_blocks(name: str, wanted: Blocks, found: Sequence[Blocks], gate: float) -> Comparison:
    """Compare the blocks of all ranks (`found`) with the whole parameters (`wanted`)."""
    return worst_parameter(name, relative_errors(wanted, found), gate)


def worst_parameter(name: str, errors: Mapping[str, float], gate: float) -> Comparison:
    """Return the comparison of the parameter with the largest error. `errors`: by parameter, in the model's order."""
    beyond = [parameter for parameter, error in errors.items() if error > gate]
    largest = max(errors, key=lambda parameter: errors[parameter])
    return Comparison(name, errors[largest], gate, largest, beyond[0] if beyond else None)


def relative_errors(wanted: Blocks, found: Sequence[Blocks]) -> dict[str, float]:
    """Return, by parameter, the relative error of all ranks' blocks. It is infinite if a block is missing."""
    errors: dict[str, float] = {}
    for parameter, ((_, whole),) in wanted.items():
        squares, copies = torch.zeros(whole.shape, dtype=torch.float64), torch.zeros(whole.shape, dtype=torch.int64)
        for rank in found:
            for block, part in rank.get(parameter, []):  # ranks of other pipeline stages have none
                squares[_place(block)] += (part.double() - whole[_place(block)].double()).square()
                copies[_place(block)] += 1
        distance = float((squares / copies).sum()) ** 0.5
        errors[parameter] = _ratio(distance, float(whole.double().norm())) if copies.all() else math.inf
    return errors


def join_blocks(ranks: Iterable[Blocks]) -> Blocks:
    """Assemble whole parameters from the blocks of all ranks, with NaN where a block is missing."""
    by_parameter: dict[str, list[tuple[ShardBlock, Tensor]]] = {}
    for rank in ranks:
        for parameter, some in rank.items():
            by_parameter.setdefault(parameter, []).extend(some)
    joined = {}
    for parameter, some in by_parameter.items():
        ends = zip(*([part.stop for part in _place(block)] for block, _ in some), strict=True)
        shape = tuple(map(max, ends))
        whole = torch.full(shape, torch.nan, dtype=torch.float64)
        for block, part in some:
            whole[_place(block)] = part.double()
        joined[parameter] = [(ShardBlock((0,) * len(shape), shape), whole)]
    return joined


def _place(block: ShardBlock) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(block.offset, block.shape, strict=True))
