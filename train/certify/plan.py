"""Certify that a layout computes the same as one process, parameter by parameter, up to rounding.

A shrunk copy of the configured model runs in one process and under several layouts: each axis in use alone at degree 2,
each pair of axes, all axes, and the configured degrees if they are small enough. In float64 a difference above 1e-9 is
a bug, not rounding. One case runs plain SGD without clipping, which shows an error in the scale of the gradients that
AdamW would hide. Another runs AdamW, or Muon if it is configured, with clipping.

DeepSpeed's master weights are at most fp32, so its layouts are compared in float32. To check that it sums the gradients
of bf16 models in fp32, a bf16 model is run under the same layout by FSDP2 too, which rounds at the same points.

Last, a run is recorded under each layout, to find races between streams, deadlocks and late gathers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from core.config import plain
from core.errors import ConfigError, LeviathanError
from core.exit_codes import RankFailure
from model.config import (
    AuxScope,
    BalanceConfig,
    FeedForward,
    InitPartsConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    RouterConfig,
)
from model.roles import Role, check_freeze, roles_of
from model.tensor_source import parameter_infos
from model.vision.config import VisionConfig
from parallel import expert_parallel
from parallel.deepspeed import zero12
from parallel.deepspeed.config import Offload, ZeroConfig
from parallel.layout import AUTO, DEGREES, ContextMethod, EngineKind, ParallelConfig, Reduce
from parallel.pipeline.stages import PipelineSchedule, stages
from parallel.vision.config import EncoderStages, VisionParallelConfig
from precision.config import Compute, PrecisionConfig
from train.certify import fp8
from train.certify.compare import Comparison, compare, compare_resumed, join_blocks
from train.certify.config import CertifyConfig
from train.certify.issued import issued_faults
from train.certify.worker import BATCH_SIZE, SEQ_LEN, CertifyCase, RankResults, RunOnRanks, micro_batch_size, run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

_TERMS = BalanceConfig(bias_rate=0.01, aux=0.01, z=0.001)


@dataclass(frozen=True)
class Trial:
    """A layout to certify: the axes that it tests, the layout itself and its number of ranks."""

    axes: tuple[str, ...]
    parallel: ParallelConfig
    ranks: int

    @property
    def name(self) -> str:
        degrees = self.parallel.resolve(self.ranks).axes
        return " ".join(f"{axis}={degree}" for axis, degree in degrees.items())

    def check(self, model: ModelConfig) -> None:
        """Raise `ConfigError` if the shrunk model or the synthetic batch cannot be divided this way."""
        layout = self.parallel.resolve(self.ranks)
        layout.check_model(model)
        layout.check_batch(BATCH_SIZE, micro_batch_size(layout))
        layout.check_seq_len(model, SEQ_LEN)


@dataclass(frozen=True)
class TrialOutcome:
    trial: Trial
    comparisons: list[Comparison]
    error: str | None = None
    faults: Mapping[str, list[str]] = field(default_factory=dict)
    """What the ranks issued wrongly, by check: see `train.certify.issued`. Empty if a comparison failed."""

    @property
    def passed(self) -> bool:
        compared = self.error is None and bool(self.comparisons) and all(c.passed for c in self.comparisons)
        return compared and not any(self.faults.values())

    def largest(self, gate: float) -> float:
        """Return the largest difference among the comparisons whose tolerance is `gate`."""
        return max((c.largest for c in self.comparisons if c.gate == gate), default=float("nan"))

    def failures(self) -> list[str]:
        if self.error is not None:
            return [self.error]
        failed = [c for c in self.comparisons if not c.passed]
        where = [f", most in {c.parameter}, first in {c.first}" if c.parameter else "" for c in failed]
        differ = [f"{c.name} differs by {c.largest:.1e}{place}" for c, place in zip(failed, where, strict=True)]
        return [*differ, *(f"{check}: {fault}" for check, some in self.faults.items() for fault in some)]


def certify(config: CertifyConfig, ranks: RunOnRanks) -> Iterator[TrialOutcome]:
    """Run the trials one by one and compare each with one process. Small sets of axes come first, so that the first
    failure names the fewest axes. Raises `ConfigError` before anything runs if a trial is impossible.
    """
    check_freeze(config.freeze, {info.role for info in parameter_infos(config.model).values()})
    chosen, _ = trials(config)
    model, optimizer = shrink(config.model, config.parallel), config.optimizer
    if config.parallel.engine is EngineKind.deepspeed and config.precision.uses_float8:
        reason = "FP8 is certified in float64, which DeepSpeed does not support; set parallel.engine=fsdp2 to certify"
        raise ConfigError("precision.backend", config.precision.backend, reason)
    for trial in chosen:
        muon = optimizer.kind is OptimizerKind.muon
        zero12.check(trial.parallel.resolve(trial.ranks), torch.float32, torch.float32, muon, model.has_experts)
    outcomes = compare_layouts(model, chosen, config.steps, ranks, optimizer, roles_of(config.freeze))
    if not config.precision.uses_float8:
        return outcomes
    wide = shrink(config.model, config.parallel, fp8.TILE)
    return (_with_fp8(outcome, wide, config, ranks) for outcome in outcomes)


def compare_layouts(
    model: ModelConfig,
    layouts: Sequence[Trial],
    steps: int,
    ranks: RunOnRanks,
    optimizer: OptimizerConfig | None = None,
    frozen: frozenset[Role] = frozenset(),
) -> Iterator[TrialOutcome]:
    """Compare each layout with one process. `optimizer`: AdamW if None."""
    learning = _learning(optimizer or OptimizerConfig())
    narrow = any(trial.parallel.engine is EngineKind.deepspeed for trial in layouts)
    compute = Compute.float32 if narrow else Compute.float64
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        try:
            cases = _cases(model, learning, steps, one, None, compute, frozen)
            (wanted,) = ranks(1, run_cases, ParallelConfig(), cases)
        except RankFailure as error:
            raise LeviathanError(f"the run in one process failed, so nothing can be compared:\n{error}") from None
        for trial in layouts:
            own = Path(tempfile.mkdtemp(dir=folder))  # a unique folder, because two trials may have the same axes
            yield _try(trial, _cases(model, learning, steps, own, one, compute, frozen), own, wanted, ranks)


def _with_fp8(outcome: TrialOutcome, model: ModelConfig, config: CertifyConfig, ranks: RunOnRanks) -> TrialOutcome:
    trial, frozen = outcome.trial, roles_of(config.freeze)
    try:
        more = list(fp8.compare_fp8(model, config.precision, trial.parallel, trial.ranks, ranks, frozen))
    except RankFailure as error:
        return replace(outcome, error=outcome.error or _raised(error))
    return replace(outcome, comparisons=[*outcome.comparisons, *more])


def _raised(error: RankFailure) -> str:
    return f"a rank raised: {str(error).strip().splitlines()[-1]}"


def _try(
    trial: Trial, cases: dict[str, CertifyCase], own: Path, wanted: dict[str, RankResults], ranks: RunOnRanks
) -> TrialOutcome:
    """Run a trial that saves a checkpoint to `own`, resume it in one process, and compare all results with `wanted`."""
    try:
        found: list[dict[str, RankResults]] = ranks(trial.ranks, run_cases, trial.parallel, cases)
        alone = replace(cases["resumed"], resume=own)
        (resharded,) = ranks(1, run_cases, ParallelConfig(), {"resharded": alone})
    except RankFailure as error:
        return TrialOutcome(trial, [], _raised(error))
    comparisons: list[Comparison] = []
    for name, reference in wanted.items():
        comparisons += compare(name, reference, [rank[name] for rank in found], cases[name])
    final = wanted[cases["resumed"].optimizer.kind.name]
    resumed = [rank["resumed"] for rank in found]
    comparisons += compare_resumed("one process's checkpoint under the layout", final, resumed, alone)
    comparisons += compare_resumed("the layout's checkpoint in one process", final, [resharded["resharded"]], alone)
    if trial.parallel.engine is EngineKind.deepspeed:
        comparisons += _in_bfloat16(trial, cases["sgd"], ranks)
    if not all(one.passed for one in comparisons):
        return TrialOutcome(trial, comparisons)
    try:
        return TrialOutcome(trial, comparisons, faults=issued_faults(trial.parallel, cases["sgd"], trial.ranks, ranks))
    except RankFailure as error:
        return TrialOutcome(trial, comparisons, _raised(error))


def _in_bfloat16(trial: Trial, case: CertifyCase, ranks: RunOnRanks) -> Iterator[Comparison]:
    """Compare both engines on one step of a bf16 model, with gradients summed over many micro-batches."""
    cases = {"bfloat16": replace(case, precision=PrecisionConfig(Compute.bfloat16), steps=1)}
    fsdp2 = replace(trial.parallel, engine=EngineKind.fsdp2, zero=ZeroConfig())
    wanted, found = ([o["bfloat16"] for o in ranks(trial.ranks, run_cases, p, cases)] for p in (fsdp2, trial.parallel))
    gradients, weights = (join_blocks(getattr(f, name) for f in wanted) for name in ("gradients", "weights"))
    reference = replace(wanted[0], gradients=gradients, weights=weights)
    return compare("bfloat16", reference, found, cases["bfloat16"])


def _learning(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Return the optimizer of the cases with clipping, without bf16 and with a learning rate for a tiny model."""
    if optimizer.kind is not OptimizerKind.muon:
        return OptimizerConfig(lr=1e-2)
    muon = replace(optimizer.muon, lr=None, products=None)
    return OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2, muon=muon)


