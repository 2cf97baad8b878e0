"""Degrees of parallelism. Layouts that cannot work are rejected before a process group exists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata

from core.errors import ConfigError, check_numbers, divisors
from model.config import FeedForward, ModelConfig
from parallel.deepspeed.config import ZeroConfig
from parallel.pipeline.stages import V_SCHEDULES_SINCE, PipelineSchedule, Stages, stages
from parallel.vision.config import EncoderStages, VisionParallelConfig

AUTO = "auto"
DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
"""Every axis whose size is configured: dense axes, then sparse ones, in the order in which they are nested."""


class Recompute(Enum):
    """What the backward pass of a layer recomputes. `none`: nothing. `selective`: memory-bound steps, and the first
    matmul of a dense feed-forward layer or shared expert. `full`: everything.
    """

    none = "none"
    selective = "selective"
    full = "full"

    @property
    def repeats_attention(self) -> bool:
        """Whether the backward pass runs the collectives of attention's forward pass again."""
        return self is Recompute.full


class DispatchMethod(Enum):
    """How tokens reach the ranks of their experts.

    `all_to_all` sends each token once to each rank of its experts. `all_gather` sends every token to the whole group
    and sums the results. It has lower latency in small groups with many experts per token. `deepep`: DeepEP's kernels.
    """

    all_to_all = "all_to_all"
    all_gather = "all_gather"
    deepep = "deepep"


class ContextMethod(Enum):
    """How layers with full attention get the keys that other ranks of cp have.

    `gather`: every rank gets all keys and values. `ulysses`: during attention, each rank has some heads of the whole
    sequence (Jacobs et al. 2023). `ring`: keys and values pass from rank to rank (Liu et al. 2023).
    """

    gather = "gather"
    ulysses = "ulysses"
    ring = "ring"


class EngineKind(Enum):
    """What shards the training state over the data-parallel ranks. Everything else is the same under both engines."""

    fsdp2 = "fsdp2"
    """PyTorch's fully sharded data parallelism: parameters, gradients and optimizer state."""
    deepspeed = "deepspeed"
    """DeepSpeed's ZeRO: see `parallel.deepspeed`. Needs the extra `deepspeed`."""


class Reduce(Enum):
    """The dtype in which gradients are summed over ranks."""

    master = "master"
    """The dtype of the master weights."""
    bfloat16 = "bfloat16"
    """Halves the traffic, and rounds the sums, except those of routers."""


class ReduceEvery(Enum):
    """When FSDP2 reduces gradients over ranks. Over the replicas of HSDP they are summed once per step, or if they are
    summed in bfloat16, with every micro-batch: sums over micro-batches are kept in the master dtype.
    """

    micro_batch = "micro_batch"
    """After each micro-batch: only the shards of their sum are kept."""
    step = "step"
    """Once, after the last micro-batch: less traffic, but the whole gradients are kept, in the dtype of the sum."""


