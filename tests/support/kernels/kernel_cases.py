"""Compare the kernels of `model.kernels` with a plain reference, on any device.

`python -m tests.support.kernels.kernel_cases` prints the errors of all cases on a CPU as JSON for tests/model/test_kernels.py.
TRITON_INTERPRET=1 interprets the Triton kernels. tests/test_gpu.py uses the cases on a GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels import StepKernels, TorchKernels, TritonKernels
from model.kernels.moe import SortedSlots
from model.moe import keep_rows, permute_by_expert
from precision.gemm import Groups
from tests.support.kernels.head_cases import FLAWS, STEPS, head_errors
from tests.support.kernels.loss_cases import LOSSES, loss_errors


@dataclass(frozen=True)
class Case:
    dtype: str
    tokens: int
    width: int
    top_k: int
    multiple: int
    experts: int = 6
    held: int | None = None
    """Number of experts whose rows are kept; None: all."""


CASES = {
    "top-1": Case("float32", 9, 24, 1, 1),
    "top-1, padded": Case("bfloat16", 9, 24, 1, 4),
    "top-2": Case("bfloat16", 7, 40, 2, 1),
    "top-2, padded": Case("float32", 7, 40, 2, 4),
    "top-3 in float64, padded": Case("float64", 5, 12, 3, 2),
    "odd width": Case("float32", 6, 37, 2, 4),
    "one column": Case("float32", 6, 1, 2, 1),
    "several tiles": Case("bfloat16", 3, 1027, 2, 2),
    "most experts empty": Case("float32", 3, 16, 1, 8, experts=12),
    "no token": Case("float32", 0, 16, 2, 4),
    "slots without rows": Case("float32", 9, 24, 3, 1, held=3),
    "slots without rows, padded": Case("bfloat16", 9, 24, 2, 4, held=3),
    "no slot with a row": Case("float64", 3, 8, 1, 1, held=0),
}

GATES = {"bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-14}
"""Tolerances, relative to the largest value. In bfloat16, Triton's interpreter truncates where GPUs round."""

BREAKS = ("places", "weights", "padding", "gate")
"""Errors that `figures` can plant."""


def figures(case: Case, kernels: StepKernels, device: str, broken: str = "") -> dict[str, float]:
    """Return the error of each result and gradient against the reference, relative to the largest value."""
    wanted = results(case, _Plain(), torch.float64, "cpu")
    found = results(case, kernels, getattr(torch, case.dtype), device, broken)
    assert found.keys() == wanted.keys()
    return {name: _distance(found[name].double().cpu(), wanted[name]) for name in wanted}


def _distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    if torch.equal(found, wanted):  # also where all are zero
        return 0.0
    return float(((found - wanted).abs().max() / wanted.abs().max()).nan_to_num(torch.inf))