def _cases(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    steps: int,
    save: Path,
    resume: Path | None,
    compute: Compute = Compute.float64,
    frozen: frozenset[Role] = frozenset(),
) -> dict[str, CertifyCase]:
    """Return the runs to compare, by name. The run `resumed` is one of them only if `resume` names a checkpoint."""
    sgd = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)
    whole = replace(model, balance=replace(_TERMS, aux_scope=AuxScope.whole))
    base = CertifyCase(replace(model, balance=_TERMS), PrecisionConfig(compute), sgd, frozen=frozen)
    learning = replace(base, model=whole, optimizer=optimizer, clip_norm=0.05, steps=steps)
    cases = {"sgd": replace(base, steps=steps), optimizer.kind.name: replace(learning, save=save)}
    if compute is Compute.float64:
        cases["float32"] = replace(base, precision=PrecisionConfig(Compute.float32))
    if any(layer.feed_forward is FeedForward.moe for layer in model.blocks):
        for term, balance in (("aux", BalanceConfig(aux=1.0)), ("z", BalanceConfig(z=1.0))):
            cases[f"{term} loss alone"] = replace(base, model=replace(model, balance=balance), labels=False)
        cases["experts without tokens"] = replace(base, starve=True)
    if resume is not None:
        cases["resumed"] = replace(learning, resume=resume)
    return cases


