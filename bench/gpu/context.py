"""Define the context that every section gets: device, clock, available precisions and deadline."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bench.gpu.clock import Clock
from bench.gpu.record import BenchRow
from precision.config import AttentionKind, Backend, Compute, KernelKind, ParamDtype, PrecisionConfig
from precision.resolve import FLOAT8_LIBRARIES, no_triton, no_varlen, unavailable

PLAIN = "bf16"
DENSE = "dense, equal active parameters"
TRITON = ", Triton"
"""Suffix of the names of sides with Triton kernels: the default on GPUs."""


@dataclass(frozen=True)
class Bench:
    device: torch.device
    dry: bool
    deadline: float
    """Value of `time.monotonic()` after which no job starts."""

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
        """Each recipe of each FP8 backend: its name, its settings and the reasons why it is not available, or []. The
        emulation is used in dry runs only, which use no other backend.
        """
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
        """bfloat16 and the available FP8 recipes, by name. Weights are in bfloat16."""
        plain = self._with_attention(PrecisionConfig(Compute.bfloat16, ParamDtype.bfloat16))
        found = {name: self._with_attention(config) for name, config, reasons in self._recipes if not reasons}
        return {PLAIN: plain} | found

    def _with_attention(self, config: PrecisionConfig) -> PrecisionConfig:
        """Choose segments where flash attention of varying lengths cannot run; the section `attention` says why."""
        lacks = no_varlen(config, self.device)
        return replace(config, attention=AttentionKind.segments if lacks else AttentionKind.varlen)

    @property
    def missing(self) -> dict[str, str]:
        """The FP8 recipes that are not available: the reasons by name."""
        return {name: "; ".join(reasons) for name, _, reasons in self._recipes if reasons}

    @property
    def no_triton(self) -> str | None:
        """The reason why Triton kernels are not available, or None."""
        return no_triton(self.device)

    @property
    def default_kernels(self) -> str:
        """The suffix of sides with the kernels that a run uses by default. Floors apply to these alone."""
        return "" if self.no_triton else TRITON

    def with_kernels(self, sides: dict[str, PrecisionConfig]) -> dict[str, PrecisionConfig]:
        """Return each side with PyTorch kernels and, if they are available, also with Triton kernels."""
        kinds = {"": KernelKind.torch} | ({} if self.no_triton else {TRITON: KernelKind.triton})
        return {
            name + ending: replace(config, kernels=kind)
            for name, config in sides.items()
            for ending, kind in kinds.items()
        }

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Return normal bfloat16 values on the device. With zeros, matmuls would be faster than in training."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def clear(self) -> None:
        """Free the GPU memory of the last measurement, and reset the peak."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


@dataclass(frozen=True)
class BenchJob:
    """Rows that are measured together. If `measure` raises, they end with a failed row of this name."""

    name: str
    measure: Callable[[], Iterable[BenchRow]]
