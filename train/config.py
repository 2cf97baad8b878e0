"""The configuration of a run, and the checks that involve more than one component."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Any, assert_never

from core.errors import ConfigError, check_local, check_name, check_numbers
from core.files import locate
from core.import_path import check_form
from data.config import DataConfig, Packing, TokenizerKind
from data.images.config import TileConfig
from hparam.config import HparamConfig
from model.config import ModelConfig, RopeScaling
from model.roles import GROUPS, ParameterInfo, Role, check_freeze, roles_of
from parallel.layout import EngineKind, Layout, ParallelConfig, split_unit
from precision.config import Backend, PrecisionConfig
from train.contrastive.config import ContrastiveConfig, ContrastiveLoss
from train.optim.config import OptimizerConfig, OptimizerKind
from train.optim.lr_schedule import LRScheduleConfig
from train.recovery.config import RecoveryConfig

if TYPE_CHECKING:
    from parallel.vision.towers import TowersConfig

SEARCH_TOKENS = 50_000_000
"""Most tokens of a corpus in which questions are looked for by default: about a minute of one core."""
UNUSED = 4
"""Most times that a model's vocabulary may be as large as its tokenizer's."""
SIZES = ("steps", "seq_len", "global_batch_size", "micro_batch_size")


@dataclass(frozen=True)
class RunConfig:
    """The run's directory is `root/name`. Null `name`: the start time, so the same command begins a new run."""

    root: str = "runs"
    """Folder of runs, on a file system that all nodes share."""
    name: str | None = None
    """Name of the run's directory; null: the start time."""
    seed: int = 0
    """Seed of the initial weights and of the order of samples."""
    resume: bool = True
    """True: resume from the directory's last checkpoint. False: reject a directory that holds a run."""

    def __post_init__(self) -> None:
        check_local("root", self.root)
        if self.name is not None:
            check_name("name", self.name)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "must be from 0 to 2^63 - 1")


class Objective(Enum):
    """What a run trains, and by which loss."""

    language = "language"
    """A language model, by the cross-entropy of the next token."""
    contrastive = "contrastive"
    """A vision encoder and a text decoder on image-caption pairs, by the agreement of their features."""


@dataclass(frozen=True)
class TrainingConfig:
    """The first phase of the run. `global_batch_size` and `micro_batch_size` count sequences of `seq_len` tokens.
    Gradients accumulate over a rank's micro-batches.
    """

    steps: int = 100
    """Number of optimizer steps. `phases` come after them."""
    seq_len: int = 256
    """Length of a training sequence in tokens."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Sequences per forward pass of a rank. A smaller number needs less memory and more passes."""
    weights: dict[str, float] = field(default_factory=dict)
    """Relative weights of the sources; a source that is not named is excluded. Empty: the weights in data.sources."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: no clipping."""
    freeze: list[str] = field(default_factory=list)
    """Roles that keep their initial weights (`embedding`, `router`, ...), or the groups `vision`, `encoder` (the same
    without the projector) and `decoder`.
    """
    deterministic: bool = False
    """Repeat results to the bit on GPUs, too: the same run on the same GPUs, ranks and versions. It costs speed, mostly
    in the backward pass of attention. CPUs always do.
    """
    objective: Objective = Objective.language
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def __post_init__(self) -> None:
        check_numbers(self, positive=(*SIZES, "clip_norm"))
        if self.objective is not Objective.contrastive and self.contrastive != ContrastiveConfig():
            reason = "configures another objective: add training.objective=contrastive, or omit it"
            raise ConfigError("contrastive", None, reason)
        _check_weights(self.weights or None)
        check_freeze(self.freeze)

    @property
    def frozen(self) -> frozenset[Role]:
        return roles_of(self.freeze)