def trials(config: CertifyConfig) -> tuple[list[Trial], list[str]]:
    """Return the layouts to certify: each axis in use at degree 2, each pair of axes, all axes, and the configured
    degrees. Return also each omitted layout with the reason. Raises `ConfigError` if an axis or a pair is impossible.
    """
    parallel = replace(config.parallel, reduce_dtype=Reduce.master)  # rounding to bfloat16 would hide other differences
    parallel = replace(parallel, zero=replace(parallel.zero, offload=Offload.none, nvme=None))  # nvme allows only AdamW
    expert_parallel.check(parallel.dispatch)
    used, model = axes_in_use(parallel), shrink(config.model, parallel)
    trial = partial(_trial, parallel=parallel, model=model)
    needed = [trial(axes, dict.fromkeys(axes, 2)) for count in (1, 2) for axes in combinations(used, count)]
    largest = max(needed, key=lambda one: one.ranks)
    if largest.ranks > config.ranks:
        reason = f"{' with '.join(largest.axes)} takes {largest.ranks} processes"
        raise ConfigError("ranks", config.ranks, reason, [largest.ranks])
    if parallel.pp > 1:  # check the configured stages of the configured model as well
        stages(config.model, parallel.pp, parallel.schedule, parallel.per_rank, parallel.layers_per_stage)
    for one in needed:
        one.check(model)
    degrees = {axis: 2 if getattr(parallel, axis) == AUTO else getattr(parallel, axis) for axis in used}
    chosen, omitted = {one.name: one for one in needed}, {}
    for one in (trial(used, dict.fromkeys(used, 2)), trial(used, degrees)):
        if one.name in chosen:
            continue
        try:
            if one.ranks > config.ranks:
                raise LeviathanError(f"takes {one.ranks} processes")
            one.check(model)
            chosen[one.name] = one
        except LeviathanError as error:
            omitted[one.name] = str(error)
    return list(chosen.values()), [f"{name}: {reason}" for name, reason in omitted.items()]


