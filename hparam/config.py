"""The `hparam` section of a run: from which base its hyperparameters are carried over, and by which rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, check_numbers
from hparam.rules import HeadForm, Parametrization
from hparam.scale import Scale
from model.config import MultipliersConfig


@dataclass(frozen=True)
class HparamConfig:
    """`base` null: hyperparameters are what `optimizer` and `model.init` say. With a base those say what was found at
    the base's size, and the run takes what the rules make of it.
    """

    base: Scale | None = None
    kind: dict[str, str] = field(default_factory=dict)
    """What kind of model the base is (its router, norms, tied ends), written with it: a run of another kind is refused.
    Not given: not compared.
    """
    rules: Parametrization = Parametrization.metap
    head: HeadForm = HeadForm.absorbed
    alpha: float = 1.0
    """Exponent of depth: 1 is CompleteP; 0.5 lets a branch's share fall with the root of depth only."""
    batch_exponent: float = 0.5
    """The learning rate goes with the batch to this power (Malladi et al. 2022, arXiv 2205.10287), below the critical
    one.
    """
    tokens_exponent: float = 0.3
    """The learning rate falls with the run's tokens to this power: empirical, `leviathan metap fit` measures it."""
    tau: float | None = None
    """Weight decay as a timescale: the share of the run over which weights forget (Wang & Aitchison 2024, arXiv
    2405.13698). Null: what optimizer.weight_decay gives at the base.
    """
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    """At the base."""
    critical_batch: float | None = None
    """In tokens, for the base's run; grows with the run's tokens to the power of 0.46 (Bergsma et al. 2025, arXiv
    2505.13738)."""
    allow_supercritical: bool = False
    table: str | None = None
    """Digest of what a transfer found, written by `leviathan metap transfer`: a run that finds anything else stops."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the base's hyperparameters come from: for the reader."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("tau", "critical_batch"), not_negative=("batch_exponent",))
        if not -1 <= self.tokens_exponent <= 1:
            raise ConfigError("tokens_exponent", self.tokens_exponent, "must lie between -1 and 1", [0.3])
        if not 0.5 <= self.alpha <= 1:
            raise ConfigError("alpha", self.alpha, "must lie between 0.5 and 1", [0.5, 1])
        if self.tau is not None and self.rules is Parametrization.standard:
            raise ConfigError("tau", self.tau, "is no part of the standard way, which keeps weight decay as it is")