def results(case: Case, kernels: Any, dtype: torch.dtype, device: str, broken: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        rounded = torch.randn(*shape, generator=generator, dtype=torch.float64).to(getattr(torch, case.dtype))
        return rounded.to(device, dtype).requires_grad_()

    # the last expert and one other get no token
    ranked = torch.rand(case.tokens, case.experts - 1, generator=generator).index_fill_(1, torch.tensor(1), -1)
    slots = permute_by_expert(ranked.topk(case.top_k).indices, case.experts, case.multiple)
    if case.held is not None:
        counts_E = slots.groups.counts_E[: case.held]
        slots = keep_rows(slots, int(counts_E.sum()), Groups(counts_E))
    x_TD, y_CD = values(case.tokens, case.width), values(len(slots.source_C), case.width)
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    weights_TK = weights.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    gate_up_BT2F, grad_BTF = values(2, 5, 2 * case.width), values(2, 5, case.width).detach()
    if slots.is_padding_C1 is not None and not isinstance(kernels, _Plain):  # padding must not be read
        y_CD = y_CD.detach().masked_fill(slots.is_padding_C1.to(device), torch.nan).requires_grad_()
    if broken == "places":
        slots = slots._replace(source_C=slots.source_C.flip(0), place_TK=slots.place_TK.flip(0))
    if broken == "weights":
        weights_TK = weights_TK.detach().flip(0).requires_grad_()
    if broken == "padding":
        slots = slots._replace(is_padding_C1=None)
    slots = SortedSlots(*(x.to(device) if isinstance(x, Tensor) else x for x in slots))  # type: ignore[arg-type]

    found = {}
    for name, given in (("", None), (" weighted", weights_TK)):
        leaves = [x_TD] if given is None else [x_TD, given]
        found |= _with_gradients(f"permute{name}", kernels.permute(x_TD, slots, given), leaves, y_CD)
        leaves = [y_CD] if given is None else [y_CD, given]
        found |= _with_gradients(f"unpermute{name}", kernels.unpermute(y_CD, slots, given), leaves, x_TD)
    both = gate_up_BT2F.detach().flip(-1).requires_grad_() if broken == "gate" else gate_up_BT2F
    found |= _with_gradients("halves", kernels.swiglu_halves(both), [both], grad_BTF)
    gate, up = both.detach().chunk(2, dim=-1)
    gate.requires_grad_(), up.requires_grad_()
    return found | _with_gradients("swiglu", kernels.swiglu(gate, up), [gate, up], grad_BTF)


def _with_gradients(name: str, result: Tensor, leaves: list[Tensor], gradient: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(result, leaves, gradient.detach())
    return {name: result.detach()} | {f"{name}, gradient {i}": x for i, x in enumerate(gradients)}


class _Plain:
    """The reference: loops over rows and tokens, with autograd's gradients."""

    def permute(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None) -> Tensor:
        top_k, found = slots.place_TK.shape[1], []
        for row, slot in enumerate(slots.source_C.tolist()):
            token, k = divmod(slot, top_k)
            real = slots.is_padding_C1 is None or not slots.is_padding_C1[row]
            found.append(x_TD[token] * (1 if weights_TK is None else weights_TK[token, k]) * real)
        return torch.stack(found) if found else x_TD.sum() * 0 + x_TD.new_empty(0, x_TD.shape[1]) + _zero(weights_TK)

    def unpermute(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None) -> Tensor:
        found = []
        for token, places_K in enumerate(slots.place_TK.tolist()):
            weights = [1] * len(places_K) if weights_TK is None else weights_TK[token]
            rows = [y_CD[row] * weight for row, weight in zip(places_K, weights, strict=True) if row >= 0]
            found.append(sum(rows, y_CD.sum() * 0 + y_CD.new_zeros(y_CD.shape[1]) + _zero(weights_TK) * 0))
        return torch.stack(found) if found else y_CD.sum() + y_CD.new_empty(0, y_CD.shape[1]) + _zero(weights_TK)

    def swiglu(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return gate_BTF * torch.sigmoid(gate_BTF) * up_BTF

    def swiglu_halves(self, both_BT2F: Tensor) -> Tensor:
        return self.swiglu(*both_BT2F.chunk(2, dim=-1))


def _zero(weights_TK: Tensor | None) -> Tensor | int:
    return 0 if weights_TK is None else weights_TK.sum()


def main() -> None:
    sides: dict[str, StepKernels] = {"torch": TorchKernels(), "triton": TritonKernels()}
    found = {name: {side: figures(case, sides[side], "cpu") for side in sides} for name, case in CASES.items()}
    case = CASES["top-2, padded"]
    broken = {what: {side: figures(case, sides[side], "cpu", what) for side in sides} for what in BREAKS}
    heads = {
        f"{name}, {dtype}": head_errors(name, TritonKernels(), getattr(torch, dtype), "cpu")
        for name in STEPS
        for dtype in GATES
    }
    flawed = {
        what: head_errors("normalised, temperature", TritonKernels(), torch.float32, "cpu", what) for what in FLAWS
    }
    losses = {f"{name}, {dtype}": loss_errors(name, dtype, "cpu") for name in LOSSES for dtype in GATES}
    losses["broken"] = loss_errors("two blocks", "float64", "cpu", shift=1)
    print(json.dumps({"cases": found, "broken": broken, "heads": heads, "flawed": flawed, "losses": losses}))


if __name__ == "__main__":
    main()
