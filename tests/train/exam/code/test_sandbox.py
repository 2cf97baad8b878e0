"""Escapes and bombs against the sandbox: none succeeds, none takes longer than its limit, none stays behind."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from train.exam.code import proof
from train.exam.code.proof import prove
from train.exam.code.sandbox import Limit, Limits, Sandbox, SandboxError, python_command

from .attacks import ATTACKS, attack

pytestmark = pytest.mark.slow
LIMITS = Limits(wall_s=60, cpu_s=2)
SHORT = replace(LIMITS, wall_s=6)
"""For attacks that only the wall time may end. All others have time to end even on a busy machine."""
MIB = 2**20
ENDS = {
    "fork_bomb": {Limit.wall, Limit.cpu},
    "memory_of_many": {Limit.memory},
    "shared_memory": {Limit.memory},
    "output_flood": {Limit.output},
    "long_line": {Limit.output},
    "file_flood": {Limit.wall, Limit.cpu},
    "empty_files": {Limit.wall, Limit.cpu},
    "endless_loop": {Limit.wall},
    "broken_name": {Limit.wall},
    "lying_name": {Limit.memory},
    "busy_loop": {Limit.cpu, Limit.wall},
}
"""The limits that end an attack. All others end by themselves."""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Return a sandbox after its limits were proven: a fork bomb without a limit takes the whole machine."""
    assert prove()["processes"]
    return Sandbox(LIMITS)


@pytest.fixture
def allocated() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the highest number of bytes that Python has held since. The memory that the system
    reports would depend on what else runs.
    """
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.fixture
def port() -> Iterator[int]:
    """Listen as a service of this machine would, on TCP and on an abstract Unix socket."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        number = server.getsockname()[1]
        local.bind(f"\0canary{number}")
        local.listen()
        yield number


def survivors(mark: str) -> list[list[str]]:
    return [one.info["cmdline"] for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or [])]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails(sandbox, allocated, name, port, tmp_path):
    canary, mark = tmp_path / "canary", f"/attack_{time.monotonic_ns()}.py"
    canary.write_text("secret")
    started = time.monotonic()
    used = Sandbox(SHORT) if Limit.wall in ENDS.get(name, ()) else sandbox
    result = used.run([*python_command(), mark], {mark: attack(name, str(canary), port)})
    seconds, held = time.monotonic() - started, allocated() / MIB
    print(
        f"{name}: {seconds:.1f} s, limit {result.limit}, exit {result.exit_code}, {held:.1f} MiB", result.stdout[:300]
    )
    assert b"ESCAPED" not in result.stdout
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    assert (result.limit in ENDS[name]) if name in ENDS else result.limit is None
    assert seconds < 50, "an attack that ends by itself, or at the short limit, has much less to do"
    assert held < 8, "what a program writes must not fill our memory"
    assert len(result.stdout) <= LIMITS.output_bytes and len(result.stderr) <= LIMITS.output_bytes
    assert canary.read_text() == "secret"
    assert survivors(mark) == []


def test_the_attacks_succeed_without_sandbox(port, tmp_path):
    """Negative control: outside, the same programs find the file, the port and the processes."""
    canary = tmp_path / "canary"
    canary.write_text("secret")
    for name in ("network", "read_outside", "processes_of_others", "symlinks"):
        code = attack(name, str(canary), port).decode()
        code = code.replace("/proc/self/oom_score_adj", "/none")  # this process shall stay as it is
        code = code.replace('open("/work/link", "w")', 'open("/none")').replace("/work", str(tmp_path))
        code = code.replace('os.symlink("/proc/1/root"', 'os.symlink("/none"').replace("/usr/lib/x", "/none/x")
        code = code.replace("resource.setrlimit", "resource.getrlimit_").replace("os.setpriority", "len")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert b"ESCAPED" in done.stdout, name


@pytest.mark.skipif(os.getuid() != 0, reason="only root, as in the continuous integration, can become another user")
def test_an_ordinary_user_has_the_same_sandbox():
    """Other tests run as root, which changes to a user of its own for each sandbox."""
    done = subprocess.run([sys.executable, "-c", AS_ANOTHER_USER], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "wall", "memory"], done.stderr


AS_ANOTHER_USER = """
import os
from train.exam.code.proof import prove
from train.exam.code.sandbox import Limits, Sandbox, python_command
os.setgroups([]); os.setgid(4242); os.setuid(4242)
print(prove()["processes"])
hold = b"import os, time\\nfor _ in range(9):\\n    if not os.fork():\\n        x = b'x' * 10**8\\n        time.sleep(99)\\n"
for code in (b"import os, time\\nif not os.fork():\\n    os.setsid()\\ntime.sleep(99)", hold + b"time.sleep(99)"):
    result = Sandbox(Limits(wall_s=60 if b'99)' in code[:-20] else 2)).run([*python_command(), "/x.py"], {"/x.py": code})
    print(result.limit.name)
"""


def test_a_program_that_cannot_be_watched_is_ended(sandbox, monkeypatch):
    def broken(pid: int) -> int:
        raise ValueError("no memory found")

    monkeypatch.setattr("train.exam.code.sandbox._memory", broken)
    started = time.monotonic()
    with pytest.raises(SandboxError, match=r"could not be watched: .*no memory found"):
        sandbox.run(["/bin/sh", "-c", "sleep 4321"])
    assert time.monotonic() - started < 50
    assert ["sleep", "4321"] not in survivors("sleep")


def test_a_run_gets_its_files_and_input(sandbox):
    code = b"import sys; print(open('/data.txt').read() + sys.stdin.read()); sys.exit(3)"
    result = sandbox.run([*python_command(), "/main.py"], {"/main.py": code, "/data.txt": b"given "}, b"typed")
    assert (result.stdout, result.exit_code, result.signal, result.limit) == (b"given typed\n", 3, None, None)


def test_a_signal_is_told_from_an_exit_code(sandbox):
    result = sandbox.run(["/bin/sh", "-c", "kill -SEGV $$"])
    assert (result.exit_code, result.signal, result.limit) == (None, 11, None)


def test_a_missing_program_ends_with_127(sandbox):
    assert sandbox.run(["/usr/bin/no-such-program"]).exit_code == 127


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--nproc", "processes"),
        ("--as", "memory"),
        ("--fsize", "large files"),
        ("--remount-ro", "writing to /"),
        ("--size", "a full folder"),
        ("--seccomp", "files in memory"),
        ("--unshare-all", "network devices"),
    ],
)
def test_the_proof_notices_a_limit_that_does_not_hold(monkeypatch, option, complaint):
    """Negative control: without one of its options the sandbox is refused. The probe starts 64 processes at most."""
    assert prove()["processes"]

    class Weak(Sandbox):
        def _view(self, files):
            return without(super()._view(files), option)

    if option == "--seccomp":
        monkeypatch.setattr("train.exam.code.sandbox.system_call_filter", allowing_everything)
    prlimit = Limits.prlimit
    monkeypatch.setattr(Limits, "prlimit", lambda self: [word for word in prlimit(self) if not word.startswith(option)])
    monkeypatch.setattr(proof, "Sandbox", Weak)
    with pytest.raises(SandboxError, match=f"does not hold on this machine: .*{complaint}"):
        prove.__wrapped__()


def allowing_everything() -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)


def without(words: list[str], option: str) -> list[str]:
    """Return arguments of bubblewrap without an option and its value."""
    if option == "--unshare-all":
        kept = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"]
        return [*kept, *(word for word in words if word != option)]
    values = {place + 1 for place, word in enumerate(words) if word == option}
    return [word for place, word in enumerate(words) if word != option and place not in values]
