"""Configuration of suites of examinations, and the options that several examinations have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, check_numbers

MOST_SHOTS = 8


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


@dataclass(frozen=True)
class Generated:
    """Options of the generated examinations."""

    number: int = 30
    """Questions."""
    seed: int = 0
    """Another seed gives other questions."""
    shots: int = 3
    """Solved examples before each question."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("number",), not_negative=("shots",))
        if self.shots > MOST_SHOTS:
            raise ConfigError("shots", self.shots, f"must be at most {MOST_SHOTS}")
