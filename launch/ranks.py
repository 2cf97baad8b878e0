"""Start ranks on this machine that read their configuration from a file."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import plain
from core.errors import ConfigError, LeviathanError
from core.exit_codes import CRASHED, has_agent
from core.files import write_json
from launch.config import LocalLaunch
from launch.diagnose.machine import check_processes
from precision.config import Backend

if TYPE_CHECKING:
    from launch.agent import Node


def run_ranks(node: Node, write: Callable[[Path], None]) -> int:
    """Run the ranks of `node`. `write` writes the file whose path is added to their command. Return the agent's code,
    or 130 after a signal, which the agent forwards to the ranks.
    """
    from launch.agent import AgentInterrupted, run

    with tempfile.TemporaryDirectory(prefix="leviathan-") as scratch:
        path = Path(scratch) / "config"
        write(path)
        try:
            return run(replace(node, command=(*node.command, str(path))))
        except AgentInterrupted as error:
            return error.exit_code


def run_verb(name: str, config: Any, launch: LocalLaunch) -> int:
    """Run a verb on ranks of this machine. After they have ended, print what rank 0 printed; its standard error appears
    at once. The ranks' logs are kept only if a rank crashes.
    """
    from launch.agent import Node

    if has_agent():
        raise ConfigError("launch.kind", launch.kind, "torchrun has started the ranks already; remove it", ["inline"])
    check_processes("launch.processes", launch.ranks_per_node, launch.oversubscribe)
    logs = Path(tempfile.mkdtemp(prefix=f"leviathan-{name}-"))
    node = Node(
        command=("-m", "launch.rank", name),
        ranks=launch.ranks_per_node,
        logs=logs,
        restarts=launch.restarts,
        job=name,
        shows_output=False,
    )
    code = None
    try:
        code = run_ranks(node, lambda path: write_json(path, plain(replace(config, launch={}))))
        if code == CRASHED:
            raise LeviathanError(f"{name} failed; the output of its ranks is in {logs}")
        if code == 0:
            _print_bytes(max((logs / "rank-00000").glob("*.out")).read_bytes())
        return code
    finally:
        if code != CRASHED:
            shutil.rmtree(logs, ignore_errors=True)


def check_model(text: str, backend: Backend | None) -> bool:
    """Check without torch that `run=TEXT` names a run (return True) or another model (return False), so that a mistake
    is reported once, before ranks start.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError("run", text, "is a file, but must be a folder" if path.exists() else "no run there")
    if (path / "config.yaml").exists():
        return True
    if not any((path / name).exists() for name in ("config.json", "model.yaml")):
        raise ConfigError("run", text, "holds neither a run (config.yaml) nor a model (config.json, model.yaml)")
    if backend is not None:
        raise ConfigError("backend", backend, "applies to runs only: other models compute in float32; remove it")
    return False


def _print_bytes(content: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.flush()
