"""A process that has imported everything and forks a child for each command, which starts in milliseconds.

`ForkServer(folder)` writes the executables `leviathan` and `python` into `folder`. With `folder` first on PATH,
`leviathan VERB ...`, `python -c CODE` and `python -m MODULE ...` run in a fork of the server, with the caller's working
directory, environment and standard streams, and return its exit code. Ranks that such a command starts are forks, too.
The client passes signals on. If it is killed, its fork is killed. `test_fork_server.py` compares a fork with a process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

PRELOAD = ("launch.cli", "train.trainer", "data.filter.pipeline", "matplotlib.figure", "yaml")

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect({address!r})
request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(channel, [len(request).to_bytes(8, "big")], [0, 1, 2])
channel.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: channel.send(bytes([number])))
code = channel.recv(8)
sys.exit(int.from_bytes(code, "big") if code else 70)
"""


class ForkServer:
    """Starts the server; `close` ends it. The path of `folder` must be short: it is part of a Unix socket's address."""

    def __init__(self, folder: Path) -> None:
        self.folder, address = folder, str(folder / "socket")
        for name in ("leviathan", "python"):
            path = folder / name
            path.write_text(CLIENT.format(python=sys.executable, address=address, name=name))
            path.chmod(0o755)
        safe = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        command, environment = [sys.executable, "-m", "tests.support.fork_server", address], os.environ | safe
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the fork server did not start")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(address: str) -> None:
    """Fork a child for each connection. End when the process that started this one ends."""
    for name in PRELOAD:
        __import__(name)
    gc.freeze()  # a collection in a fork would visit all these modules, and copy the pages that forks share
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        channel, _ = listener.accept()
        header, streams, _, _ = socket.recv_fds(channel, 8, 3)
        request = json.loads(channel.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
        child = os.fork()
        if child == 0:
            listener.close()
            sys.executable = str(Path(address).with_name("python"))  # ranks that it starts are forks as well
            _run(channel, streams, *request)
        for stream in streams:
            os.close(stream)
        threading.Thread(target=_report, args=(child, channel), daemon=True).start()


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent ends, which closes the pipe
    os._exit(0)


def _report(child: int, channel: socket.socket) -> None:
    """Send the exit code when the child ends. Until then, pass on the client's signals; if it dies, send SIGKILL."""
    threading.Thread(target=_signal, args=(child, channel), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        channel.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big"))
        channel.shutdown(socket.SHUT_RDWR)


def _signal(child: int, channel: socket.socket) -> None:
    with channel, contextlib.suppress(OSError):
        while True:
            number = channel.recv(1)
            os.kill(child, number[0] if number else signal.SIGKILL)
            if not number:
                return


def _run(
    channel: socket.socket, streams: list[int], name: str, arguments: list[str], folder: str, variables: dict[str, str]
) -> None:
    """Run the command in this child, and exit with its code."""
    code = 70
    try:
        channel.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        root = str(Path(__file__).resolve().parents[2])
        inherited = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = inherited + [path for path in sys.path if path != root] + [root]
        code = _exit_code(name, arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _exit_code(name: str, arguments: list[str]) -> int:
    while arguments[:1] in (["-u"], ["-P"], ["-I"]):
        arguments = arguments[1:]
    try:
        if name == "leviathan":
            from launch.cli import main

            sys.argv = ["leviathan", *arguments]
            return main(arguments)
        if arguments[:1] == ["-c"]:
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[:1] == ["-m"]:
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[:1] == ["-"] or not arguments:
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status: Any = ended.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
        return 0 if status is None else status if isinstance(status, int) else 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
