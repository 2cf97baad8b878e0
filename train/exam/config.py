"""Configuration of suites of examinations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExamConfig:
    """One examination of a suite."""

    exam: str
    """A kind of `train.exam.registry.EXAMS`, or an import path, my.module:Mine."""
    options: dict[str, Any] = field(default_factory=dict)
    """The fields of its class, such as number or seed."""


@dataclass(frozen=True)
class SuiteConfig:
    """A group of examinations, asked of the same model."""

    name: str = "own"
    """The name under which results are stored."""
    exams: dict[str, ExamConfig] = field(default_factory=dict)
    """Label -> examination."""
