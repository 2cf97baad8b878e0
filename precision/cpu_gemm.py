"""Compute CPU matmuls with the faster of PyTorch's two libraries, MKL and oneDNN. Store large results in huge pages.

Shapes: results are M x N, and K is contracted.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
PRODUCTS: frozenset[Any] = frozenset() if _ONEDNN is None else frozenset({_ONEDNN.default})
"""Operators outside aten that `multiply` may call, as a `TorchDispatchMode` sees them."""
_LARGE_BYTES = 32 << 20


def is_faster(a: Tensor, *sizes: int) -> bool:
    """Return whether `multiply` is faster than PyTorch for operands like `a` of these sizes. Always false while
    compiling.

    Sizes must be multiples of 64, which limits the number of shapes. oneDNN caches about 0.2 MB per shape, and this
    fragments the heap (measured: 2 GB after 2,000 shapes). Training has few shapes; token-by-token generation would
    have thousands.
    """
    if a.device.type != "cpu" or a.dtype is not torch.float32 or torch.compiler.is_compiling():
        return False
    return _ONEDNN is not None and torch.backends.mkl.is_available() and all(n and n % 64 == 0 for n in sizes)


def _has_full_width() -> bool:
    """Return whether this is an AMD processor that computes 512 bits at once (Zen 5, family 26).

    MKL uses half of that width, so oneDNN is twice as fast for every matmul. Zen 4 computes 512 bits in two halves:
    there oneDNN takes 0.85 of MKL's time, but 1.1 for weight gradients, and splitting rows costs more than it saves.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= 26


FULL_WIDTH = _has_full_width()
"""Whether oneDNN computes the matmuls of experts and weight gradients too. A constant, since Dynamo reads it."""


def multiply(a: Tensor, b_KN: Tensor) -> Tensor:
    """Return a @ b with the leading dimensions of `a`. Not differentiable."""
    if not is_faster(a, a.shape[:-1].numel(), *b_KN.shape):
        return a @ b_KN
    # `_unsafe_view` as in torch.matmul, because FSDP2 warns about outputs that are views
    return torch.ops.aten._unsafe_view(_by_onednn(a.flatten(0, -2), b_KN), [*a.shape[:-1], b_KN.shape[1]])


def multiply_rows(a_MK: Tensor, b_KN: Tensor, y_MN: Tensor) -> None:
    """Compute y = a @ b for any number of rows, most of them with oneDNN if that is faster."""
    m = _main_part(a_MK, b_KN.shape)
    if m:
        y_MN[:m].copy_(_by_onednn(a_MK[:m], b_KN))
    torch.mm(a_MK[m:], b_KN, out=y_MN[m:])


def multiply_columns(a_KM: Tensor, b_KN: Tensor, y_MN: Tensor) -> None:
    """Compute y = a^T @ b, a sum over any number of rows, most of them with oneDNN if that is faster."""
    k = _main_part(a_KM, y_MN.shape)
    if k:
        y_MN.copy_(_by_onednn(a_KM[:k].t(), b_KN[:k]))
        y_MN.addmm_(a_KM[k:].t(), b_KN[k:])
    else:
        torch.mm(a_KM.t(), b_KN, out=y_MN)


def multiply_few_rows(x: Tensor, w_NK: Tensor) -> Tensor:
    """Return x @ w^T, for a few rows of `x` in token-by-token generation. Differentiable, as `linear` is.

    MKL reads a matrix with short rows at 7 GB/s if it is not in the processor's cache, where one core can read 30. So
    the matrix is first read in order, by a sum that nobody needs: 40 us become 21 for a matrix [512, 128] and one row.
    Rows of 1,024 do not gain, and large matrices would leave the cache before they are multiplied.
    """
    if 1 << 14 <= w_NK.numel() <= 1 << 17 and w_NK.dtype is torch.float32 and w_NK.is_cpu and w_NK.shape[1] <= 512:
        w_NK.sum()
    return torch.nn.functional.linear(x, w_NK)


def _main_part(a: Tensor, widths: torch.Size) -> int:
    """Return how many rows of `a` oneDNN gets: one of eight counts per power of two, to limit its cache of shapes."""
    rows, by_onednn = len(a), FULL_WIDTH and is_faster(a, *widths)
    return rows - rows % max(16, 1 << max(rows.bit_length() - 4, 0)) if by_onednn else 0


def _by_onednn(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Multiply with oneDNN, through an operator made for Inductor: PyTorch's own matmuls use MKL for float32. On AMD
    processors MKL uses 256 bits, and oneDNN takes 0.4 to 0.6 of MKL's time on Zen 5, 0.85 on Zen 4.
    """
    assert _ONEDNN is not None
    return _ONEDNN(a_MK, b_KN.t(), None, "none", [], "")


def is_large(like: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether glibc would map a block of this size from the system at each allocation, as it does from 32 MiB
    on. The page faults (1.3 us for each page of 4 KiB, measured) then take longer than the matmul.
    """
    large = math.prod(shape) * like.element_size() >= _LARGE_BYTES
    return large and like.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised tensor in the dtype of `like`. Large tensors use 2 MiB pages: five times as fast."""
    if not is_large(like, shape):
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel may lack huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=like.dtype).view(shape)
