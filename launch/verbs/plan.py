"""The verb `plan`: predict memory and step time, and compare the predictions with published measurements."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.files import check_target, local_path, write_json


@dataclass(frozen=True)
class PlanConfig:
    """Compare the planner's predictions with a table of published measurements."""

    validate: str | None = None
    """CSV file of published runs. Its kind is recognised from its header: see docs/plan.md."""
    report: str | None = None
    """JSON file for the scores; null: only print them."""
    calibration: str | None = None
    """JSON file of constants instead of the built-in ones."""

    def __post_init__(self) -> None:
        if self.report is not None:
            check_target("report", self.report, ".json")


def run(config: PlanConfig) -> int:
    """Print the scores and write the report."""
    from launch.plan.calibration import default_calibration, read_calibration
    from launch.plan.validate import summary, validate

    if config.validate is None:
        raise ConfigError("validate", None, "name a table of published measurements: leviathan plan validate=FILE.csv")
    if config.calibration is None:
        calibration = default_calibration()
    else:
        calibration = read_calibration(local_path("calibration", config.calibration))
    content = validate(local_path("validate", config.validate), calibration)
    print(summary(content))
    if config.report is not None:
        path = local_path("report", config.report)
        write_json(path, content)
        print(f"report: {path}")
    return 0
