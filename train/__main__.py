"""Run one rank of a training run: `python -m train OVERRIDES`, or `torchrun ... -m train OVERRIDES`.

With `--config FILE` in place of overrides, read a complete, resolved configuration from FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Train and return the exit code."""
    from core.config import load
    from train.config import TrainConfig
    from train.run_directory import read_config
    from train.trainer import run

    resolved = arguments[:1] == ["--config"]
    return run(read_config(Path(arguments[1])) if resolved else load("train", TrainConfig, arguments))


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parent.parent:
        del sys.path[0]  # `-m` puts the current folder first on the path, and it may contain another `core/`
    from core.process import end_process, run_process

    end_process(run_process(main))