@dataclass(frozen=True)
class PhaseConfig:
    """A later phase of the run. Null keeps the setting of the phase before, except for `weights`."""

    name: str
    """Name of the phase in metrics and errors; not `main`, which is the first phase."""
    steps: int
    """Number of optimizer steps of this phase."""
    seq_len: int | None = None
    """Length of a training sequence in tokens."""
    global_batch_size: int | None = None
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of a rank."""
    weights: dict[str, float] | None = None
    """Relative weights of the sources; a source that is not named is excluded. Null: the weights in data.sources."""
    schedule: LRScheduleConfig | None = None
    """Learning rate within this phase; null: the schedule of the phase before, restarted."""
    rope_theta: float | None = None
    """Base of the rotary frequencies from this phase on; usually larger for longer sequences."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies from this phase on."""
    temperature_floor: float | None = None
    """Like `rope_theta` and `rope_scaling`, replaces the model's setting from this phase on, for longer sequences."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=(*SIZES, "rope_theta", "temperature_floor"))
        _check_weights(self.weights)


def _check_weights(weights: dict[str, float] | None) -> None:
    if weights is not None and not sum(weights.values()) > 0:
        raise ConfigError("weights", None, "name at least one source with a positive weight")
    for source, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weights.{source}", weight, "must not be negative")


@dataclass(frozen=True)
class EvaluationConfig:
    """Measure the loss on held-out sequences."""

    every: int = 0
    """Optimizer steps between two evaluations; 0: only at the end."""
    sequences: int = 32
    """Number of held-out sequences per source. More give a less noisy loss and take longer."""
    answers: bool = True
    """For sources with pictures, also predict the last token of each document with its own, other and no pictures, and
    keep examples for the report. Takes about four times as long as the loss of these sources.
    """
    baselines: bool = False
    """At the end, fit a unigram and a bigram model to the tokens consumed, for comparison."""
    suites: list[str] = field(default_factory=list, metadata={"path": ".yaml"})
    """Suites of examinations to ask the model in training: names of presets (smoke), or YAML files with the same
    content. The results go to evaluations.jsonl.
    """
    suites_every: int = 0
    """Optimizer steps between two examinations; 0: only at the end."""
    search_tokens: int = SEARCH_TOKENS
    """Tokens of the training corpus in which the questions are looked for, evenly spread; 0: do not look."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("sequences",), not_negative=("every", "suites_every", "search_tokens"))
        if self.suites_every and not self.suites:
            raise ConfigError("suites_every", self.suites_every, "applies to suites only; name some: suites=[smoke]")


@dataclass(frozen=True)
class CheckpointConfig:
    """Save the state of the run, from which it resumes."""

    every: int = 0
    """Optimizer steps between two checkpoints; 0: only at the end."""
    keep: int = 2
    """Number of checkpoints to retain; at least 1. Older ones are deleted."""
    asynchronous: bool = True
    """Write files in the background from a copy in host memory, while training goes on."""
    directory: str | None = field(default=None, metadata={"path": True})
    """Folder for checkpoints, below which each run has its own: a path, or a URL that fsspec can open
    (s3://bucket/folder). Null: the run's directory.
    """

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("every",))
        if self.keep < 1:
            raise ConfigError("keep", self.keep, "must be at least 1, or no run could be resumed", [1, 2])
        if self.directory is not None:
            if self.directory.startswith("memory:"):
                raise ConfigError("directory", self.directory, "keeps nothing when the process ends; name a folder")
            try:
                locate(self.directory)
            except ConfigError as error:
                raise error.under("directory") from None


class Wandb(Enum):
    disabled = "disabled"
    auto = "auto"
    """Online if WANDB_API_KEY is set, offline otherwise."""
    online = "online"
    offline = "offline"
    """To files that `wandb sync` uploads later."""


@dataclass(frozen=True)
class LoggingConfig:
    every: int = 10
    """Optimizer steps between two lines of metrics."""
    wandb: Wandb = Wandb.disabled
    """Send the metrics to Weights & Biases as well."""
    project: str = "leviathan"
    """Project on Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard event files, to tensorboard/ in the run's directory."""
    prometheus: str | None = None
    """File *.prom for Prometheus, such as in the folder of node_exporter's textfile collector; null: none."""
    report: bool = True
    """Write report.html at the end of the run."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("every",))


@dataclass(frozen=True)
class ProfileConfig:
    """Trace steps with PyTorch's profiler."""

    steps: list[int] = field(default_factory=list)
    """Steps to trace, counted from 0; empty: none."""
    memory: bool = False
    """Write memory snapshots of the traced steps; needs a GPU."""

    def __post_init__(self) -> None:
        if any(step < 0 for step in self.steps):
            raise ConfigError("steps", min(self.steps), "must not be negative", [0])


