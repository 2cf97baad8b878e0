"""Configuration of `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, check_numbers
from precision.config import Backend

MOST_TOKENS = 10**6


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a text."""

    run: str = "???"
    """Directory of a run, an imported model, or a model in the Hugging Face format."""
    prompt: str = "def "
    """Text to continue."""
    image: Any = None
    """A picture before the prompt, or a list of pictures: paths. The model needs a vision encoder."""
    tokens: int = 100
    """Largest number of tokens to generate. Generation ends earlier at the end-of-document token."""
    temperature: float = 0.7
    """Divides the logits before sampling; 0: always take the most probable token."""
    top_k: int | None = 50
    """Sample from this many of the most probable tokens; null: from all."""
    seed: int = 0
    """Seed of the sampling. The same seed gives the same text."""
    backend: Backend | None = None
    """GEMM backend; null: as in training."""
    launch: dict[str, Any] = field(default_factory=dict)
    """Only the launcher reads it."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("tokens", "top_k"), not_negative=("temperature",))
        if not all(isinstance(path, str) and path for path in self.images):
            raise ConfigError(
                "image", None, "must be a path or a list of paths", ["image=photo.jpg", "image=[a.png,b.png]"]
            )
        if self.tokens > MOST_TOKENS:
            raise ConfigError("tokens", self.tokens, f"must be at most {MOST_TOKENS:,}")

    @property
    def images(self) -> list[Any]:
        if self.image is None:
            return []
        return self.image if isinstance(self.image, list) else [self.image]
