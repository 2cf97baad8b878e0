"""One rank of a training run: `python -m train OVERRIDES`, or under torchrun `-m train OVERRIDES`.

`--config FILE` instead of overrides: the whole configuration, as resolved when the run was submitted.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Train; return the exit code. An expected error prints one line, once if all ranks raise it."""
    from core.errors import LeviathanError
    from core.exit_codes import CRASHED, INTERRUPTED, is_consequence
    from core.openmp import share_cores
    from core.package_guard import check_packages, drop_working_directory

    drop_working_directory()
    share_cores()
    try:
        check_packages()
        from core.config import load
        from train.config import TrainConfig
        from train.run_directory import read_config
        from train.trainer import run

        submitted = arguments[:1] == ["--config"]
        return run(read_config(Path(arguments[1])) if submitted else load("train", TrainConfig, arguments))
    except LeviathanError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.everywhere:
            print(f"leviathan: error: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if is_consequence(str(error)):
            print(f"rank {os.environ.get('RANK')} lost another rank: {str(error).splitlines()[-1]}", file=sys.stderr)
        else:
            traceback.print_exc()
        return CRASHED if "TORCHELASTIC_RUN_ID" in os.environ else 1


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parent.parent:
        del sys.path[0]  # `-m` puts the current folder first, and it may hold a `core/` of the user's own
    sys.exit(main(sys.argv[1:]))
