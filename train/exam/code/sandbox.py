"""Run untrusted programs in bubblewrap: no network, no files but the system's, and limits on all that they use.

A program sees a read-only `/usr`, an empty folder `/work` in memory, and the files that it was given. It runs as a user
that owns nothing and no other process, in namespaces of its own, with a cleared environment. The kernel enforces the
limits of each process. A thread of ours enforces those of all processes together: wall time and memory.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from typing import IO, Any

import psutil

from core.errors import ConfigError, LeviathanError, OneLineError, check_numbers, printable
from train.exam.code.seccomp import system_call_filter

MIB = 2**20
TICK_S = 0.05
"""Seconds between two looks at the memory of the processes."""
_INSIDE_ID = 65534
_HIGH_IDS = (1_879_048_192, 2_147_483_647)
"""Ids that no system assigns: above containers of systemd and below 2^31 (systemd.io/UIDS-GIDS)."""


class SandboxError(OneLineError, LeviathanError):
    """The sandbox itself failed: no fault of the program in it."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Sizes are in MiB."""

    wall_s: float = 30.0
    """Seconds until all processes are killed. Far above `cpu_s`, to leave room on a busy machine."""
    cpu_s: int = 5
    """Seconds of processor time of each process."""
    memory_mib: int = 512
    """Memory of all processes together, looked at every `TICK_S` seconds."""
    address_space_mib: int | None = 512
    """Address space of each process; None for programs that reserve more than they use, such as browsers."""
    processes: int = 16
    """Processes and threads, the sandbox's own one included."""
    file_mib: int = 8
    """Size of one file."""
    folder_mib: int = 16
    """Size of all files in `/work` together."""
    output_bytes: int = 65_536
    """Bytes of each of the two outputs. A program that writes more is killed."""
    open_files: int = 64

    def __post_init__(self) -> None:
        names = ("wall_s", "cpu_s", "memory_mib", "address_space_mib", "processes", "file_mib", "folder_mib")
        check_numbers(self, positive=(*names, "output_bytes", "open_files"))

    def prlimit(self) -> list[str]:
        """Return the command that sets the limits of each process and then runs a command."""
        sizes = {"fsize": self.file_mib * MIB, "nofile": self.open_files, "nproc": self.processes, "core": 0}
        if self.address_space_mib is not None:
            sizes["as"] = self.address_space_mib * MIB
        limits = [f"--{name}={size}:{size}" for name, size in sizes.items()]
        # SIGXCPU at the first limit, SIGKILL at the second
        return [
            "/usr/bin/choom",
            "-n",
            "1000",
            "--",
            "/usr/bin/prlimit",
            f"--cpu={self.cpu_s}:{self.cpu_s + 1}",
            *limits,
        ]


