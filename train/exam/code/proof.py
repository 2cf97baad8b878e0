"""Prove that the limits of the sandbox hold on this machine, before a program of a model is run in it."""

from __future__ import annotations

import json
from functools import cache

from core.errors import ConfigError
from core.files import parse_json
from train.exam.code.sandbox import Limit, Limits, Sandbox, SandboxError, python_command

LIMITS = Limits(wall_s=30, cpu_s=10, memory_mib=1024, address_space_mib=128, processes=8, file_mib=1, folder_mib=2)
FORKS = 64
"""Processes that the proof tries to start: few enough to be harmless where the limit does not hold."""
_PROBE = """
import json, os, signal, socket, sys
signal.alarm(20)
forks, mib, processes, address_space = json.loads(sys.argv[1])
found = {}

def refused(name, action):
    try:
        action()
        found[name] = False
    except (OSError, MemoryError):
        found[name] = True

def write(path, size=1):
    with open(path, "wb", buffering=0) as file:
        for _ in range(size):
            if file.write(bytes(mib)) < mib:
                raise OSError

def fill():
    for number in range(4):
        write(f"/work/{number}")

def connect(family, address):
    with socket.socket(family) as one:
        one.settimeout(2)
        one.connect(address)

for folder in ("/", "/dev", "/usr", "/usr/bin"):
    refused(f"writing to {folder}", lambda: write(f"{folder}/probe"))
for folder in ("/root", "/home", "/etc", "/var", "/sys", "/run"):
    refused(f"seeing {folder}", lambda: os.listdir(folder))
refused("the network", lambda: connect(socket.AF_INET, ("192.0.2.1", 80)))
refused("large files", lambda: write("/work/large", 2))
refused("a full folder", fill)
refused("memory", lambda: bytearray(2 * address_space))
refused("files in memory", lambda: os.memfd_create("probe"))
found["an unprivileged user"] = os.getuid() != 0 and "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
found["a PID namespace"] = all(int(name) < 1000 for name in os.listdir("/proc") if name.isdecimal())
found["network devices"] = [name for _, name in socket.if_nameindex()] == ["lo"]
children = []
try:
    for _ in range(forks):
        child = os.fork()
        if not child:
            signal.pause()
        children.append(child)
except OSError:
    pass
found["processes"] = len(children) < processes
for child in children:
    os.kill(child, signal.SIGKILL)
print(json.dumps(found))
"""


@cache
def prove() -> dict[str, bool]:
    """Try, within bounds, what the sandbox must refuse. Return what was tried; all of it held.

    Runs once in a process. Raises `ConfigError` if user namespaces are not permitted, and `SandboxError` if a limit
    does not hold.
    """
    assert LIMITS.address_space_mib is not None
    sizes = json.dumps([FORKS, 2**20, LIMITS.processes, LIMITS.address_space_mib * 2**20])
    found = _probe(Sandbox(LIMITS), sizes)
    if failed := [name for name, held in found.items() if not held]:
        raise SandboxError(f"the sandbox does not hold on this machine: {', '.join(failed)}")
    sleeper = Sandbox(Limits(wall_s=0.5)).run(["/bin/sh", "-c", "sleep 60"])
    if sleeper.limit is not Limit.wall:
        raise SandboxError("the sandbox does not hold on this machine: wall time")
    return found


def _probe(sandbox: Sandbox, arguments: str) -> dict[str, bool]:
    try:
        result = sandbox.run([*python_command(), "/probe.py", arguments], {"/probe.py": _PROBE.encode()})
    except SandboxError as error:
        advice = (
            "permit user namespaces: sysctl user.max_user_namespaces=10000, and in a container an unconfined seccomp"
        )
        reason = f"answers that are programs run only in a sandbox, which cannot be set up; {advice}; {error}"
        raise ConfigError("", None, reason) from error
    try:
        found = parse_json(result.stdout)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "processes" not in found:
        reason = f"{result.limit.value} ran out" if result.limit else result.stderr[-300:].decode(errors="replace")
        raise SandboxError(f"the sandbox cannot be proven to hold: {reason}")
    return found
