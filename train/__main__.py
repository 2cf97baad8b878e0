"""One rank of a training run: `python -m train OVERRIDES`, or under torchrun `-m train OVERRIDES`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(overrides: list[str]) -> int:
    """Train under Hydra overrides; returns the exit code. Errors are one line, told once."""
    from core.errors import LeviathanError
    from core.origin import check_packages, drop_working_directory
    from core.threads import share_cores

    drop_working_directory()
    share_cores()
    try:
        check_packages()
        from core.config import load
        from train.config import TrainConfig
        from train.trainer import run

        return run(load("train", TrainConfig, overrides))
    except LeviathanError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.everywhere:
            print(f"leviathan: error: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parent.parent:
        del sys.path[0]  # `-m` puts the current folder first, and it may hold a `core/` of the user's own
    sys.exit(main(sys.argv[1:]))
