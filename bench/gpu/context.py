"""Context of every section: device, clock, available precisions, deadline."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bench.gpu.clock import Clock
from bench.gpu.record import BenchRow
from precision.config import Backend, Compute, KernelKind, ParamDtype, PrecisionConfig
from precision.resolve import FLOAT8_LIBRARIES, no_triton, unavailable

PLAIN = "bf16"
DENSE = "dense, equal active parameters"
TRITON = ", Triton"
"""Suffix of sides that permute tokens and compute SwiGLU with Triton kernels."""


@dataclass(frozen=True)
class Bench:
    device: torch.device
    dry: bool
    deadline: float
    """Time of `time.monotonic` after which no job starts."""

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device, self.dry)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def memory_bytes(self) -> int:
        if self.device.type != "cuda":
            return 4 << 30
        return torch.cuda.get_device_properties(self.device).total_memory

    @cached_property
    def _recipes(self) -> list[tuple[str, PrecisionConfig, list[str]]]:
        """Every recipe of every FP8 backend, and why it is not available. Emulation is for dry runs only."""
        found = []
        for backend, maker in FLOAT8_LIBRARIES.items():
            if (backend is Backend.emulated) != self.dry:
                continue
            for recipe in maker.RECIPES[: 1 if self.dry else None]:
                config = PrecisionConfig(Compute.bfloat16, ParamDtype.bfloat16, backend=backend, recipe=recipe)
                found.append((f"{backend.value} {recipe.value}", config, unavailable(backend, recipe, self.device)))
        return found

    @cached_property
    def precisions(self) -> dict[str, PrecisionConfig]:
        """bfloat16 and every available FP8 recipe, by name; weights are in bfloat16."""
        plain = PrecisionConfig(Compute.bfloat16, ParamDtype.bfloat16)
        return {PLAIN: plain} | {name: config for name, config, reasons in self._recipes if not reasons}

    @property
    def missing(self) -> dict[str, str]:
        """The other FP8 recipes, with the reason."""
        return {name: "; ".join(reasons) for name, _, reasons in self._recipes if reasons}

    @property
    def no_triton(self) -> str | None:
        """Why Triton kernels are not available; None if they are."""
        return no_triton(self.device)

    def with_kernels(self, sides: dict[str, PrecisionConfig]) -> dict[str, PrecisionConfig]:
        """Each side with PyTorch kernels, then, if available, with Triton kernels."""
        kinds = {"": KernelKind.torch} | ({} if self.no_triton else {TRITON: KernelKind.triton})
        return {
            name + ending: replace(config, kernels=kind)
            for name, config in sides.items()
            for ending, kind in kinds.items()
        }

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Normal bfloat16 values on the device. Zeros would run faster than what training multiplies."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def clear(self) -> None:
        """Free what the last measurement allocated on a GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


@dataclass(frozen=True)
class BenchJob:
    """Rows that are measured together. An exception becomes one failed row of this name."""

    name: str
    measure: Callable[[], Iterable[BenchRow]]
