"""Products on a CPU: by the faster of the libraries that PyTorch carries, into memory that is quick to get.

Shapes: M, N, K sides of matrices.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import torch
from torch import Tensor

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
PRODUCTS: frozenset[Any] = frozenset() if _ONEDNN is None else frozenset({_ONEDNN.default})
"""The operators beside PyTorch's own that `multiply` may call, as dispatch modes see them."""
_LARGE_BYTES = 32 << 20


def is_faster(a: Tensor, b_KN: Tensor) -> bool:
    """Whether `multiply` has a better way than PyTorch for such operands. A compiler is left to find its own.

    Sizes must be multiples of 64: oneDNN keeps some 0.2 MB for each shape that it has met, and the heap frays around it
    (measured: 2,000 shapes, 2 GB). A batch has few shapes; a text that grows would have thousands.
    """
    return _is_faster(a, a.shape[:-1].numel(), *b_KN.shape)


def is_faster_by_group(a: Tensor, rows: int, *widths: int) -> bool:
    """Whether `multiply_rows` and `multiply_columns` are better than PyTorch's grouped product, whose loop is in C++,
    where groups have so many rows on average.
    """
    return rows >= 64 and _is_faster(a, *widths)


def _is_faster(a: Tensor, *sizes: int) -> bool:
    if a.device.type != "cpu" or a.dtype is not torch.float32 or torch.compiler.is_compiling():
        return False
    return _ONEDNN is not None and torch.backends.mkl.is_available() and all(n and n % 64 == 0 for n in sizes)


def multiply(a: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b; the dimensions of `a` before its last are kept. Not differentiable."""
    if not is_faster(a, b_KN):
        return a @ b_KN
    # as torch.matmul does it: FSDP2 warns of results that are views
    return torch.ops.aten._unsafe_view(_by_onednn(a.flatten(0, -2), b_KN), [*a.shape[:-1], b_KN.shape[1]])


def multiply_rows(a_MK: Tensor, b_KN: Tensor, y_MN: Tensor) -> None:
    """y = a @ b for any number of rows; nearly all of them by oneDNN, where it is faster."""
    m = _main_part(a_MK, b_KN.shape)
    if m:
        y_MN[:m].copy_(_by_onednn(a_MK[:m], b_KN))
    torch.mm(a_MK[m:], b_KN, out=y_MN[m:])


def multiply_columns(a_KM: Tensor, b_KN: Tensor, y_MN: Tensor) -> None:
    """y = a^T @ b, a sum over any number of rows; nearly all of them by oneDNN, where it is faster."""
    k = _main_part(a_KM, y_MN.shape)
    if k:
        y_MN.copy_(_by_onednn(a_KM[:k].t(), b_KN[:k]))
        y_MN.addmm_(a_KM[k:].t(), b_KN[k:])
    else:
        torch.mm(a_KM.t(), b_KN, out=y_MN)


def _main_part(a: Tensor, widths: torch.Size) -> int:
    """How many of the rows of `a` oneDNN is given: few different numbers, eight per doubling (see `is_faster`)."""
    rows = len(a)
    return rows - rows % max(16, 1 << max(rows.bit_length() - 4, 0)) if _is_faster(a, *widths) else 0


def _by_onednn(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """PyTorch gives float32 to MKL, which uses half the width of an AMD processor's vector units; oneDNN, to which it
    gives bfloat16, takes 0.4 to 0.6 of the time there. Only an operator made for Inductor leads to it.
    """
    assert _ONEDNN is not None
    y: Tensor = _ONEDNN(a_MK, b_KN.t(), None, "none", [], "")
    return y


def is_large(like: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether glibc would map such a block anew each time it is asked for, as it does from 32 MiB on. Linux then takes
    longer to hand out its pages of 4 KiB than a product takes to fill them (measured: 1.3 us for each).
    """
    large = math.prod(shape) * like.element_size() >= _LARGE_BYTES
    return large and like.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undefined values in the format of `like`; large blocks lie on pages of 2 MiB: five times as fast."""
    if not is_large(like, shape):
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=like.dtype).view(shape)
