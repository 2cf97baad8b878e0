"""The `hparam` section of a run: the base at which hyperparameters were found, and the rules that transfer them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, check_numbers
from hparam.rules import HeadForm, Parametrization
from hparam.scale import Scale
from model.config import MultipliersConfig


@dataclass(frozen=True)
class HparamConfig:
    """With `base` null, `optimizer` and `model.init` apply as they are. With a base, they hold the values found at the
    base's size, and the rules derive this run's values from them.
    """

    base: Scale | None = None
    """Sizes of the model and run at which the hyperparameters were found; null: nothing is transferred."""
    kind: dict[str, str] = field(default_factory=dict)
    """Architecture choices of the base (router, norms, tied embeddings), stored with it. A run that differs in one of
    them is rejected; choices that are not listed are not compared.
    """
    rules: Parametrization = Parametrization.metap
    """The rules by which hyperparameters follow from those of the base."""
    head: HeadForm = HeadForm.absorbed
    alpha: float = 1.0
    """Exponent of depth: the rules scale residual branches by depth^-alpha. 1 is CompleteP."""
    batch_exponent: float = 0.5
    """Exponent of the batch in the learning rate (Malladi et al. 2022, arXiv 2205.10287), below the critical batch."""
    tokens_exponent: float = 0.3
    """Exponent of 1 / tokens in the learning rate. Empirical: `leviathan metap fit` measures it."""
    tau: float | None = None
    """Weight decay as a timescale: the fraction of the run over which weights are averaged (Wang & Aitchison 2024,
    arXiv 2405.13698). Null: the timescale that optimizer.weight_decay gives at the base.
    """
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    """Multipliers at the base, from which the rules derive `model.multipliers`."""
    critical_batch: float | None = None
    """Critical batch of the base's run, in tokens; grows with tokens^0.46 (Bergsma et al. 2025, arXiv 2505.13738)."""
    allow_supercritical: bool = False
    """Allow batches above the critical batch."""
    table: str | None = None
    """Digest of the transferred values, written by `leviathan metap transfer`. A run that derives other values is
    rejected.
    """
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the base's hyperparameters were found; for information only."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("tau", "critical_batch"), not_negative=("batch_exponent",))
        if not -1 <= self.tokens_exponent <= 1:
            raise ConfigError("tokens_exponent", self.tokens_exponent, "must lie between -1 and 1", [0.3])
        if not 0.5 <= self.alpha <= 1:
            raise ConfigError("alpha", self.alpha, "must lie between 0.5 and 1", [0.5, 1])
        if self.tau is not None and self.rules is Parametrization.standard:
            reason = "has no effect with hparam.rules=standard, which keeps weight decay; remove it"
            raise ConfigError("tau", self.tau, reason)
