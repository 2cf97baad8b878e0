"""The verb `filter`: drop easy, broken and repeated records from a file or data set, with an audit.

With several processes: `leviathan filter processes=N ...`, or `torchrun ... -m launch.verbs.filter OVERRIDES`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from core.config import load
from core.files import local_path
from launch.filter.config import FilterAction, FilterConfig


def run(config: FilterConfig) -> int:
    """Filter, explain, stream or ablate as configured; return the exit code."""
    out = local_path("out", config.out)
    if config.explain is not None or config.step is not None:
        from data.filter.explain import explain
        from train.provenance import explain_run, explain_step

        if config.explain is None:
            print(explain_step(Path(str(config.run)), int(config.step or 0)))
        else:
            print(explain(out, config.explain) if config.run is None else explain_run(Path(config.run), config.explain))
        return 0
    if config.action is FilterAction.ablate:
        from launch.filter.ablate import ablate

        return ablate(config.ablate, config.rules(), out)
    from launch.filter.run import run_filter, run_processes, run_stream

    if config.action is FilterAction.stream:
        return run_stream(config, out)
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        return run_processes(config, out)
    return run_filter(config, out)


def main(arguments: list[str]) -> int:
    """Run the filter in one of the processes that torchrun started."""
    return run(load("filter", FilterConfig, arguments))


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parents[2]:
        del sys.path[0]
    from core.process import end_process, run_process

    end_process(run_process(main))
