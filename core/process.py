"""Run the main function of a process: set up the import path and threads, and turn exceptions into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from core.errors import LeviathanError
from core.exit_codes import CRASHED, INTERRUPTED, is_consequence
from core.openmp import share_cores
from core.package_guard import check_packages, drop_working_directory


def run_process(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command-line arguments and return the process's exit code.

    A `LeviathanError` prints one line on stderr, and its exit code is returned. If all ranks raise the same error,
    only rank 0 prints it. Any other exception prints a traceback; under torchrun's agent the exit code is CRASHED, so
    that the agent restarts the ranks.
    """
    has_agent = "TORCHELASTIC_RUN_ID" in os.environ
    drop_working_directory()
    share_cores()
    try:
        check_packages()
        code = main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except LeviathanError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        if "RANK" not in os.environ:
            print("leviathan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not has_agent:  # `leviathan ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        elif lost := _consequence(error):
            print(f"rank {os.environ.get('RANK')} lost another rank: {lost.splitlines()[-1]}", file=sys.stderr)
        else:
            traceback.print_exc()
        return CRASHED if has_agent else 1


def _consequence(error: BaseException | None) -> str | None:
    """Return the message of the first error in the chain that only says that another rank is gone, if there is one."""
    while error is not None and not is_consequence(str(error)):
        error = error.__cause__ or error.__context__  # pipelines wrap the errors of a stage
    return None if error is None else str(error)


def report(error: LeviathanError, where: str = "") -> None:
    """Print one line about an expected error. `where`: the run or machine that the line names first."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not error.everywhere:
        prefix = "".join(f"{part}: " for part in (where, "" if rank == "0" else f"rank {rank}") if part)
        print(f"leviathan: error: {prefix}{error}", file=sys.stderr, flush=True)