@dataclass(frozen=True)
class OnlineConfig:
    """Score the next sequences with the model in training, and train on those with the highest loss."""

    every: int = 0
    """Optimizer steps between two scorings; 0: no online filtering."""
    keep: float = 0.5
    """Fraction of the candidates to train on, above 0 and below 1."""
    hysteresis: float = 0.05
    """Candidates that miss the threshold by less than this, in nats per token, wait for the next window."""
    revive: float = 0.05
    """Fraction of a window that is drawn at random from the other candidates; 0: none."""
    max_loss: float | None = None
    """Sequences with a higher loss, in nats per token, are dropped as noise; null: no limit."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError("every", self.every, "must not be negative; 0 turns it off", [0, 100])
        if not 0 < self.keep < 1:
            raise ConfigError("keep", self.keep, "must lie between 0 and 1", [0.5])
        if not 0 <= self.revive < 1:
            raise ConfigError("revive", self.revive, "must lie in [0, 1)", [0.05])
        if not self.hysteresis >= 0:
            raise ConfigError("hysteresis", self.hysteresis, "must not be negative", [0.0, 0.05])


@dataclass(frozen=True)
class CallbackConfig:
    """A callback from your own package: the import path of its class, and keyword arguments of the constructor."""

    target: str
    """Import path of the class: `my.module:Mine`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the constructor."""
    SHORTHAND = "target"

    def __post_init__(self) -> None:
        check_form(self.target, "target")


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run. Only the launcher reads `launch`."""

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
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    """Later phases of the run, in order, such as one with longer sequences; empty: none."""
    callbacks: list[CallbackConfig] = field(default_factory=list)
    """Each is `my.module:Mine` or {target: my.module:Mine, options: {...}}; see docs/extending.md."""
    launch: dict[str, Any] = field(default_factory=dict)
    """Machines and number of ranks: see `launch.config.LaunchConfig`."""

    def __post_init__(self) -> None:
        targets = [one.target for one in self.callbacks]
        if twice := [target for target in targets if targets.count(target) > 1]:
            raise ConfigError("callbacks", twice[0], "is named twice; keep one")


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) of a run, with every setting filled in."""

    name: str
    start: int
    stop: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    weights: dict[str, float] | None
    schedule: LRScheduleConfig
    model: ModelConfig
    """The run's model with the RoPE settings of this phase."""

    @property
    def key(self) -> str:
        """The configuration key of the phase."""
        return "training" if self.name == "main" else f"phases.{self.name}"

    def learning_rate_factor(self, step: int) -> float:
        return self.schedule.factor(step - self.start, self.stop - self.start)

    def check_schedule(self) -> None:
        """Import the schedule if it is an import path. Raises `ConfigError` if it cannot be imported or called."""
        try:
            if isinstance(self.schedule.kind, str):
                self.schedule.function()
        except ConfigError as error:
            raise error.under("schedule" if self.name == "main" else "training.schedule") from None


def phases(config: TrainConfig) -> list[Phase]:
    """Return the run's phases in order. The first is made from `training` and `schedule` and has the name "main"."""
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
    """Return the phase in which optimizer step `steps` (from 1) ran."""
    return next(phase for phase in phases(config) if steps <= phase.stop)


def check(config: TrainConfig, world_size: int) -> Layout:
    """Check the settings that involve several components, before anything is built. Returns the layout."""
    from parallel.parallelize import resolve_layout  # imports torch: keys and values are checked without it

    for role in config.model.init.roles:
        if role not in Role.__members__:
            raise ConfigError(f"model.init.roles.{role}", None, "no such role", [one.name for one in Role])
    optimizer, precision = config.optimizer, config.precision
    moments, muon = optimizer.moments_dtype(precision), optimizer.kind is OptimizerKind.muon
    layout = resolve_layout(config.parallel, world_size, config.model, precision, moments, muon)
    match config.training.objective:
        case Objective.language:
            if config.data.packing is Packing.pairs:
                reason = "prepares training.objective=contrastive"
                raise ConfigError("data.packing", Packing.pairs, reason, [Packing.best_fit, Packing.greedy])
        case Objective.contrastive:
            check_contrastive(config, layout)
        case _:
            assert_never(config.training.objective)
    _check_frozen(config)
    names = [phase.name for phase in phases(config)]
    if len(set(names)) != len(names):
        raise ConfigError("phases", None, f"names must differ, and 'main' is the first phase: {', '.join(names)}")
    for phase in phases(config):
        for source in phase.weights or {}:
            if config.data.tokens is None and source not in config.data.sources:
                reason = "no such source"
                raise ConfigError(f"{phase.key}.weights.{source}", None, reason, list(config.data.sources))
        if config.data.packing.has_seq_len and phase.seq_len != config.data.pack_seq_len:
            reason = f"sequences are packed for data.pack_seq_len={config.data.pack_seq_len}"
            raise ConfigError(f"{phase.key}.seq_len", phase.seq_len, reason, [config.data.pack_seq_len])
        try:
            phase.check_schedule()
            layout.check_batch(phase.global_batch_size, phase.micro_batch_size)
            layout.check_seq_len(config.model, phase.seq_len)
            _check_alignment(config.data.align, split_unit(config.model, phase.seq_len), phase.seq_len)
        except ConfigError as error:
            raise _of_phase(error, phase.name) from None
    if config.online.every and config.evaluation.baselines:
        reason = "would be fitted to other tokens than the model, because online filtering drops some"
        raise ConfigError("evaluation.baselines", True, reason, [False])
    _check_suites(config.evaluation.suites, layout)
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        reason = "TensorBoard is not installed: pip install 'leviathan[tensorboard]'"
        raise ConfigError("logging.tensorboard", True, reason)
    late = [step for step in config.profile.steps if step >= phases(config)[-1].stop]
    if late:
        reason = f"the run has {phases(config)[-1].stop} steps, counted from 0"
        raise ConfigError("profile.steps", late[0], reason)
    if config.data.tokens is None and config.data.tokenizer.kind is TokenizerKind.bpe:
        check_vocabulary(config.data.tokenizer.vocab_size, config.model)
    if config.data.images is not None:
        check_tiles(config.data.images.tiles, config.model)
        if config.data.tokens is None and config.data.tokenizer.kind is TokenizerKind.bpe:
            tokens = config.data.images.tokens
            check_placeholder(2 + tokens.names.index(tokens.patch), config.model)  # after BOS and EOS
    return layout


