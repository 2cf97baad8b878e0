"""Configuration of a curation."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError, check_numbers


@dataclass(frozen=True)
class CurationRules:
    """What decides which pairs are kept, besides the metadata."""

    t: int = 20_000
    """Matches of an entry above which pairs are dropped at random. MetaCLIP took 20,000 for 400 million pairs and
    170,000 for 2.5 billion.
    """
    seed: int = 0
    """Another seed keeps other pairs of the frequent entries."""
    max_characters: int = 10_000
    """Drop pairs with a longer caption, in characters."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("t", "max_characters"))
        if abs(self.seed) >= 1 << 63:
            raise ConfigError("seed", self.seed, "must have at most 63 bits", [0])
