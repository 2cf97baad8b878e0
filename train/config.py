"""The configuration of a run, and the checks that need more than one component."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from core.errors import ConfigError, check_numbers
from core.files import locate
from data.config import DataConfig, Packing
from hparam.config import HparamConfig
from model.config import ModelConfig, RopeScaling
from model.roles import Role
from parallel import expert_parallel
from parallel.deepspeed import zero12
from parallel.layout import ParallelConfig, row_unit
from parallel.parallelize import check_float8
from precision.config import PrecisionConfig
from train.online_filter import OnlineConfig
from train.optim.lr_schedule import LRScheduleConfig
from train.optim.optimizer import OptimizerConfig, OptimizerKind


@dataclass(frozen=True)
class RunConfig:
    """Where the run's directory is: `root/name`. A name makes it resumable; null takes the time of the start."""

    root: str = "runs"
    name: str | None = None
    seed: int = 0
    resume: bool = True
    """Go on where the directory's last committed checkpoint stands; false: refuse a directory that holds a run."""


@dataclass(frozen=True)
class TrainingConfig:
    """The first phase of the run. `global_batch_size` and `micro_batch_size` count sequences of `seq_len` tokens.
    Gradients accumulate over a rank's micro-batches.
    """

    steps: int = 100
    seq_len: int = 256
    global_batch_size: int = 8
    micro_batch_size: int = 8
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of the sources in this stretch, others are left out; none: as in data.sources."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: no clipping."""

    def __post_init__(self) -> None:
        for key in ("steps", "seq_len", "global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")
        check_numbers(self, positive=("clip_norm",))
        _check_weights(self.weights or None)


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch that follows the first one: null keeps what came before."""

    name: str
    steps: int
    seq_len: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    weights: dict[str, float] | None = None
    """Shares of the sources, others are left out; null: as in data.sources."""
    schedule: LRScheduleConfig | None = None
    """Learning rate within this phase; null: the run's schedule begins anew."""
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    temperature_floor: float | None = None
    """How positions are seen from here on, for longer rows: the model's settings of these names. Weights do not depend
    on them.
    """

    def __post_init__(self) -> None:
        for key in ("steps", "seq_len", "global_batch_size", "micro_batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "must be positive")
        check_numbers(self, positive=("rope_theta", "temperature_floor"))
        _check_weights(self.weights)


def _check_weights(weights: dict[str, float] | None) -> None:
    if weights is not None and not sum(weights.values()) > 0:
        raise ConfigError("weights", None, "name at least one source with a positive share")
    for source, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weights.{source}", weight, "must not be negative")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss. `sequences` per source of the run's context; `every` steps (0: only at the end)."""

    every: int = 0
    sequences: int = 32
    baselines: bool = False
    """Fit a unigram and a bigram model on the very tokens that the run consumed, for comparison at the end."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("sequences",), not_negative=("every",))


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint `every` steps (0: only at the end), the last `keep` of them kept."""

    every: int = 0
    keep: int = 2
    asynchronous: bool = True
    directory: str | None = None
    """Where checkpoints go, under the run's name: a path, or the URL of any filesystem that fsspec has a driver for
    (s3://bucket/folder). Null: into the run's directory.
    """

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("every",))
        if self.keep < 1:
            raise ConfigError("keep", self.keep, "must be at least 1, or no run could be resumed", [1, 2])
        if self.directory is not None:
            try:
                locate(self.directory)
            except ConfigError as error:
                raise error.under("directory") from None


class Wandb(Enum):
    """`auto`: online where WANDB_API_KEY is set, offline otherwise."""

    disabled = "disabled"
    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass(frozen=True)
class LoggingConfig:
    every: int = 10
    wandb: Wandb = Wandb.disabled
    project: str = "leviathan"
    report: bool = True
    """Draw the run's page, report.html, at its end."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError("every", self.every, "must be positive")


@dataclass(frozen=True)
class ProfileConfig:
    """Steps (counted from 0) of which a profiler trace and, on a GPU, a memory snapshot are kept."""

    steps: list[int] = field(default_factory=list)
    memory: bool = False

    def __post_init__(self) -> None:
        if any(step < 0 for step in self.steps):
            raise ConfigError("steps", min(self.steps), "must not be negative", [0])


@dataclass(frozen=True)
class TrainConfig:
    """One whole run. `launch` is read by the launcher only."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    hparam: HparamConfig = field(default_factory=HparamConfig)
    schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    launch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A stretch of steps [start, stop) with everything filled in."""

    name: str
    start: int
    stop: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    weights: dict[str, float] | None
    schedule: LRScheduleConfig
    model: ModelConfig
    """The run's, with positions as this phase sees them."""

    @property
    def key(self) -> str:
        """Where a user sets what it is made of."""
        return "training" if self.name == "main" else f"phases.{self.name}"

    def learning_rate_factor(self, step: int) -> float:
        return self.schedule.factor(step - self.start, self.stop - self.start)


