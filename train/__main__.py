"""One rank of a training run: `python -m train OVERRIDES`, or under torchrun `-m train OVERRIDES`."""

from __future__ import annotations

import os
import sys


def main(overrides: list[str]) -> int:
    """Train under Hydra overrides; returns the exit code. Errors are one line, told by rank 0."""
    from core.origin import check_packages, drop_working_directory

    drop_working_directory()
    from core.errors import LeviathanError

    try:
        check_packages()
        from core.config import load
        from train.config import TrainConfig
        from train.trainer import run

        return run(load("train", TrainConfig, overrides))
    except LeviathanError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"leviathan: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