def towers_config(config: TrainConfig) -> TowersConfig:
    """Return the towers that a contrastive run trains."""
    from parallel.vision.towers import TowersConfig  # imports torch

    first = config.training.contrastive.loss.first
    return TowersConfig(config.model, config.training.contrastive.feature_size, first.log_scale, first.bias)


def run_parameters(config: TrainConfig) -> dict[str, ParameterInfo]:
    """Return every parameter that a run of any objective trains, without allocating memory for it."""
    from model.tensor_source import parameter_infos  # imports torch

    match config.training.objective:
        case Objective.language:
            return parameter_infos(config.model)
        case Objective.contrastive:
            return towers_config(config).infos()


def _check_frozen(config: TrainConfig) -> None:
    """Raise `ConfigError` for frozen roles that the network lacks, and for frozen matrices of a part without a model.
    Routers, embeddings, patches, gains and biases may keep random or constant values.
    """
    freeze, parts = config.training.freeze, config.model.init_parts
    if not freeze:
        return
    try:
        check_freeze(freeze, {info.role for info in run_parameters(config).values()})
    except ConfigError as error:
        raise error.under("training") from None
    for part, path in (("vision", parts.vision), ("decoder", parts.decoder)):
        matrices = {role for role in GROUPS[part] if role.is_matrix and role is not Role.projector}
        random = [name for name in freeze if matrices & roles_of([name])]
        if random and path is None and config.model.init_from is None:
            reason = f"keeps random weights: take those of another model (model.init_parts.{part})"
            if part == "decoder" and config.training.objective is Objective.contrastive:
                reason = "keeps random weights, and the text decoder of contrastive training takes no others: omit it"
            raise ConfigError("training.freeze", f"[{','.join(random)}]", reason)


def _check_suites(names: list[str], layout: Layout) -> None:
    """Raise `ConfigError` for suites that cannot be read, and for layouts that divide sequences, layers or heads."""
    from train.exam.registry import read_suites  # imports the kinds of examinations

    if names and max(layout.tp, layout.cp, layout.pp) > 1:
        reason = "cannot be asked during training with tp, cp or pp; afterwards, one process can: "
        raise ConfigError("evaluation.suites", None, f"{reason}leviathan evaluate RUN suite=NAME", ["[]"])
    try:
        read_suites(names)
    except ConfigError as error:
        raise error.under("evaluation") from None


def check_contrastive(config: TrainConfig, layout: Layout) -> None:
    """Raise `ConfigError` for what contrastive training cannot do."""
    towers_config(config).infos()  # refuses a model without an encoder or with experts
    data = config.data
    if data.tokens is None and data.packing is not Packing.pairs:
        reason = "a contrastive batch compares image-caption pairs, each a sequence of its own"
        raise ConfigError("data.packing", data.packing, reason, [Packing.pairs])
    if data.images is not None:
        check_pairs(data.images.tiles, config.training.seq_len)
    for key in ("pp", "cp", "tp"):
        if (degree := getattr(layout, key)) > 1:
            reason = "the contrastive objective runs under data parallelism (dp_replicate, dp_shard) only"
            raise ConfigError(f"parallel.{key}", degree, reason, [1])
    for phase in phases(config):
        if config.training.contrastive.loss is ContrastiveLoss.info_nce and phase.global_batch_size < 2:
            reason = "InfoNCE compares the pairs of a batch with each other, so one pair alone teaches nothing"
            raise ConfigError(f"{phase.key}.global_batch_size", phase.global_batch_size, reason, [2])
    only_values: dict[str, Any] = {
        "parallel.engine": EngineKind.fsdp2,
        "parallel.compile": False,
        "parallel.vision.over_data_parallel": False,
        "model.tie_embeddings": False,
        "model.init_from": None,
        "model.init_parts.decoder": None,
        "hparam.base": None,
        "online.every": 0,
        "evaluation.baselines": False,
        "evaluation.suites": [],
        "precision.backend": Backend.native,
    }
    for key, only in only_values.items():
        if (value := attrgetter(key)(config)) != only:
            shown = value if isinstance(value, int | str | Enum) else None
            raise ConfigError(
                key, shown, "is not supported by the contrastive objective", ["null" if only is None else only]
            )


