"""The filter of system calls in the sandbox.

It refuses, with EPERM, what would hold memory that no limit counts, reach other processes or change namespaces.
"""

from __future__ import annotations

import errno
import platform
import struct

from core.errors import ConfigError

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_* of linux/audit.h
_X32 = 0x40000000  # system calls of the x32 ABI, a second way to each call of x86_64

_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        _X86_64,
        {
            "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "pivot_root": 155, "mount": 165, "umount2": 166,
            "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
            "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
        },
    ),
    "aarch64": (
        _AARCH64,
        {
            "shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117, "pivot_root": 41, "mount": 40, "umount2": 39,
            "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "setns": 268,
            "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
        },
    ),
}  # fmt: skip
_EVERYWHERE = {
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_getfd": 438,
    "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
"""Numbers that all machines share."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000


def system_call_filter(machine: str = "") -> bytes:
    """Return the filter as instructions of classic BPF, for `bwrap --seccomp` (man 2 seccomp).

    Raises `ConfigError` for a processor whose numbers of system calls are not listed here.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ConfigError("", None, f"the sandbox knows no system calls of {machine} processors", sorted(_MACHINES))
    architecture, own = _MACHINES[machine]
    numbers = sorted([*own.values(), *_EVERYWHERE.values()])
    program = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, len(numbers) + 1, 0, _X32),
        *((_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
