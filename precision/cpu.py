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
    (measured: 2,000 shapes, 2 GB). A batch has few shapes; experts' rows, or a text that grows, would have thousands.
    """
    if a.device.type != "cpu" or a.dtype is not torch.float32 or torch.compiler.is_compiling():
        return False
    sizes = (a.shape[:-1].numel(), *b_KN.shape)
    return _ONEDNN is not None and torch.backends.mkl.is_available() and all(n and n % 64 == 0 for n in sizes)


def multiply(a: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b; the dimensions of `a` before its last are kept. Not differentiable.

    PyTorch gives float32 to MKL, which uses half the width of an AMD processor's vector units; oneDNN, to which it
    gives bfloat16, takes 0.4 to 0.6 of the time there. Only an operator made for Inductor leads to it.
    """
    if _ONEDNN is None or not is_faster(a, b_KN):
        return a @ b_KN
    y: Tensor = _ONEDNN(a.flatten(0, -2), b_KN.t(), None, "none", [], "")
    # as torch.matmul does it: FSDP2 warns of results that are views
    return torch.ops.aten._unsafe_view(y, [*a.shape[:-1], b_KN.shape[1]])


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