class GatherExperts(Enum):
    """When FSDP2 gathers the parameters of routed experts over efsdp."""

    each_pass = "each_pass"
    """For each forward and each backward pass: experts are sharded like all other parameters."""
    step = "step"
    """Once per step, in the compute dtype. Experts stay whole, and their gradients are reduced once; only the master
    weights and the optimizer state are sharded. For large ep, where a rank has few experts.
    """


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the layout, and how memory is traded for time.

    The same ranks form two grids: (pp, dp_replicate, dp_shard, cp, tp) for dense layers, and (pp, dp_replicate, efsdp,
    ep, etp) for routed experts, where efsdp = dp_shard * cp * tp / (ep * etp). The last axis varies fastest from rank
    to rank. FSDP2 shards parameters, gradients and optimizer state over dp_shard * cp, those of experts over efsdp, and
    replicates them over dp_replicate (HSDP). pp splits the layers, and cp each sequence. tp splits heads, hidden sizes
    and the vocabulary, and the sequence outside their matmuls. ep splits the experts, and etp the hidden size of each.
    """

    pp: int = 1
    """Pipeline parallelism: ranks over which the layers are split. 1: no pipeline."""
    dp_replicate: int = 1
    """Copies of the sharded model (HSDP). Copies on different nodes keep the gathers inside a node."""
    dp_shard: int | str = AUTO
    """Number of ranks, or "auto": as many as fill the world."""
    cp: int = 1
    """Context parallelism: ranks over which each sequence is split, for long sequences."""
    tp: int = 1
    """Tensor parallelism: ranks that share each matrix. They communicate in every layer: keep them inside a node."""
    ep: int = 1
    """Expert parallelism: ranks over which the experts are split; a divisor of their number."""
    etp: int = 1
    """Expert tensor parallelism: ranks that share the hidden size of each expert."""
    engine: EngineKind = EngineKind.fsdp2
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Used by engine=deepspeed only."""
    dispatch: DispatchMethod = DispatchMethod.all_to_all
    """Used if ep * etp > 1."""
    exchange_node_size: int | None = None
    """Ranks per node, for dispatch=all_to_all among several nodes: a token crosses the network once to each node and is
    passed on there. null: it is sent to each rank directly."""
    cp_method: ContextMethod = ContextMethod.gather
    reduce_dtype: Reduce = Reduce.master
    reduce_every: ReduceEvery = ReduceEvery.micro_batch
    """Used by engine=fsdp2 without a pipeline. A pipeline always reduces once per step."""
    gather_experts: GatherExperts = GatherExperts.each_pass
    """Used by engine=fsdp2 without a pipeline. A pipeline always gathers once per step."""
    recompute: Recompute = Recompute.none
    """Recomputing saves memory for activations, and costs time."""
    compile: bool = False
    """Apply torch.compile to the dense half of each layer."""
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    """Used if pp > 1."""
    stages_per_rank: int | None = None
    """Number of pipeline stages on each rank. null: 1, or 2 if the schedule needs several."""
    layers_per_stage: list[int] | None = None
    """Number of layers of each stage, first to last. null: the cost of the costliest stage is as low as possible."""
    vision: VisionParallelConfig = field(default_factory=VisionParallelConfig)
    """Used by models with a vision encoder."""
    timeout_s: float = 300.0
    """Seconds after which a waiting collective is reported with the missing ranks, and the run ends."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("timeout_s",))
        if self.engine is EngineKind.fsdp2 and self.zero != ZeroConfig():
            raise ConfigError("zero", None, "configures DeepSpeed: add parallel.engine=deepspeed, or omit it")
        self._check_reductions()
        if isinstance(self.dp_shard, str) and self.dp_shard != AUTO:
            raise ConfigError("dp_shard", self.dp_shard, "must be a number of ranks", [AUTO])
        for key in DEGREES:
            if (degree := getattr(self, key)) != AUTO and degree < 1:
                raise ConfigError(key, degree, "must be positive")
        self._check_schedule()
        self._check_exchange()

    def _check_exchange(self) -> None:
        size, ranks = self.exchange_node_size, self.ep * self.etp
        if size is None:
            return
        if self.dispatch is not DispatchMethod.all_to_all:
            reason = f"is for dispatch=all_to_all, not {self.dispatch.value}: omit it"
            raise ConfigError("exchange_node_size", size, reason)
        if size < 1 or (size < ranks and ranks % size) or (size < ranks and size % self.etp):
            legal = [d for d in divisors(ranks) if d % self.etp == 0]
            reason = (
                f"must divide ep * etp = {ranks} ranks into nodes that have all etp = {self.etp} slices of an expert"
            )
            raise ConfigError("exchange_node_size", size, reason, legal)

    @property
    def exchange_nodes(self) -> int:
        """Number of nodes among which tokens are exchanged by node; 1: they are sent to ranks directly."""
        return max(1, self.ep * self.etp // self.exchange_node_size) if self.exchange_node_size else 1

    def _check_reductions(self) -> None:
        for key, usual in (("reduce_every", ReduceEvery.micro_batch), ("gather_experts", GatherExperts.each_pass)):
            if getattr(self, key) is usual:
                continue
            if self.engine is EngineKind.deepspeed:
                reason = "configures FSDP2, and DeepSpeed's stage decides: omit it, or set parallel.engine=fsdp2"
                raise ConfigError(key, getattr(self, key), reason, [usual.value])
            if self.reduce_dtype is Reduce.bfloat16:
                reason = "would also sum micro-batches in bfloat16: omit it, or take parallel.reduce_dtype=master"
                raise ConfigError(key, getattr(self, key), reason, [usual.value])

    def _check_schedule(self) -> None:
        schedule, per_rank = self.schedule, self.stages_per_rank
        if self.pp == 1:
            if self.vision.stages is not EncoderStages.first:
                reason = "needs a pipeline: add parallel.pp=2"
                raise ConfigError("vision.stages", self.vision.stages, reason, [EncoderStages.first.value])
            defaults = {"schedule": PipelineSchedule.one_f_one_b, "stages_per_rank": None, "layers_per_stage": None}
            for key, default in defaults.items():
                if getattr(self, key) != default:
                    raise ConfigError(key, getattr(self, key), "there is no pipeline: add parallel.pp=2", [default])
            return
        if per_rank is not None:
            if schedule.is_single and per_rank != 1:
                others = " or ".join(one.name for one in PipelineSchedule if one.in_rounds)
                reason = f"{schedule.name} has one stage per rank; take another parallel.schedule: {others}"
                raise ConfigError("stages_per_rank", per_rank, reason, [1])
            if schedule.is_v and per_rank != 2:
                raise ConfigError("stages_per_rank", per_rank, f"{schedule.name} has two stages per rank", [2])
            if not schedule.is_single and per_rank < 2:
                raise ConfigError("stages_per_rank", per_rank, f"{schedule.name} needs several stages per rank", [2, 4])
        if schedule.is_v and torch_version() < V_SCHEDULES_SINCE:
            need = ".".join(map(str, V_SCHEDULES_SINCE))
            reason = f"needs torch {need} or newer, this is {metadata.version('torch')}"
            raise ConfigError("schedule", schedule, reason, [one.name for one in PipelineSchedule if not one.is_v])
        if schedule.splits_backward and self.compile:
            whole = ", ".join(one.name for one in PipelineSchedule if not one.splits_backward)
            reason = f"compiled layers cannot defer the gradients of their weights, but schedule={schedule.name} does"
            raise ConfigError("compile", True, f"{reason}; take another parallel.schedule: {whole}")

    @property
    def per_rank(self) -> int:
        return self.stages_per_rank or (1 if self.pp == 1 or self.schedule.is_single else 2)

    def resolve(self, world_size: int) -> Layout:
        """Return the layout with `dp_shard` filled in. Raises `ConfigError` if the degrees do not fit the world."""
        others = self.pp * self.dp_replicate * self.cp * self.tp
        if world_size % others:
            named = {key: getattr(self, key) for key in ("pp", "dp_replicate", "cp", "tp") if getattr(self, key) > 1}
            key, value = max(named.items(), key=lambda item: item[1])
            legal = [d for d in divisors(world_size) if world_size % (others // value * d) == 0]
            reason = f"{' * '.join(named)} = {others} must divide the world's {world_size} ranks"
            raise ConfigError(f"parallel.{key}", value, reason, nearest(legal, value))
        shard = world_size // others
        if self.dp_shard not in (AUTO, shard):
            reason = f"times pp * dp_replicate * cp * tp = {others} must equal the world's {world_size} ranks"
            raise ConfigError("parallel.dp_shard", self.dp_shard, reason, [shard, AUTO])
        inside = shard * self.cp * self.tp
        if inside % (self.ep * self.etp):
            key, value = ("ep", self.ep) if self.ep > 1 else ("etp", self.etp)
            other = self.ep * self.etp // value
            reason = f"ep * etp = {self.ep * self.etp} must divide dp_shard * cp * tp = {inside} ranks"
            legal = [d for d in divisors(inside) if inside % (d * other) == 0]
            raise ConfigError(f"parallel.{key}", value, reason, nearest(legal, value))
        return Layout(**{**vars(self), "dp_shard": shard})


@dataclass(frozen=True)
class Layout(ParallelConfig):
    """A `ParallelConfig` whose `dp_shard` is a number: the product of its degrees is the world size."""

    dp_shard: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of groups of ranks that get different sequences of a batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage. 0 under another engine."""
        return self.zero.stage if self.engine is EngineKind.deepspeed else 0

    @property
    def fsdp(self) -> int:
        """Number of ranks over which a dense parameter is sharded."""
        return self.dp_shard * self.cp

    @property
    def encodes_ahead(self) -> bool:
        """Whether all ranks of a pipeline encode tiles, before it runs."""
        return self.vision.stages is EncoderStages.all

    @property
    def efsdp(self) -> int:
        """Number of ranks over which a routed expert is sharded."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.etp)

    @property
    def axes(self) -> dict[str, int]:
        return {key: degree for key in DEGREES if (degree := getattr(self, key)) > 1}

    def stages(self, model: ModelConfig) -> Stages:
        share = 0.0 if self.encodes_ahead else self.vision.image_token_share or 0.0
        return stages(model, self.pp, self.schedule, self.per_rank, self.layers_per_stage, share)

    def check_model(self, model: ModelConfig) -> None:
        """Reject degrees that cannot split this model evenly."""
        self.stages(model)
        if model.vision is None and self.encodes_ahead:
            reason = "the model has no vision encoder"
            raise ConfigError("parallel.vision.stages", self.vision.stages, reason, [EncoderStages.first.value])
        if model.tie_embeddings and self.pp > 1 and self.schedule.is_v:
            others = [one.name for one in PipelineSchedule if not one.is_v]
            reason = "both ends of a V-schedule are on one rank and would gather tied embeddings twice: untie them"
            raise ConfigError("parallel.schedule", self.schedule, f"{reason}, or take another schedule", others)
        heads = model.num_kv_heads // self.tp
        if self.cp > 1 and self.cp_method is ContextMethod.ulysses and heads % self.cp:
            reason = f"must divide the {heads} key/value heads of a rank for cp_method=ulysses; or take another "
            raise self._error("cp", f"{reason}parallel.cp_method: gather or ring", divisors(max(heads, 1)))
        kinds = {layer.feed_forward for layer in model.blocks}
        sizes = {
            "query heads": model.num_heads,
            "key/value heads": model.num_kv_heads,
            "vocabulary": model.vocab_size,
            "dense hidden size": model.dense_hidden_size if FeedForward.dense in kinds else 0,
            "shared expert's hidden size": model.shared_hidden_size if FeedForward.moe in kinds else 0,
        }
        for what, size in sizes.items():
            if size % self.tp:
                raise self._error(
                    "tp", f"must divide the model's {what} of {size}", divisors(math.gcd(*sizes.values()))
                )
        if FeedForward.moe not in kinds:
            for key in ("ep", "etp"):
                if getattr(self, key) > 1:
                    raise self._error(key, "the model has no routed experts", [1])
            return
        if model.num_experts % self.ep:
            raise self._error("ep", f"must divide the model's {model.num_experts} experts", divisors(model.num_experts))
        legal = [d for d in divisors(model.expert_hidden_size) if model.expert_hidden_size // d % 8 == 0]
        if self.etp not in legal:
            reason = f"must split the expert hidden size of {model.expert_hidden_size} into multiples of 8"
            raise self._error("etp", reason, legal)
        if self.dispatch is DispatchMethod.deepep and self.etp > 1:
            raise self._error(
                "etp", "DeepEP sends whole tokens to whole experts; use dispatch=all_to_all with etp", [1]
            )

    def check_batch(self, global_batch_size: int, micro_batch_size: int) -> None:
        """Reject a global batch that the ranks cannot divide evenly, or a rank cannot divide into micro-batches. Reject
        too few micro-batches to fill the pipeline, and a number that its schedule cannot run in equal rounds.
        """
        if global_batch_size % self.dp:
            reason = f"must divide into dp_replicate * dp_shard = {self.dp} equal parts, or change launch.processes"
            legal = nearest([self.dp * n for n in range(1, global_batch_size // self.dp + 2)], global_batch_size)
            raise ConfigError("training.global_batch_size", global_batch_size, reason, legal)
        count = global_batch_size // self.dp
        if count % micro_batch_size:
            legal, reason = nearest(divisors(count), micro_batch_size), f"must divide a rank's {count} sequences"
            raise ConfigError("training.micro_batch_size", micro_batch_size, reason, legal)
        schedule, pp, per_rank = self.schedule, self.pp, self.per_rank
        if pp == 1 or schedule.accepts(count // micro_batch_size, pp, per_rank):
            return
        need = schedule.least_micro_batches(pp, per_rank)
        reason = f"{schedule.name} with pp={pp} needs at least {need} micro-batches"
        reason += ", in rounds of equal number" if schedule.in_rounds else ""
        reason += f", but a rank's {count} sequences make {count // micro_batch_size}"
        legal = [size for size in divisors(count) if schedule.accepts(count // size, pp, per_rank)]
        if not legal:
            more = self.dp * need * micro_batch_size
            raise ConfigError("training.global_batch_size", global_batch_size, reason, [more, 2 * more])
        raise ConfigError("training.micro_batch_size", micro_batch_size, reason, nearest(legal, micro_batch_size))

    def check_seq_len(self, model: ModelConfig, length: int) -> None:
        """Reject a length that cp cannot divide into whole attention chunks, or whose parts tp cannot divide."""
        unit = split_unit(model, length)
        if unit > 1 and length < unit * self.cp:
            reason = f"training.seq_len={length} has only {length // unit} whole chunks of {unit}"
            raise self._error("cp", reason, range(1, length // unit + 1))
        multiple = self.length_multiple(unit)
        if length % multiple == 0:
            return
        legal = sorted({self.padded_length(model, length // multiple * multiple), self.padded_length(model, length)})
        if self.cp == 1:
            reason = f"must divide into tp={self.tp} equal parts of the sequence"
        else:
            reason = f"must divide into cp={self.cp} parts" + (f" of whole chunks of {unit}" if unit > 1 else "")
            reason += f", and each into tp={self.tp}" if self.tp > 1 else ""
        raise ConfigError("training.seq_len", length, reason, [value for value in legal if value])

    def length_multiple(self, unit: int) -> int:
        """Return the number that must divide the length of sequences which are split in units of `unit` tokens."""
        return self.cp * math.lcm(unit, self.tp)

    def padded_length(self, model: ModelConfig, length: int) -> int:
        """Return the smallest length of at least `length` tokens that this layout can divide."""
        while length % (multiple := self.length_multiple(split_unit(model, length))):
            length = -(-length // multiple) * multiple  # the new length may exceed the chunks of more layers
        return length

    def _error(self, key: str, reason: str, legal: Iterable[int]) -> ConfigError:
        value = getattr(self, key)
        return ConfigError(f"parallel.{key}", value, reason, nearest(legal, value))


def split_unit(model: ModelConfig, length: int) -> int:
    """Return the unit in tokens at whose multiples sequences of this length may be split: the least common multiple of
    the layers' chunk sizes, so that no chunk is cut. Chunks as long as the sequence, or longer, do not matter.
    """
    chunks = (layer.attention_chunk_size for layer in model.blocks)
    return math.lcm(*(chunk for chunk in chunks if chunk is not None and chunk < length))


def torch_version() -> tuple[int, int]:
    major, minor = metadata.version("torch").split(".")[:2]
    return int(major), int(minor)


def nearest(legal: Iterable[int], value: int, count: int = 4) -> list[int]:
    """Return the `count` legal values closest to `value`, ascending."""
    return sorted(sorted(legal, key=lambda candidate: (abs(candidate - value), candidate))[:count])