class Limit(Enum):
    """The limit that ended a program."""

    wall = "wall time"
    cpu = "processor time"
    memory = "memory"
    output = "output"


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended. `signal` and `exit_code`: one of them is None, and both if the sandbox killed the program.

    An exit code above 128 reads as the signal `exit_code - 128`, as in a shell. A program chooses its exit code, so it
    says nothing about the program being right.
    """

    exit_code: int | None
    signal: int | None
    limit: Limit | None
    stdout: bytes
    stderr: bytes
    seconds: float


class Running:
    """A program in the sandbox. Leave its `with` block to kill whatever is left of it.

    That raises `SandboxError` if the program could not be watched.
    """

    def __init__(self, process: subprocess.Popen[bytes], status: int, limits: Limits) -> None:
        os.set_blocking(status, False)
        self.limits, self.limit, self.seconds = limits, None, 0.0
        self._fault: Exception | None = None
        self._process, self._status, self._report = process, status, b""
        self._started, self._born = time.monotonic(), psutil.Process(process.pid).create_time()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    limit: Limit | None

    @property
    def stdin(self) -> IO[bytes] | None:
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes] | None:
        return self._process.stdout

    @property
    def stderr(self) -> IO[bytes] | None:
        return self._process.stderr

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._over.set()
        self._watcher.join()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        os.close(self._status)
        if self._fault is not None:
            raise SandboxError(f"the program could not be watched: {self._fault!r}") from self._fault

    def read(self) -> tuple[bytes, bytes]:
        """Return both outputs, each cut at `output_bytes`, when the program has ended or was killed."""
        kept: dict[Any, bytearray] = {}
        with selectors.DefaultSelector() as selector:
            for stream in (self.stdout, self.stderr):
                if stream is not None:
                    kept[stream] = bytearray()
                    selector.register(stream, selectors.EVENT_READ)
            ended = False
            while selector.get_map() and not ended:
                ended = self._process.poll() is not None  # a surviving child may hold the pipe: read what is there
                for key, _ in selector.select(0 if ended else TICK_S):
                    block = os.read(key.fd, 65_536)
                    room = self.limits.output_bytes - len(kept[key.fileobj])
                    kept[key.fileobj] += block[:room]
                    if len(block) > room:
                        self.stop(Limit.output)
                    if not block:
                        selector.unregister(key.fileobj)
                    ended = ended and not block
        return bytes(kept.get(self.stdout, b"")), bytes(kept.get(self.stderr, b""))

    def stop(self, limit: Limit) -> None:
        """Kill the program because it hit a limit. The first limit counts."""
        if self.limit is None and self._process.poll() is None:
            self.limit = limit
        self._signal()

    def kill(self) -> None:
        """Kill every process of the sandbox and wait until they are gone. Raises `SandboxError` if one stays."""
        init = self._signal()
        self._process.wait()
        init = init or self._signal()
        if init is not None and not _gone(init):
            raise SandboxError("the processes of the sandbox could not be killed")

    def _signal(self) -> psutil.Process | None:
        """Kill bubblewrap and the first process of the PID namespace, with which go all others (man 7 pid_namespaces).

        Return the latter, if it ran.
        """
        init = self._init()
        if init is not None:
            _kill(init)
        self._process.kill()
        return init

    def finish(self) -> SandboxResult:
        """Return how the program ended. It must have ended: see `read`. Raises `SandboxError` if it never began."""
        stdout, stderr = self.read()
        if self.limit is None:
            self._process.wait()
        self.seconds = time.monotonic() - self._started
        self.kill()
        code = self._status_of("exit-code")
        if self.limit is not None:
            return SandboxResult(None, None, self.limit, stdout, stderr, self.seconds)
        if code is None:
            raise SandboxError(f"bubblewrap failed: {stderr[:300].decode(errors='replace').strip() or 'no message'}")
        signal = code - 128 if code > 128 else None
        spent = signal in (SIGXCPU, SIGKILL) and self.seconds >= self.limits.cpu_s
        limit = Limit.cpu if spent else None
        return SandboxResult(None if signal else code, signal, limit, stdout, stderr, self.seconds)

    def _status_of(self, key: str) -> int | None:
        """Return what bubblewrap reports: `child-pid`, or `exit-code` (none if the program never began).

        The program cannot reach this report.
        """
        with self._lock:
            try:
                self._report += os.read(self._status, 65_536)
            except BlockingIOError:  # nothing new
                self._report += b""
            rows = [json.loads(line) for line in self._report.splitlines(keepends=True) if line.endswith(b"\n")]
        return next((int(row[key]) for row in rows if key in row), None)

    def _init(self) -> psutil.Process | None:
        """Return the first process of the PID namespace, if it runs."""
        pid = self._status_of("child-pid")
        try:
            process = None if pid is None else psutil.Process(pid)
            # another process may have the number by now
            return process if process is not None and process.create_time() >= self._born else None
        except psutil.NoSuchProcess:
            return None

    def _watch(self) -> None:
        try:
            while not self._over.wait(TICK_S) and self._process.poll() is None:
                if time.monotonic() - self._started > self.limits.wall_s:
                    self.stop(Limit.wall)
                elif _memory(self._process.pid) > self.limits.memory_mib * MIB:
                    self.stop(Limit.memory)
        except Exception as error:  # a program without a watcher has no limits
            self._fault = error
            self._process.kill()  # all others die with bubblewrap


class Sandbox:
    """Programs with limits. Raises `ConfigError` with the fix if this machine lacks what the sandbox needs.

    `train.exam.code.proof.prove` must pass before a program that is not trusted is run.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.bubblewrap = needed("bwrap", "bubblewrap")
        for tool in ("prlimit", "choom"):
            needed(tool, "util-linux")
        self._filter = system_call_filter()

    def run(
        self, command: Sequence[str], files: Mapping[str, bytes] | None = None, stdin: bytes = b""
    ) -> SandboxResult:
        """Run a program to its end. `files`: read-only files by absolute path. `stdin`: what it can read."""
        source = _in_memory(stdin)
        try:
            with self.start(command, files, stdin=source) as running:
                return running.finish()
        finally:
            os.close(source)

    def version(self, program: str) -> str:
        """Return what `program --version` prints. Raises `SandboxError` if that is nothing."""
        result = self.run([program, "--version"])
        if not result.stdout.strip():
            raise SandboxError(f"{program} does not tell its version: {result.stderr[-300:].decode(errors='replace')}")
        return printable(" ".join(result.stdout.decode(errors="replace").split())[:200])

    def start(
        self,
        command: Sequence[str],
        files: Mapping[str, bytes] | None = None,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
    ) -> Running:
        """Start a program. `stdin`, `stdout`: file descriptors, or `subprocess.PIPE`."""
        report, status = os.pipe()
        passed = {path: _in_memory(content) for path, content in (files or {}).items()}
        seccomp = _in_memory(self._filter)
        user = _free_id() if os.getuid() == 0 else None
        try:
            process = subprocess.Popen(
                [
                    self.bubblewrap,
                    *self._view(passed),
                    *("--seccomp", str(seccomp), "--json-status-fd", str(status)),
                    *("--", *self.limits.prlimit(), *command),
                ],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                close_fds=True,
                pass_fds=[status, seccomp, *passed.values()],
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            os.close(report)
            raise SandboxError(f"bubblewrap cannot be started: {error}") from error
        finally:  # bubblewrap has its own copies
            for descriptor in (status, seccomp, *passed.values()):
                os.close(descriptor)
        return Running(process, report, self.limits)

    def _view(self, files: Mapping[str, int]) -> list[str]:
        """Return bubblewrap's arguments for namespaces, user and files. Their order matters."""
        size = ["--size", str(self.limits.folder_mib * MIB)]
        options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
        options += ["--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/work", "--hostname", "sandbox"]
        options += ["--uid", str(_INSIDE_ID), "--gid", str(_INSIDE_ID), "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64", "sbin"):
            if Path("/", name).is_symlink():
                options += ["--symlink", f"usr/{name}", f"/{name}"]
            elif Path("/", name).exists():
                options += ["--ro-bind", f"/{name}", f"/{name}"]
        # `/` and `/dev` are file systems in memory without a limit: nothing may be written there
        options += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        options += [*size, "--tmpfs", "/work", "--symlink", "work", "/tmp", "--chdir", "/work"]
        for path, descriptor in files.items():
            options += ["--ro-bind-data", str(descriptor), path]
        return [*options, "--remount-ro", "/"]


def needed(tool: str, package: str) -> str:
    """Return the path of an installed program. Raises `ConfigError` with the command that installs it."""
    if platform.system() != "Linux":
        raise ConfigError("", None, "answers that are programs run only in a sandbox, which needs Linux")
    path = shutil.which(tool, path="/usr/bin:/bin:/usr/local/bin")
    if path is None:
        reason = (
            f"answers that are programs run only in a sandbox, which needs {tool}; install it: apt install {package}"
        )
        raise ConfigError("", None, reason)
    return path


def python_command() -> list[str]:
    """Return the command that starts the system's Python in the sandbox, with the standard library only.

    It may be another version than the one that runs this, which may lie in a folder that the sandbox cannot see.
    """
    return [needed("python3", "python3"), "-I", "-S", "-B"]


def _free_id() -> int:
    """Return a user id at random that this user namespace maps. Limits on processes count for each user."""
    last = (
        max(int(row.split()[0]) + int(row.split()[2]) for row in Path("/proc/self/uid_map").read_text().splitlines())
        - 1
    )
    low, high = _HIGH_IDS if last >= _HIGH_IDS[1] else (last // 2 + 1, last)
    if low >= high:
        raise ConfigError("", None, "the sandbox needs user ids of its own, and this container maps none")
    while (chosen := low + secrets.randbelow(high - low)) == _INSIDE_ID:
        continue
    return chosen


def _in_memory(content: bytes) -> int:
    """Return the descriptor of a file in memory, at its start."""
    descriptor = os.memfd_create("sandbox")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _gone(process: psutil.Process, timeout_s: float = 30) -> bool:
    """Wait until a process has ended, and return whether it has. It may stay a zombie where nobody reaps it."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.002)
    return False


def _memory(pid: int) -> int:
    """Return the bytes of memory that a process and its descendants hold, without files of the disk."""
    try:
        processes = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return sum(_held(process.pid) for process in processes)


def _held(pid: int) -> int:
    try:
        return held_memory(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:  # it ended
        return 0


def held_memory(status: bytes) -> int:
    """Return the bytes of memory in a `/proc/PID/status`.

    The first line is the name of the process. The program chooses its bytes, so it may look like other lines: the last
    line of each kind counts.
    """
    rows = dict(line.split(b":", 1) for line in status.split(b"\n") if b":" in line)
    return sum(int(rows[key].split()[0]) * 1024 for key in (b"RssAnon", b"RssShmem", b"VmSwap") if key in rows)
