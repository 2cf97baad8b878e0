"""Configuration of `certify`."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import ConfigError
from model.config import ModelConfig
from model.roles import check_freeze
from parallel.layout import ParallelConfig
from precision.config import PrecisionConfig
from train.optim.config import OptimizerConfig

MAX_RANKS, MAX_STEPS = 8, 20


@dataclass(frozen=True)
class CertifyConfig:
    """Certify a layout on this machine within minutes, without a GPU."""

    run: str | None = None
    """Take model, parallel, optimizer, precision, frozen roles and cache from this run's configuration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Kind muon certifies Muon, with AdamW for the parameters that Muon does not update; any other kind, AdamW."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Only the FP8 settings have an effect; FP8 is certified with emulated matmuls. Other number formats are fixed."""
    freeze: list[str] = field(default_factory=list)
    """Frozen roles and groups, as in `training.freeze`."""
    ranks: int = MAX_RANKS
    """Largest number of ranks. Each axis and pair of axes must fit; the certificate lists larger layouts as omitted."""
    steps: int = 3
    """Optimizer steps that each layout trains and compares; from 2 to 20."""
    out: str = "certificate.json"
    """File to write the certificate to."""
    cache: str = "~/.cache/leviathan"
    """Certificates are also stored here, where `train` looks for them."""

    def __post_init__(self) -> None:
        for key, least, most in (("ranks", 2, MAX_RANKS), ("steps", 2, MAX_STEPS)):
            if not least <= getattr(self, key) <= most:
                raise ConfigError(key, getattr(self, key), f"must be from {least} to {most}", [least, most])
        check_freeze(self.freeze)
