"""When a run is in trouble, and what recovery does then."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.errors import ConfigError, check_numbers


class RecoveryMode(Enum):
    """What recovery does about trouble."""

    act = "act"
    """Find the cause, go back to a good checkpoint, and skip documents or lower the learning rate."""
    observe = "observe"
    """Write alarms to recovery.jsonl, and change nothing."""
    off = "off"


class WithoutCheckpoint(Enum):
    """What a run does about a spike if no checkpoint is older than the trouble. NaN always ends the run."""

    stop = "stop"
    go_on = "go_on"


@dataclass(frozen=True)
class RecoveryConfig:
    """A value is suspicious if it exceeds both the median of the last `window` calm steps by `deviations` robust
    standard deviations (1.4826 times the median absolute deviation), and its signal's ratio times that median.
    `patience` suspicious steps in a row are an alarm; fewer are only noted. NaN and infinity are an alarm at once.
    """

    mode: RecoveryMode = RecoveryMode.act
    window: int = 128
    """Number of calm steps to compare with."""
    history: int = 32
    """Least number of calm steps in a phase before a value can be suspicious."""
    patience: int = 8
    """Number of suspicious steps in a row that are an alarm."""
    deviations: float = 8.0
    """Robust standard deviations above the median."""
    loss_ratio: float = 1.25
    """Least ratio of a suspicious loss to the median."""
    norm_ratio: float = 5.0
    """Least ratio of a suspicious gradient norm to the median."""
    router_ratio: float = 3.0
    """Least ratio of a suspicious router statistic to the median: z-loss, largest expert load, concentration."""
    lookback: int = 8
    """Number of steps before the first suspicious one whose sequences may be to blame."""
    suspects: int = 8
    """Most documents that are tried as the cause of one alarm."""
    keep_good: int = 1
    """Number of checkpoints to keep, besides `checkpoint.keep`, that are old enough to be from before any trouble that
    is not found yet.
    """
    replayed_steps: int = 2000
    """Most steps that are repeated on trial to find the cause of one alarm."""
    retries: int = 3
    """Number of alarms in a row after which the run stops. They are in a row unless `forget` calm steps lie between."""
    forget: int = 1000
    """Number of calm steps after which earlier alarms do not count as retries."""
    lr_factor: float = 0.5
    """Factor of the learning rate after trouble that is due to the state of the model. It is applied again with each
    retry. 1: no change.
    """
    lr_steps: int = 200
    """Number of steps for which the learning rate stays lower."""
    without_checkpoint: WithoutCheckpoint = WithoutCheckpoint.stop
    replicas_every: int = 0
    """Optimizer steps between two comparisons of weights and moments that several ranks hold; 0: none."""
    amendments: str | None = field(default=None, metadata={"path": True})
    """An amendments.json of another run on the same data: exclude its documents and lower its learning rates here."""

    def __post_init__(self) -> None:
        positive = ("window", "history", "patience", "deviations", "lr_factor", "replayed_steps")
        not_negative = ("lookback", "suspects", "keep_good", "retries", "forget", "lr_steps", "replicas_every")
        check_numbers(self, positive=positive, not_negative=not_negative)
        if self.history > self.window:
            raise ConfigError("history", self.history, f"must not exceed window={self.window}", [self.window])
        for key in ("loss_ratio", "norm_ratio", "router_ratio"):
            if not getattr(self, key) >= 1:
                raise ConfigError(key, getattr(self, key), "must be at least 1, or calm steps are suspicious", [1.25])
        if self.lr_factor > 1:
            raise ConfigError("lr_factor", self.lr_factor, "must not exceed 1", [0.5, 1])