def axes_in_use(parallel: ParallelConfig) -> tuple[str, ...]:
    """Return the axes with a degree above 1, and dp_shard if it is "auto". Without any, return dp_shard."""
    used = [axis for axis in DEGREES if getattr(parallel, axis) not in (1, AUTO)]
    if parallel.dp_shard == AUTO:
        used.insert(0, "dp_shard")
    return tuple(used) or ("dp_shard",)


def _trial(axes: tuple[str, ...], degrees: Mapping[str, int], parallel: ParallelConfig, model: ModelConfig) -> Trial:
    """Return the smallest layout with these degrees. Experts use dp_shard * cp * tp ranks, so dp_shard grows until ep *
    etp divides that number. If dp_shard is in `axes`, it grows until the parameters of experts are sharded too. An
    uneven split into stages becomes one layer in each stage but the last.
    """
    wanted = {axis: degrees.get(axis, 1) for axis in DEGREES}
    experts = wanted["ep"] * wanted["etp"]
    least = min(2, degrees["dp_shard"]) if "dp_shard" in axes else 1
    while (spread := wanted["dp_shard"] * wanted["cp"] * wanted["tp"]) % experts or spread // experts < least:
        wanted["dp_shard"] += 1
    changed: dict[str, Any] = {**wanted, "layers_per_stage": None}
    count = wanted["pp"] * parallel.per_rank
    if wanted["pp"] == 1:
        changed |= {"schedule": PipelineSchedule.one_f_one_b, "stages_per_rank": None}
        changed["vision"] = replace(parallel.vision, stages=EncoderStages.first)
    elif parallel.layers_per_stage is not None and count <= model.num_layers:
        changed["layers_per_stage"] = [1] * (count - 1) + [model.num_layers - count + 1]
    return Trial(axes, replace(parallel, **changed), wanted["pp"] * wanted["dp_replicate"] * spread)


def shrink(model: ModelConfig, parallel: ParallelConfig | None = None, side: int = 8) -> ModelConfig:
    """Return a tiny model with every kind of layer and every option of the configured model. A degree of
    `parallel` that divides a size also divides the tiny model's; the parts of hidden sizes are multiples of `side`.
    """
    kinds: list[LayerConfig] = []
    for layer in model.blocks:
        small = replace(layer, attention_chunk_size=None if layer.attention_chunk_size is None else 16)
        if small not in kinds:
            kinds.append(small)
    degrees = parallel or ParallelConfig()
    least = max(2, degrees.pp) * degrees.per_rank if degrees.pp > 1 else 1
    least += degrees.layers_per_stage is not None  # one more layer, for an uneven split
    kinds += [kinds[index % len(kinds)] for index in range(len(kinds), least)]
    over = degrees.tp * (degrees.cp if degrees.cp_method is ContextMethod.ulysses else 1)
    num_kv_heads = math.lcm(4, over) if model.num_kv_heads % over == 0 else 4
    return replace(
        model,
        vocab_size=math.lcm(64, degrees.tp),
        hidden_size=4 * side,
        num_layers=len(kinds),
        layer_list=kinds,
        num_heads=num_kv_heads * (1 if model.num_kv_heads == model.num_heads else 2),
        num_kv_heads=num_kv_heads,
        head_dim=side,
        latent=None if model.latent is None else _small_latent(model.latent, side),
        dense_hidden_size=math.lcm(6 * side, side * degrees.tp),
        expert_hidden_size=math.lcm(4 * side, side * degrees.etp),
        shared_expert_hidden_size=math.lcm(2 * side, side * degrees.tp) if model.shared_hidden_size else 0,
        num_experts=math.lcm(8, degrees.ep) if model.num_experts % degrees.ep == 0 else 8,
        attention_chunk_size=None if model.attention_chunk_size is None else 16,
        temperature_floor=16,
        vision=None if model.vision is None else _small_encoder(model.vision, math.lcm(64, degrees.tp) - 1),
        router=_small_router(model.router),
        init_from=None,
        init_parts=InitPartsConfig(),
        upcycle=None,
    )


