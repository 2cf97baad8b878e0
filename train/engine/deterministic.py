"""Make a GPU's results the same to the bit whenever a process repeats them: `training.deterministic`."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from core.errors import ConfigError

_NEEDED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Environment variables, and their values under which results are repeated; the first is the default. cuBLAS sums in
any order across streams without a workspace of fixed size (its documentation, "Results reproducibility"). Switches that
reduce (NVLS) add in any order. The last one is Transformer Engine's.
"""


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose deterministic algorithms for this process until it ends. Call it before anything uses a GPU, since cuBLAS
    and NCCL read their variables once. It affects PyTorch's operators, flash attention's backward pass among them.

    Raises `ConfigError` if a variable has another value, or if it is too late to set one.
    """
    missing = []
    for name, values in _NEEDED.items():
        found = environment.get(name)
        if found is None:
            missing.append(name)
        elif found not in values:
            reason = f"{name}={found} lets results differ: unset it, or set it to {' or '.join(values)}"
            raise ConfigError("training.deterministic", True, reason, [False])
    if missing and torch.cuda.is_initialized():
        reason = f"this process uses a GPU already: set {', '.join(f'{n}={_NEEDED[n][0]}' for n in missing)} before"
        raise ConfigError("training.deterministic", True, reason, [False])
    for name in missing:
        environment[name] = _NEEDED[name][0]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False
