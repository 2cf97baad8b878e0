"""Run the main function of a process: set up the import path and threads, and turn exceptions into one line each.

What can be foreseen ends with one line that says what to change. Anything else ends with one line that names a file
with the traceback.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from core.errors import LeviathanError, one_line
from core.exit_codes import CRASHED, FAILED, INTERRUPTED, has_agent, is_consequence, is_rank, parent_watch
from core.library_settings import set_for_libraries
from core.package_guard import check_packages, drop_working_directory

TRACEBACKS = "LEVIATHAN_TRACEBACKS"
"""Environment variable: the folder for tracebacks of internal errors. Default: ~/.cache/leviathan/tracebacks."""

ORPHANED_S = 5.0
"""Seconds that a process may live on after its parent."""

_ADVICE = {
    errno.ENOSPC: "no space is left on the disk; free some, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space, or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission denied; change its permissions, or choose another path",
    errno.EPERM: "not permitted; change its permissions, or choose another path",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "is a folder, but must be a file",
    errno.ENOTDIR: "a part of this path is a file, but must be a folder",
    errno.EEXIST: "exists already",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.EIO: "input/output error; check the disk",
    errno.ESTALE: "the network file system no longer knows this file",
    errno.ENXIO: "is a pipe that nobody reads, or a device that is not there; choose another path",
    errno.ENOTEMPTY: "the folder is not empty",
}


def run_process(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command-line arguments and return the process's exit code.

    A `LeviathanError` prints one line on stderr, and its exit code is returned. Where all ranks raise the same error,
    rank 0 alone prints it. Under torchrun's agent the exit code of any other exception is CRASHED, so that the agent
    restarts the ranks.
    """
    # c10d logs each try to reach a store as a warning with a stack trace; the errors that follow are reported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _open_streams()
    try:
        drop_working_directory()
        set_for_libraries()
        check_packages()
        code = main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except LeviathanError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        if not is_rank():
            print("leviathan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not has_agent():  # `leviathan ... | head`
            _discard_output()
        elif lost := _consequence(error):
            print(f"rank {os.environ.get('RANK')} lost another rank: {lost.splitlines()[-1]}", file=sys.stderr)
        else:
            line = LeviathanError(explained(error) or _internal(error))
            line.everywhere = getattr(error, "everywhere", False)
            report(line)
        return CRASHED if has_agent() else FAILED


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, and one of several ranks without Python's finalisation.

    A thread of gloo that frees a tensor while Python finalises aborts the process: pytorch/pytorch#190489.
    """
    if is_rank():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed or full stream
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def ending_with_parent(parent_is_ours: bool = True) -> Iterator[None]:
    """In the block, end this process a few seconds after its parent, even if SIGKILL ended that.

    The seconds let a process that notices by itself end in order. `parent_is_ours` False: do nothing, because a user's
    shell may end before its background jobs. The parent of a process of `multiprocessing` is the one that asked for it:
    a fork server lives as long as its children.
    """
    from multiprocessing import parent_process

    if not parent_is_ours:
        yield
        return
    asked, has_ended, done = parent_process(), parent_watch(), threading.Event()

    def watch() -> None:
        while not has_ended() if asked is None else asked.is_alive():
            if done.wait(1.0):
                return
        if not done.wait(ORPHANED_S):
            os._exit(CRASHED)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def told_after(seconds: float, line: str) -> Iterator[None]:
    """Print `line` on stderr if the block takes longer than this."""
    timer = threading.Timer(seconds, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def told_every(seconds: float, line: Callable[[], str]) -> Iterator[None]:
    """Print what `line` returns on stderr at every interval of this length until the block ends."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(seconds):
            print(line(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _consequence(error: BaseException | None) -> str | None:
    """Return the message of the first error in the chain that only says that another rank is gone, if there is one."""
    while error is not None and not is_consequence(str(error)):
        error = error.__cause__ or error.__context__  # pipelines wrap the errors of a stage
    return None if error is None else str(error)


def report(error: LeviathanError, where: str = "") -> None:
    """Print one line about an expected error. `where`: the run or machine that the line names first."""
    rank = os.environ["RANK"] if is_rank() else "0"
    if rank == "0" or not error.everywhere:
        prefix = "".join(f"{part}: " for part in (where, "" if rank == "0" else f"rank {rank}") if part)
        print(f"leviathan: error: {prefix}{error}", file=sys.stderr, flush=True)


def explained(error: BaseException) -> str | None:
    """Return one line about an error of the operating system or a lack of memory, or None for any other error."""
    if isinstance(error, MemoryError):
        return "this machine has not enough memory: use smaller sizes, or more machines"
    if not isinstance(error, OSError) or error.errno not in _ADVICE:
        return None
    if error.filename is None:
        _discard_output()  # it may be what failed, as in `> /dev/full`
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{_ADVICE[error.errno]}"


def _internal(error: Exception) -> str:
    """Keep the traceback of an error that was not foreseen. Return the line that names its file."""
    folder = Path(os.environ.get(TRACEBACKS, "~/.cache/leviathan/tracebacks")).expanduser()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    heading = f"{shlex.join(sys.argv)}\nPython {platform.python_version()}, {platform.platform()}\n\n"
    for path in (folder / name, Path(tempfile.gettempdir()) / f"leviathan-{name}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(heading + "".join(traceback.format_exception(error)), errors="backslashreplace")
        except OSError:
            continue
        return f"internal error, {one_line(error, 300)}; please report it with its traceback, {path}"
    traceback.print_exception(error)
    return f"internal error, {one_line(error, 300)}; please report it with the traceback above"


def say(line: str) -> None:
    """Print a line of progress. A full disk under `> FILE` must not end what reports it: later lines go nowhere."""
    try:
        print(line, flush=True)
    except BrokenPipeError:  # `leviathan ... | head`
        raise
    except OSError:
        _discard_output()
        with suppress(OSError):  # it may be the same full disk
            print("standard output cannot be written: later lines are not shown", file=sys.stderr)


def _open_streams() -> None:
    """Open standard streams that are closed (`>&-`): else a file that is opened later gets their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - stays open as long as this process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it cannot be flushed
                stream.reconfigure(errors="backslashreplace")  # the locale may lack a character


def _discard_output() -> None:
    """Send standard output nowhere. Python flushes it again at exit, which would fail again."""
    with suppress(OSError):  # without a file behind it, such as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
