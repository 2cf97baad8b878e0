"""The verb `dryrun`: run one step as any rank of a large job, on meta tensors, and report bytes and collectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from core.config import load
from core.errors import ConfigError, check_numbers
from core.files import check_target, local_path, write_json
from train.config import TrainConfig, check

if TYPE_CHECKING:
    from parallel.layout import Layout
    from train.dryrun.walk import RankWalk


@dataclass(frozen=True)
class DryrunConfig:
    """Run one step as one rank of a job, without GPUs and without other ranks. Other keys are those of `leviathan
    train`: they describe the job.
    """

    world_size: int = 1
    """Number of ranks of the job."""
    rank: int = 0
    """The rank to run as, from 0."""
    ranks: list[int] = field(default_factory=list)
    """Ranks to run as instead of `rank`, one after the other. Their collectives are checked against each other."""
    all: bool = False
    """Run as one rank of each kind, one after the other: the first of each pipeline stage, those of the first group of
    experts, and the last.
    """
    imbalance: float = 1.0
    """Tokens that the experts of this rank get, relative to the mean over all experts."""
    tiles: int = 0
    """Image tiles in each sequence, for models with a vision encoder."""
    gpu: str | None = None
    """Name of a GPU, such as H100. If the peak exceeds its memory, the exit code is 1."""
    out: str | None = None
    """JSON file for the results, with every collective in order; null: only print a summary."""
    train: list[str] = field(default_factory=lambda: ["experiment=smoke"])
    """Overrides of `leviathan train`; keys that `dryrun` does not have are collected here."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("world_size", "imbalance"), not_negative=("tiles",))
        for key, ranks in (("rank", [self.rank]), ("ranks", self.ranks)):
            if ranks and not 0 <= min(ranks) <= max(ranks) < self.world_size:
                reason = f"ranks are 0 to {self.world_size - 1} (world_size)"
                raise ConfigError(key, ranks[0] if key == "rank" else ranks, reason)
        if self.out is not None:
            check_target("out", self.out, ".json")


def run(config: DryrunConfig) -> int:
    """Walk the ranks and print what they do. Returns 1 if a check fails, or if a rank does not fit into `gpu`."""
    from launch.plan.cluster import find_gpu
    from train.dryrun import report
    from train.metap import hyperparameters

    job = _without_corpus(hyperparameters.resolve(load("train", TrainConfig, config.train)))
    layout = check(job, config.world_size)
    gpu = None if config.gpu is None else find_gpu(config.gpu)
    walks, too_large = [], []
    for walk in _walks(config, job, layout):
        walks.append(walk)
        print("\n".join(report.rank_lines(walk)), flush=True)
        if gpu is not None and (need := walk.step.peak.bytes / report.GIB) > gpu.memory_gib:
            too_large.append(walk.rank)
            print(f"  does not fit: {need:,.1f} GiB at the peak, and {gpu.name} has {gpu.memory_gib:g} GiB")
    found = report.faults(walks)
    print("\n".join(report.fault_lines(found, len(walks))))
    if config.out is not None:
        content = {"world_size": config.world_size, "layout": layout.axes, "imbalance": config.imbalance, **found}
        path = local_path("out", config.out)
        write_json(path, {**content, "ranks": [report.plain_walk(walk) for walk in walks]})
        print(f"report: {path}")
    return int(bool(too_large or any(found.values())))


def _walks(config: DryrunConfig, job: TrainConfig, layout: Layout) -> Iterator[RankWalk]:
    from train.dryrun.report import ranks_of_each_kind
    from train.dryrun.walk import Assumptions, check_walk, walk

    given = Assumptions(config.imbalance, config.tiles)
    check_walk(job, layout, given)
    chosen = sorted(set(config.ranks)) or [config.rank]
    for rank in ranks_of_each_kind(layout) if config.all else chosen:
        yield walk(job, layout, rank, given)


def _without_corpus(job: TrainConfig) -> TrainConfig:
    """Return the configuration with a corpus that nobody reads: its vocabulary need not suit the model."""
    return job if job.data.tokens is not None else replace(job, data=replace(job.data, tokens=".", filter=None))