def check_pairs(tiles: TileConfig, seq_len: int) -> None:
    """Raise `ConfigError` unless each picture is one tile, and a sequence has room for its tokens and a caption."""
    if tiles.max_tiles != 1:
        reason = "a contrastive model encodes one tile of each picture"
        raise ConfigError("data.images.tiles.max_tiles", tiles.max_tiles, reason, [1])
    least = tiles.tokens_per_tile + 6  # three tokens around the tile's, BOS, EOS and one token of a caption
    if seq_len < least:
        reason = f"a pair needs {least - 1} tokens besides its caption's"
        raise ConfigError("training.seq_len", seq_len, reason, [2 * least])


def check_language(config: TrainConfig, key: str, value: str) -> None:
    """Raise `ConfigError` for `key` unless the configuration trains a language model."""
    if config.training.objective is not Objective.language:
        trained = f"training.objective={config.training.objective.name}"
        raise ConfigError(key, value, f"has no language model: it is trained with {trained}")


def check_placeholder(placeholder: int, model: ModelConfig) -> None:
    """Raise `ConfigError` if the model has another id for placeholders than the tokenizer."""
    if model.vision is not None and model.vision.image_token_id != placeholder:
        reason = "is not the placeholder of the tokenizer"
        raise ConfigError("model.vision.image_token_id", model.vision.image_token_id, reason, [placeholder])


def check_tiles(tiles: TileConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` unless the model has a vision encoder for tiles of these sizes."""
    if model.vision is None:
        reason = "the data have pictures (data.images), which a model without a vision encoder cannot read"
        raise ConfigError("model.vision", None, reason, ["+model.vision={}"])
    for key in ("tile_size", "patch_size"):
        if getattr(tiles, key) != (own := getattr(model.vision, key)):
            reason = f"the model's tiles have {key}={own} (model.vision.{key})"
            raise ConfigError(f"data.images.tiles.{key}", getattr(tiles, key), reason, [own])


def check_vocabulary(size: int, model: ModelConfig) -> None:
    """Raise `ConfigError` unless a tokenizer with `size` ids suits the model."""
    if size > model.vocab_size:
        reason = f"the tokenizer has {size} ids, and the model needs at least as many"
        raise ConfigError("model.vocab_size", model.vocab_size, reason, [-(-size // 128) * 128])
    if size * UNUSED < model.vocab_size:
        reason = f"the tokenizer has only {size:,} ids, so most of the model's vocabulary would never be used: "
        raise ConfigError(
            "model.vocab_size", model.vocab_size, f"{reason}name a tokenizer of its size (data.tokenizer)"
        )


def _of_phase(error: ConfigError, name: str) -> ConfigError:
    """Return the error with the keys of the phase `name` in place of those of `training`."""
    if name == "main":
        return error
    key, reason = (text.replace("training.", f"phases.{name}.") for text in (error.key, error.reason))
    return ConfigError(key, error.value, reason, error.legal)


def _check_alignment(align: int | None, unit: int, seq_len: int) -> None:
    """Check that `align` is a multiple of the attention chunk and divides the sequence length."""
    if align is not None and align % unit:
        reason = f"must be a multiple of the model's attention chunk of {unit}"
        raise ConfigError("data.align", align, reason, [unit, 2 * unit])
    if align is not None and seq_len % align:
        reason = f"must be a multiple of data.align={align}"
        raise ConfigError("training.seq_len", seq_len, reason, [-(-seq_len // align) * align])


class Check(Enum):
    """Whether to compare settings and logits with those of transformers. `auto`: settings if transformers is
    installed, and logits if both models also fit into memory. The result is printed and, on import, stored.
    """

    auto = "auto"
    always = "always"
    never = "never"