def _small_router(router: RouterConfig) -> RouterConfig:
    """Return the router for at least 8 experts."""
    groups, top_groups = (4, 2) if router.groups > 1 else (1, 1)
    top_k = min(router.top_k, 4)
    return replace(router, top_k=top_k, groups=groups, top_groups=top_groups, force_balanced=False)


def _small_latent(latent: LatentConfig, side: int) -> LatentConfig:
    query_rank = None if latent.query_rank is None else 3 * side
    return LatentConfig(kv_rank=2 * side, query_rank=query_rank, rope_dim=side // 4 * 2, value_dim=side // 2)


def _small_encoder(vision: VisionConfig, image_token_id: int) -> VisionConfig:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden_size": 24, "adapter_hidden_size": 20}
    return replace(vision, **sizes, tile_size=8, patch_size=2, image_token_id=image_token_id)


def techniques(
    parallel: ParallelConfig,
    kind: OptimizerKind = OptimizerKind.adamw,
    precision: PrecisionConfig | None = None,
    freeze: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the settings, besides axes and model, that a certificate covers."""
    keys = ["dispatch", "cp_method", "recompute", "compile", "schedule", "stages_per_rank", "engine", "reduce_every"]
    found = {key: plain(getattr(parallel, key)) for key in [*keys, "gather_experts"]}
    if parallel.engine is EngineKind.deepspeed:  # offloading is tested separately
        found["zero"] = plain(replace(parallel.zero, nvme=None, offload=Offload.none))
    spread = replace(parallel.vision, image_token_share=None)
    if spread != VisionParallelConfig():
        found["vision"] = plain(spread)
    if parallel.exchange_node_size is not None:
        found["exchange_node_size"] = parallel.exchange_node_size
    if freeze:
        found["frozen"] = sorted(role.name for role in roles_of(freeze))
    float8 = fp8.describe(precision) if precision and precision.uses_float8 else None
    return {**found, "muon": kind is OptimizerKind.muon, "float8": float8}


def certificate(config: CertifyConfig, outcomes: Sequence[TrialOutcome], identity: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of certificate.json. `identity`: the versions of the code and of torch."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    return {
        "pass": bool(outcomes) and not failed,
        **identity,
        "axes": list(axes_in_use(config.parallel)),
        "omitted": trials(config)[1],
        "techniques": techniques(config.parallel, config.optimizer.kind, config.precision, config.freeze),
        "smallest_failing_axes": list(failed[0].trial.axes) if failed else None,
        "first_failure": failed[0].failures()[0] if failed else None,
        "model": plain(shrink(config.model, config.parallel)),
        "layouts": [
            {
                "layout": outcome.trial.name,
                "axes": list(outcome.trial.axes),
                "ranks": outcome.trial.ranks,
                "pass": outcome.passed,
                "error": outcome.error,
                "comparisons": [{**vars(c), "pass": c.passed} for c in outcome.comparisons],
                "faults": dict(outcome.faults),
            }
            for outcome in outcomes
        ],
    }
