"""Set environment variables that libraries read when they are loaded. Must run before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class LibrarySetting:
    """A variable and the value that it gets unless the environment sets it, or another that decides the same."""

    variable: str
    value: str
    reason: str
    others: tuple[str, ...] = ()


SETTINGS = (
    # Measured with a run of `experiment=smoke` on two cores: alone, 7,900 tokens per second with either setting; next
    # to a second run, 1,900 by default and 3,100 with this setting.
    LibrarySetting(
        "GOMP_SPINCOUNT",
        "1000",
        "a waiting OpenMP thread sleeps early, instead of keeping a core from others for milliseconds",
        ("OMP_WAIT_POLICY",),
    ),
    LibrarySetting(
        "PYTORCH_ALLOC_CONF",
        "expandable_segments:True",
        "experts' tensors change their sizes; fixed segments fragment, and a rank that frees some waits for its GPU",
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    ),
    # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    LibrarySetting(
        "NCCL_LAUNCH_ORDER_IMPLICIT",
        "1",
        "from NCCL 2.26 on, kernels of several communicators start in the order of their calls, else they may deadlock",
    ),
)


def set_for_libraries() -> None:
    """Set the variables of `SETTINGS` that the environment leaves open."""
    for one in SETTINGS:
        if not any(name in os.environ for name in (one.variable, *one.others)):
            os.environ[one.variable] = one.value


def shown(setting: LibrarySetting) -> str:
    """Return the variable that decides in this process, with its value."""
    for name in (setting.variable, *setting.others):
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    return f"{setting.variable} is not set"