def phases(config: TrainConfig) -> list[Phase]:
    """The run's stretches in order; the first comes from `training` and `schedule` and is called "main"."""
    first = config.training
    sizes = first.seq_len, first.global_batch_size, first.micro_batch_size
    main = Phase("main", 0, first.steps, *sizes, first.weights or None, config.schedule, config.model)
    found = [main]
    for later in config.phases:
        last = found[-1]
        model = replace(last.model, **_given(later, ("rope_theta", "rope_scaling", "temperature_floor")))
        base = replace(last, name=later.name, start=last.stop, stop=last.stop + later.steps, weights=None, model=model)
        changed = _given(later, ("seq_len", "global_batch_size", "micro_batch_size", "weights", "schedule"))
        found.append(replace(base, **changed))
    return found


def _given(later: PhaseConfig, keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key in keys if (value := getattr(later, key)) is not None}


def phase_of(config: TrainConfig, steps: int) -> Phase:
    """The stretch that ends a checkpoint after so many steps."""
    return next(phase for phase in phases(config) if steps <= phase.stop)


def check(config: TrainConfig, world_size: int) -> None:
    """What one component alone cannot see. Called before anything is built."""
    for role in config.model.init.roles:
        if role not in Role.__members__:
            raise ConfigError(f"model.init.roles.{role}", None, "no such role", [one.name for one in Role])
    layout = config.parallel.resolve(world_size)
    layout.check_model(config.model)
    expert_parallel.check(layout.dispatch, config.precision.compute_dtype)
    optimizer, precision = config.optimizer, config.precision
    moments, muon = optimizer.moments_dtype(precision), optimizer.kind is OptimizerKind.muon
    zero12.check(layout, precision.master_dtype, moments, muon, config.model.has_experts, precision.uses_float8)
    check_float8(config.model, config.precision, layout)
    names = [phase.name for phase in phases(config)]
    if len(set(names)) != len(names):
        raise ConfigError("phases", None, f"names must differ, and 'main' is the first stretch: {', '.join(names)}")
    for phase in phases(config):
        for source in phase.weights or {}:
            if config.data.tokens is None and source not in config.data.sources:
                reason = "no such source"
                raise ConfigError(f"{phase.key}.weights.{source}", None, reason, list(config.data.sources))
        if config.data.packing is Packing.best_fit and phase.seq_len != config.data.pack_seq_len:
            reason = f"the rows are packed for data.pack_seq_len={config.data.pack_seq_len}"
            raise ConfigError(f"{phase.key}.context", phase.seq_len, reason, [config.data.pack_seq_len])
        try:
            layout.check_batch(phase.global_batch_size, phase.micro_batch_size)
            layout.check_rows(config.model, phase.seq_len)
            _check_alignment(config.data.align, row_unit(config.model, phase.seq_len), phase.seq_len)
        except ConfigError as error:
            raise _of_phase(error, phase.name) from None
    if config.online.every and config.evaluation.baselines:
        reason = "would be fitted to other tokens than the run's, of which online filtering leaves some out"
        raise ConfigError("evaluation.baselines", True, reason, [False])
    late = [step for step in config.profile.steps if step >= phases(config)[-1].stop]
    if late:
        raise ConfigError(
            "profile.steps", late[0], f"the run ends after {phases(config)[-1].stop} steps, counted from 0"
        )


def _of_phase(error: ConfigError, name: str) -> ConfigError:
    """What is said of `training`, said of the phase that it is about."""
    if name == "main":
        return error
    key, reason = (text.replace("training.", f"phases.{name}.") for text in (error.key, error.reason))
    return ConfigError(key, error.value, reason, error.legal)


def _check_alignment(align: int | None, unit: int, context: int) -> None:
    """Documents are aligned in vain where chunks or rows end elsewhere."""
    if align is not None and align % unit:
        reason = f"must be a multiple of the model's chunk of {unit}, where attention is cut"
        raise ConfigError("data.align", align, reason, [unit, 2 * unit])
    if align is not None and context % align:
        reason = f"must be a multiple of data.align={align}, or rows begin elsewhere"
        raise ConfigError("training.seq_len", context, reason, [-(-context // align) * align])
