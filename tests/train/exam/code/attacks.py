"""Programs that try to leave the sandbox or to use up the machine. One that succeeds prints ESCAPED."""

from __future__ import annotations

CANARY = "CANARY"
"""Stands for the path of a file on the machine, and `PORT` for a port on which it listens."""
_TRY = """
import os, signal, socket, subprocess, sys, time
def tries(action):
    try:
        action()
        print("ESCAPED", flush=True)
    except (OSError, MemoryError, subprocess.SubprocessError, RuntimeError) as error:
        print(type(error).__name__, flush=True)
"""

ATTACKS = {
    "write_outside": """
for path in ("CANARY", "/usr/bin/x", "/etc/x", "/x", "/dev/x", "/root/x", "/proc/sys/kernel/core_pattern", "/work/../x"):
    tries(lambda: open(path, "w").write("x"))
""",
    "read_outside": """
for path in ("CANARY", "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/1/root/etc/passwd", "/proc/kcore"):
    tries(lambda: open(path).read(10) or open("/none"))  # the environment of process 1 is empty
for path in ("/root", "/home", "/tmp/..", "/proc/1/cwd"):
    tries(lambda: 1 if {"etc", "root", "home", "var"} & set(os.listdir(path)) else open("/none"))
""",
    "network": """
tries(lambda: socket.create_connection(("127.0.0.1", PORT), 2))
tries(lambda: socket.create_connection(("192.0.2.1", 80), 2))
tries(lambda: socket.getaddrinfo("example.org", 80))
tries(lambda: socket.socket(socket.AF_UNIX).connect("\\0canaryPORT"))
tries(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
""",
    "fork_bomb": """
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
""",
    "thread_bomb": """
import threading
count = 0
try:
    while count < 1000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
    print("ESCAPED", flush=True)
except RuntimeError:
    print("refused after", count, flush=True)
os._exit(0)
""",
    "memory": "tries(lambda: bytearray(10**10))",
    "memory_of_many": """
for _ in range(10):
    if not os.fork():
        hold = b"x" * 200_000_000
        time.sleep(60)
time.sleep(60)
""",
    "shared_memory": """
import mmap
hold = []
for _ in range(10):
    if not os.fork():
        hold = mmap.mmap(-1, 200_000_000)
        hold.write(b"x" * 200_000_000)
        time.sleep(60)
time.sleep(60)
""",
    "hidden_memory": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
tries(lambda: os.memfd_create("x"))
tries(lambda: libc.shmget(0, 10**8, 0o1600) != -1 or open("/none"))
tries(lambda: libc.syscall(0x40000000 | 319, b"x", 0) != -1 or open("/none"))
tries(lambda: libc.syscall(425, 8, b"0" * 120) != -1 or open("/none"))
""",
    "output_flood": """
block = "x" * 79 + "\\n"
while True:
    print(block * 10_000)
""",
    "long_line": """
while True:
    sys.stderr.write("x" * 2**20)
""",
    "file_flood": """
number = 0
while True:
    try:
        open(f"/work/{number}", "w").write("x" * 5000)
    except OSError:
        time.sleep(0.1)
    number += 1
""",
    "empty_files": """
for number in range(10**9):
    os.close(os.open(f"/work/{number}", os.O_CREAT))
    if number % 10_000 == 0:
        print(number, flush=True)
""",
    "large_file": """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tries(lambda: os.truncate(os.open("/work/x", os.O_CREAT | os.O_RDWR), 10**12))
tries(lambda: open("/work/y", "wb").write(bytes(2 * 10**7)))
tries(lambda: [open(f"/dev/shm/{n}", "wb", 0).write(bytes(4 * 10**6)) == 4 * 10**6 or open("/none") for n in range(9)])
""",
    "zip_bomb": """
import zlib
packed = zlib.compress(bytes(10**7), 9)
tries(lambda: b"".join(zlib.decompress(packed) for _ in range(1000)))
def unpack():
    with open("/work/x", "wb") as file:
        for _ in range(1000):
            file.write(zlib.decompress(packed))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tries(unpack)
""",
    "endless_loop": """
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(60)
""",
    "busy_loop": "while True: pass",
    "signal_parent": """
for target in (os.getppid(), 1, -1):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        try:
            os.kill(target, number)
        except OSError:
            print("refused")
time.sleep(0.5)
print("alive" if os.getppid() == 1 else "ESCAPED")
""",
    "ptrace": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
tries(lambda: libc.ptrace(16, 1, 0, 0) == 0 or open("/none"))
tries(lambda: libc.ptrace(0, 0, 0, 0) == 0 or open("/none"))
tries(lambda: open("/proc/1/mem", "r+b").read(1))
""",
    "symlinks": """
os.symlink("CANARY", "/work/link")
os.symlink("/proc/1/root", "/work/root")
tries(lambda: open("/work/link").read())
tries(lambda: open("/work/link", "w"))
tries(lambda: open("/work/root/etc/passwd").read())
tries(lambda: os.symlink("/work/x", "/usr/lib/x"))
""",
    "become_root": """
tries(lambda: os.setuid(0))
tries(lambda: os.setgroups([0]))
tries(lambda: os.chown("/work", 0, 0))
tries(lambda: subprocess.run(["/usr/bin/su", "-c", "true"], check=True, stdin=subprocess.DEVNULL, capture_output=True))
os.chmod("/work", 0o4777)
print("ESCAPED" if os.geteuid() == 0 else "a user")
""",
    "namespaces": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x00020000, 0x40000000):
    tries(lambda: libc.unshare(flag) == 0 or open("/none"))
tries(lambda: libc.mount(b"none", b"/work", b"tmpfs", 0, None) == 0 or open("/none"))
tries(lambda: libc.umount2(b"/usr", 2) == 0 or open("/none"))
tries(lambda: os.chroot("/work"))
tries(lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0 or open("/none"))
""",
    "processes_of_others": """
others = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
print("ESCAPED" if len(others) > 3 or max(others) > 100 else others)
tries(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))
tries(lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000"))
import resource
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (10**4, 10**4))
    print("ESCAPED")
except (OSError, ValueError):
    print("refused")
""",
    "kill_all": """
if not os.fork():
    time.sleep(60)
os.kill(-1, signal.SIGKILL)
print("alone")
""",
    "surviving_daemon": """
if not os.fork():
    os.setsid()
    if not os.fork():
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    os._exit(0)
""",
    "held_stdout": """
if not os.fork():
    os.setsid()
    time.sleep(60)
print("done", flush=True)
os._exit(0)
""",
    "open_files": """
hold = []
tries(lambda: [hold.append(open("/dev/null")) for _ in range(1000)])
tries(lambda: [hold.append(os.pipe()) for _ in range(1000)])
""",
    "terminal": """
import fcntl, termios
tries(lambda: open("/dev/tty").write("x"))
tries(lambda: fcntl.ioctl(1, termios.TIOCSTI, b"x"))
""",
    "broken_name": """
open("/proc/self/comm", "wb").write(b"\\xff\\xfe")
time.sleep(60)
""",
    "lying_name": """
hold = []
for name in (b"\\x0bVmSwap: -99999", b"\\nVmSwap: -99999", b"\\rVmSwap: -99999"):
    if not os.fork():
        open("/proc/self/comm", "wb").write(name)
        hold = b"x" * 250_000_000
        time.sleep(60)
time.sleep(60)
""",
    "exit_code_lie": "os._exit(152)",
}


def attack(name: str, canary: str, port: int) -> bytes:
    """Return the text of a program."""
    return (_TRY + ATTACKS[name]).replace(CANARY, canary).replace("PORT", str(port)).encode()
