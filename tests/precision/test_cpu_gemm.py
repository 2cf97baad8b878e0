"""Matmuls on a CPU: values, gradients, experts without rows, and huge pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from precision import cpu_gemm, native_gemm
from precision.gemm import Groups
from precision.native_gemm import NativeGemm
from tests.support.operations import Observed

BEYOND = 2
"""Number of rows that belong to no expert."""
SMALL, LARGE = ([5, 0, 1, 6], 8, 16), ([300, 0, 15, 131], 64, 128)
"""Rows per expert, input size and output size. In float32, oneDNN computes the matmuls of `LARGE`."""
GATES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-13}

needs_onednn = pytest.mark.skipif(not cpu_gemm.is_faster(torch.zeros(1), 64), reason="needs MKL and oneDNN (x86)")


@pytest.fixture(autouse=True, params=[True, False], ids=["zen5", "zen4"])
def full_width(request, monkeypatch) -> bool:
    """Whether the processor is one for which oneDNN computes experts and weight gradients too."""
    monkeypatch.setattr(cpu_gemm, "FULL_WIDTH", request.param)
    return request.param


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def figures(product: Any, x: Tensor, w: Tensor, grad: Tensor, groups: Groups | None = None) -> list[Tensor]:
    """Return the output and both gradients, without the rows that belong to no expert."""
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = product(*leaves) if groups is None else product(*leaves, groups)[: sum(groups.host)]
    grad_x, grad_w = torch.autograd.grad(y, leaves, grad[: len(y)])
    return [y.detach(), grad_x[: len(y)], grad_w]


def plain_grouped(x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
    """Multiply expert by expert, with differentiable operations."""
    parts = zip(x_CD[: sum(groups.host)].split(groups.host), w_EFD, strict=True)
    return torch.cat([rows @ w.t() for rows, w in parts])


def largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest wanted value."""
    pairs = list(zip(found, wanted, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("huge_pages", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("counts, d, f", [SMALL, pytest.param(*LARGE, marks=needs_onednn)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_grouped_products_equal_the_plain_statement(dtype, counts, d, f, huge_pages, full_width, monkeypatch):
    if huge_pages:
        monkeypatch.setattr(cpu_gemm, "_LARGE_BYTES", 1)
    groups, used = Groups(torch.tensor(counts)), sum(counts)
    x, w, grad = operands(dtype, (used + BEYOND, d), (len(counts), f, d), (used + BEYOND, f))
    wanted = figures(plain_grouped, x.double(), w.double(), grad.double(), groups)
    products = NativeGemm(dtype)
    seen: set[Any] = set()
    with Observed(lambda function, *_: seen.add(function)):
        found = figures(products.linear, x, w, grad, groups)
    assert bool(cpu_gemm.PRODUCTS & seen) == (dtype is torch.float32 and d == 64 and full_width)
    assert largest(found, wanted) < GATES[dtype] and all(y.dtype is dtype for y in found)
    found[1] = products.input_gradient(grad, w, groups)[:used]
    found[2] = products.weight_gradient(grad, x, groups)
    assert largest(found, wanted) < GATES[dtype], "gradients computed separately"
    others = Groups(torch.tensor(counts[::-1]))
    assert largest(figures(products.linear, x, w, grad, others), wanted) > 0.1, "control"


def test_the_comparison_notices_a_wrong_gradient(monkeypatch):
    honest = native_gemm._by_columns
    monkeypatch.setattr(native_gemm, "_by_columns", lambda a, b, groups: honest(a, b, groups).flip(0))
    with pytest.raises(AssertionError):
        test_grouped_products_equal_the_plain_statement(torch.float64, *SMALL, False, True, monkeypatch)


@pytest.mark.parametrize("leading", [(12,), (3, 4), (64,), (2, 32), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_linear_equals_the_plain_statement(dtype, leading):
    x, w, grad = operands(dtype, (*leading, 64), (128, 64), (*leading, 128))
    wanted = figures(torch.nn.functional.linear, x.double(), w.double(), grad.double())
    products = NativeGemm(dtype)
    found = figures(products.linear, x, w, grad)
    alone = [found[0], products.input_gradient(grad, w), products.weight_gradient(grad, x)]
    if 0 in leading:
        assert all(torch.equal(a.double(), b) for a, b in zip([*found, *alone], [*wanted, *wanted], strict=True))
    else:
        assert largest(found, wanted) < GATES[dtype] and largest(alone, wanted) < GATES[dtype]


def test_linear_accepts_views_and_frozen_operands():
    """The gradient of `sum`, an expanded tensor, is accepted too."""
    x, w = operands(torch.float32, (64, 128), (64, 128))
    leaves = [half.detach().requires_grad_() for half in (x[:, ::2], w[:, 64:])]
    product = NativeGemm(torch.float32).linear
    found, wanted = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (product, torch.nn.functional.linear))
    assert largest(found, wanted) < 1e-5
    for frozen in (0, 1):
        sides = [leaf.detach() if i == frozen else leaf for i, leaf in enumerate(leaves)]
        (alone,) = torch.autograd.grad(product(*sides).sum(), leaves[1 - frozen])
        assert torch.equal(alone, found[1 - frozen])


REGULAR, IRREGULAR = (64, 64, 128), [(63, 64, 128), (64, 72, 128), (64, 64, 129), (0, 64, 64)]


@needs_onednn
@pytest.mark.parametrize("dtype, sizes", [*((d, REGULAR) for d in GATES), *((torch.float32, s) for s in IRREGULAR)])
def test_only_regular_float32_products_use_onednn(dtype, sizes, full_width):
    rows, width, out = sizes
    x, w, grad = operands(dtype, (rows, width), (out, width), (rows, out))
    seen: set[Any] = set()
    with Observed(lambda function, *_: seen.add(function)):
        figures(NativeGemm(dtype).linear, x, w, grad)
    by_onednn = dtype is torch.float32 and sizes == REGULAR
    assert bool(cpu_gemm.PRODUCTS & seen) == by_onednn
    assert (torch.ops.aten.mm.default in seen) != (by_onednn and full_width)
    if by_onednn:
        for tokens in (x.requires_grad_(), x.view(2, 32, width)):
            assert not NativeGemm(dtype).linear(tokens, w)._is_view()


@needs_onednn
def test_expert_rows_make_few_shapes(full_width):
    like = torch.zeros(1, 64).expand(1 << 16, 64)
    parts = {rows: cpu_gemm._main_part(like[:rows], torch.Size((64, 64))) for rows in range(1 << 16)}
    if not full_width:
        assert set(parts.values()) == {0}
        return
    assert len(set(parts.values())) < 128
    assert all(rows - max(16, rows / 8) < part <= rows for rows, part in parts.items())


@needs_onednn
def test_compiled_products_do_not_use_onednn():
    traced: list[bool] = []

    def look(graph: Any, inputs: Any) -> Any:
        traced.append(any(node.target in cpu_gemm.PRODUCTS for node in graph.graph.nodes))
        return graph.forward

    x, w = operands(torch.float32, (64, 64), (128, 64))
    compiled = torch.compile(NativeGemm(torch.float32).linear, backend=look, fullgraph=True)
    assert largest([compiled(x, w)], [x @ w.t()]) < 1e-5 and traced == [False]


def test_huge_pages_behave_like_other_memory(monkeypatch):
    monkeypatch.setattr(cpu_gemm, "_LARGE_BYTES", 1 << 20)
    like = torch.zeros(1, dtype=torch.bfloat16)
    small, large = cpu_gemm.empty(like, (3, 5)), cpu_gemm.empty(like, (3, 1 << 20))
    assert small.shape == (3, 5) and large.shape == (3, 1 << 20) and large.is_contiguous()
    assert small.dtype is large.dtype is torch.bfloat16 and not large.data_ptr() % 64
    row = large.fill_(1)[1]
    del large
    assert row.sum(dtype=torch.float64) == 1 << 20


@torch.no_grad()
def test_small_matrices_are_read_before_few_rows_are_multiplied():
    """Not large ones, for many rows, or in other formats."""

    def sums(rows: int, dtype: torch.dtype, *shape: int, groups: Groups | None = None) -> int:
        x, w = operands(dtype, (rows, shape[-1]), shape)
        with Observed(lambda function, *_: seen.append(function)):
            found = NativeGemm(dtype).linear(x, w, groups)
        expected = x @ w.t() if groups is None else x @ w[1].t()
        torch.testing.assert_close(found, expected, rtol=GATES[dtype], atol=GATES[dtype] * 100)
        count = seen.count(torch.ops.aten.sum.default)
        seen.clear()
        return count

    seen: list[Any] = []
    assert sums(1, torch.float32, 512, 128) == sums(8, torch.float32, 128, 512) == 1
    assert sums(2, torch.float32, 3, 256, 128, groups=Groups(torch.tensor([0, 2, 0]), [0, 2, 0])) == 1
    others = (17, torch.float32, 512, 128), (1, torch.float64, 512, 128), (1, torch.float32, 1024, 1024)
    assert [sums(*one) for one in others] == [0, 0, 0]
