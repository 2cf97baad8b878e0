"""Configuration of `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, check_numbers
from precision.config import Backend

MOST_TOKENS = 10**6


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a text. `run`: the directory of a run, of an imported model, or of a model in the Hugging Face format.
    `temperature` 0 takes the most probable token. `top_k`: number of the most probable tokens to sample from.
    """

    run: str = "???"
    prompt: str = "def "
    tokens: int = 100
    temperature: float = 0.7
    top_k: int | None = 50
    seed: int = 0
    backend: Backend | None = None
    """GEMM backend; null: as in training."""
    launch: dict[str, Any] = field(default_factory=dict)
    """Only the launcher reads it."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("tokens", "top_k"), not_negative=("temperature",))
        if self.tokens > MOST_TOKENS:
            raise ConfigError("tokens", self.tokens, f"must be at most {MOST_TOKENS:,}")
