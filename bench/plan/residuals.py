"""Write the errors behind the planner's error bars: python -m bench.plan.residuals FOLDER (of the published tables).

Only rows of sources that no constant was fitted to count, of end-to-end runs and of SimuMax's table. A row is stored
as what it ran on and the logarithms of measured over predicted step time and peak memory.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from bench.plan.table import is_fitted
from core.files import write_json
from launch.plan.calibration import default_calibration
from launch.plan.readers import open_table
from launch.plan.search.uncertainty import FILE, Residual
from launch.plan.validate import Prediction, predict_all

FILES = ("runs", "simumax_b200")


def residual(one: Prediction) -> Residual:
    """Return what is stored of a row."""
    job, row = one.row.job, one.row
    return Residual(
        job.gpu.generation.value,
        job.gpu.name,
        job.shapes.experts is not None,
        job.precision.is_quantised,
        job.axes.ranks,
        job.shapes.total_parameters(),
        round(math.log(row.step_s / one.step_s), 4) if row.step_s else None,
        round(math.log(row.memory_bytes / one.memory_bytes), 4) if row.memory_bytes else None,
    )


def main(folder: Path) -> None:
    found = []
    for name in FILES:
        predictions = predict_all(open_table(folder / f"{name}.csv"), default_calibration())
        found += [residual(one) for one in predictions if not is_fitted(name, one.row)]
    write_json(FILE, {"rows": [list(vars(one).values()) for one in found]})
    print(f"{FILE}: {len(found)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
