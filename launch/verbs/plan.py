"""The verb `plan`: find the fastest layouts that fit, or compare the planner with published measurements."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError, check_local
from core.files import check_target, local_path, write_json
from launch.plan.calibration import Calibration, default_calibration, read_calibration
from launch.plan.cluster import ClusterConfig
from launch.plan.search.config import RunShape, SearchConfig
from model.config import ModelConfig
from train.optim.config import OptimizerConfig


@dataclass(frozen=True)
class PlanConfig:
    """Find the fastest layouts of a model on a cluster, without a GPU. With `validate`, compare the planner's
    predictions with a table of published measurements instead.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Only what it keeps in memory matters."""
    seq_len: int = 8192
    """Length of a training sequence in tokens."""
    global_batch_size: int = 2048
    """Sequences per optimizer step, over all ranks."""
    imbalance: float = 1.3
    """Routed tokens of the fullest expert rank over the mean, for which time and memory are planned, if ep > 1. In MoE
    training without balancing per micro-batch, 1.3 to 4 were measured (UltraEP, 2606.04101). 1: perfect balance.
    """
    search: SearchConfig = field(default_factory=SearchConfig)
    best: int = 5
    """Number of layouts to return."""
    out: str | None = "plan"
    """Folder for plan.html, plan.json and the preset of the best layout (parallel/plan.yaml); null: only print."""
    validate: str | None = None
    """CSV file of published runs. Its kind is recognised from its header: see docs/plan.md."""
    report: str | None = None
    """JSON file for the scores of `validate`; null: only print them."""
    calibration: str | None = None
    """JSON file of constants instead of the built-in ones."""

    def __post_init__(self) -> None:
        if self.report is not None:
            check_target("report", self.report, ".json")
        if self.out is not None:
            check_local("out", self.out)
        if not 1 <= self.best <= 100:
            raise ConfigError("best", self.best, "must be from 1 to 100", [5])
        self.run_shape  # noqa: B018 - raises for an impossible batch

    @property
    def run_shape(self) -> RunShape:
        return RunShape(self.seq_len, self.global_batch_size, self.imbalance)


def run(config: PlanConfig) -> int:
    """Print the plans and write them, or the scores of a validation; return 0."""
    if config.calibration is None:
        calibration = default_calibration()
    else:
        calibration = read_calibration(local_path("calibration", config.calibration))
    return _search(config, calibration) if config.validate is None else _validate(config, config.validate, calibration)


def _search(config: PlanConfig, calibration: Calibration) -> int:
    from launch.plan.search.page import write_page
    from launch.plan.search.report import PRESET, SearchReport
    from launch.plan.search.search import LayoutSearch, PlannedRun
    from precision.config import Compute, PrecisionConfig
    from train.optim.config import OptimizerKind

    if config.report is not None:
        raise ConfigError("report", config.report, "is for the scores of validate=FILE.csv; use out=FOLDER")
    folder = None if config.out is None else local_path("out", config.out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError("out", config.out, "is a file; name a folder")
    moments = config.optimizer.moments_dtype(PrecisionConfig(compute=Compute.bfloat16))
    job = PlannedRun(
        config.model, config.cluster, config.run_shape, moments, config.optimizer.kind is OptimizerKind.muon
    )
    search = LayoutSearch(job, config.search, calibration)
    report = SearchReport(job, search(config.best))
    print("\n".join(report.lines()))
    if folder is None:
        return 0
    preset, values = report.write(folder)
    place = shlex.quote(f"hydra.searchpath=[file://{folder.absolute()}]")
    command = f"leviathan train {place} parallel={PRESET} {report.settings(report.plans[0])} model=..."
    page = folder / "plan.html"
    write_page(report, page, search.limit, command)
    print(f"page: {page}\npreset: {preset}\nvalues: {values}\nuse it: {command}")
    return 0


def _validate(config: PlanConfig, table: str, calibration: Calibration) -> int:
    from launch.plan.validate import summary, validate

    content = validate(local_path("validate", table), calibration)
    print(summary(content))
    if config.report is not None:
        path: Path = local_path("report", config.report)
        write_json(path, content)
        print(f"report: {path}")
    return 0
