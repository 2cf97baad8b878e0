"""How the vision encoder is spread over ranks. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.errors import ConfigError


class EncoderStages(Enum):
    """Which ranks of a pipeline have the vision encoder."""

    first = "first"
    """Those of the first stage, which encode the tiles of each micro-batch."""
    all = "all"
    """All of them. They share the tiles of a step, and encode them before the pipeline runs and again after it, for
    their gradients. No stage then waits for the encoder, at the price of one more forward pass of it.
    """


@dataclass(frozen=True)
class VisionParallelConfig:
    """How the vision encoder is spread over ranks."""

    stages: EncoderStages = EncoderStages.first
    over_data_parallel: bool = False
    """Share the tiles of all data-parallel ranks, whose sequences may show very different numbers of them. Each rank
    then reads the tokens of the whole batch.
    """
    image_token_share: float | None = None
    """Expected fraction of image tokens. The first stage of a pipeline gets fewer layers the higher it is, because it
    encodes the tiles (stages=first). null: that of the corpus.
    """

    def __post_init__(self) -> None:
        if self.image_token_share is not None and not 0 <= self.image_token_share <= 1:
            raise ConfigError("image_token_share", self.image_token_share, "must lie between 0 and 1")
