"""What a run under a layout computed against what one process did: the largest difference of everything there is."""

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
"""Gates: the largest difference, relative for all but the float32 loss (nats)."""
_BALANCE = {"counts": "tokens per expert", "aux": "aux loss", "z": "z loss", "entropy": "router entropy"}


@dataclass(frozen=True)
class Comparison:
    """One figure of a layout against one process: the largest difference and where it is. `first`: the first
    parameter, in the model's order, beyond the gate.
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
    """Every figure of a run against one process's; each rank's is compared, the largest difference counts."""
    narrow = case.precision.compute is not Compute.float64
    loss, gate = gates(case)
    yield Comparison(f"{name}: loss", largest_difference("loss", wanted, found, relative=not narrow), loss)
    yield Comparison(f"{name}: gradient norm", largest_difference("norm", wanted, found), gate)
    yield compare_blocks(f"{name}: gradients", wanted.gradients, [f.gradients for f in found], gate)
    yield compare_blocks(f"{name}: updated weights", wanted.weights, [f.weights for f in found], gate)
    yield Comparison(f"{name}: held-out loss", max(_relative(f.held_out, wanted.held_out) for f in found), loss)
    if narrow:  # a tie between two experts may fall the other way
        return
    for key in _BALANCE:
        pairs = [zip(getattr(f, key), getattr(wanted, key), strict=True) for f in found]
        largest = max((_relative(a, b) for pair in pairs for a, b in pair), default=0.0)
        yield Comparison(f"{name}: {_BALANCE[key]}", largest, EXACT)
    largest = max((_relative(f.routers[k], wanted.routers[k]) for f in found for k in f.routers), default=0.0)
    if {key for f in found for key in f.routers} != set(wanted.routers):
        largest = math.inf
    yield Comparison(f"{name}: routers' state", largest, EXACT)


def gates(case: CertifyCase) -> tuple[float, float]:
    """For losses, and for all else."""
    return (EXACT, EXACT) if case.precision.compute is Compute.float64 else (LOSS_FP32, GRADIENT_FP32)


def compare_resumed(
    name: str, wanted: RankResults, found: Sequence[RankResults], case: CertifyCase
) -> Iterator[Comparison]:
    """What a resumed run ends with against the run that was not interrupted."""
    loss, gate = gates(case)
    yield Comparison(f"{name}: loss", max(_relative(f.loss[-1], wanted.loss[-1]) for f in found), loss)
    yield compare_blocks(f"{name}: weights", wanted.weights, [f.weights for f in found], gate)


def largest_difference(key: str, wanted: RankResults, found: Sequence[RankResults], relative: bool = True) -> float:
    pairs = [pair for f in found for pair in zip(getattr(f, key), getattr(wanted, key), strict=True)]
    return max(_relative(a, b) if relative else _number(abs(a - b)) for a, b in pairs)


def _relative(found: Tensor | float, wanted: Tensor | float) -> float:
    """Euclidean distance over the length of what is wanted; 0 where both are 0."""
    a, b = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
    return _ratio(float((a - b).norm()), float(b.norm()))


def _ratio(distance: float, length: float) -> float:
    if distance == 0:
        return 0.0
    return _number(distance / length) if length else math.inf


def _number(value: float) -> float:
    """No gate is passed by what is no number, and `max` must see it."""
    return math.inf if math.isnan(value) else value


def compare_blocks(name: str, wanted: Blocks, found: Sequence[Blocks], gate: float) -> Comparison:
    """All ranks' blocks of each parameter against the whole one."""
    return worst_parameter(name, relative_errors(wanted, found), gate)


def join_blocks(ranks: Iterable[Blocks]) -> Blocks:
    """Whole tensors out of the blocks of all ranks; what is missing is no number."""
    found: dict[str, list[tuple[ShardBlock, Tensor]]] = {}
    for rank in ranks:
        for parameter, some in rank.items():
            found.setdefault(parameter, []).extend(some)
    return {parameter: [_whole(some)] for parameter, some in found.items()}


def _whole(some: Sequence[tuple[ShardBlock, Tensor]]) -> tuple[ShardBlock, Tensor]:
    ends = zip(*([o + s for o, s in zip(b.offset, b.shape, strict=True)] for b, _ in some), strict=True)
    shape = tuple(max(sizes) for sizes in ends)
    tensor = torch.full(shape, torch.nan, dtype=torch.float64)
    for block, part in some:
        tensor[tuple(slice(o, o + s) for o, s in zip(block.offset, block.shape, strict=True))] = part.double()
    return ShardBlock((0,) * len(shape), shape), tensor


def worst_parameter(name: str, differences: Mapping[str, float], gate: float) -> Comparison:
    """Of differences by parameter, in the model's order."""
    beyond = [parameter for parameter, difference in differences.items() if difference > gate]
    largest = max(differences, key=lambda parameter: differences[parameter])
    return Comparison(name, differences[largest], gate, largest, beyond[0] if beyond else None)


def relative_errors(wanted: Blocks, found: Sequence[Blocks]) -> dict[str, float]:
    """By parameter, how far the blocks of all ranks are from the whole one, relative; infinite where one is missing."""
    differences: dict[str, float] = {}
    for parameter, ((_, whole),) in wanted.items():
        squares, copies = torch.zeros(whole.shape, dtype=torch.float64), torch.zeros(whole.shape, dtype=torch.int64)
        for rank in found:
            for block, part in rank.get(parameter, []):  # none: another stage of the pipeline has it
                place = tuple(slice(o, o + s) for o, s in zip(block.offset, block.shape, strict=True))
                squares[place] += (part.double() - whole[place].double()).square()
                copies[place] += 1
        distance = float((squares / copies).sum()) ** 0.5
        differences[parameter] = _ratio(distance, float(whole.double().norm())) if copies.all() else math.inf
    return differences
