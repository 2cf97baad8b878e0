"""The verb `doctor`: what this machine and installation can do; what is missing, with the line that installs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core import package_guard
from core.config import load
from core.errors import check_numbers
from core.files import read_json
from launch.diagnose.machine import FEW_FILES, cores, driver, room
from parallel.layout import ParallelConfig
from precision.resolve import availability
from train.config import RunConfig, TrainConfig
from train.run_directory import RunDirectory, write_config

OPTIONAL = {
    "transformers": "make bench compares with it",
    "lm-eval": "evaluate asks its tasks",
    "triton": "precision.kernels=triton",
}
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = 1 << 30


@dataclass(frozen=True)
class DoctorConfig:
    """`json`: print the findings as JSON. `cache` and `runs`: folders whose disk is looked at. `ranks`: start so many
    on this machine and time the disk and each axis of `parallel` as well; as a first step on every node of a SLURM
    job, that is launch.slurm.doctor=true.
    """

    json: bool = False
    cache: str = "~/.cache/leviathan"
    runs: str = "runs"
    ranks: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("ranks",))
        if self.ranks:
            self.parallel.resolve(self.ranks)


def run(config: DoctorConfig) -> int:
    """Print the findings; exit code 1 where something that every run needs is missing or a node is wrong."""
    found = examine(config)
    if not config.json:
        print(_table(found), flush=True)
    code = _measure(config, found) if config.ranks else 0
    if config.json:
        print(json.dumps(found, indent=2))
    return 1 if found["problems"] or code else 0


def _measure(config: DoctorConfig, found: dict[str, Any]) -> int:
    """Run `launch.diagnose.nodes` on ranks of this machine and take its findings."""
    from launch.agent import Node
    from launch.agent import run as start

    with tempfile.TemporaryDirectory(prefix="leviathan-") as scratch:
        folder = Path(scratch)
        usual = load("train", TrainConfig, [])
        asked = replace(usual, parallel=config.parallel, run=RunConfig(root=config.runs, name=".doctor"))
        write_config(folder / "config.yaml", asked)
        command = ("-m", "launch.diagnose.nodes", str(folder / "config.yaml"), str(folder))
        quiet = Node(command, config.ranks, folder / "logs", shows_output=not config.json)
        code = start(quiet)
        if (folder / "findings.json").exists():
            found["ranks"] = read_json(folder / "findings.json")
        shutil.rmtree(RunDirectory.of(asked).path, ignore_errors=True)
    return code


def examine(config: DoctorConfig) -> dict[str, Any]:
    """Findings by section; `problems` stop every run, `advice` does not."""
    packages = {name: _version(name) for name in _required()}
    optional = {name: _version(name) for name in OPTIONAL}
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: dict[str, Any] = {
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "open_files_limit": files,
        },
        "cuda": {"toolkit": torch.version.cuda, "driver": driver()},
        "devices": _devices(),
        "precision": _precision(),
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "packages": packages,
        "optional": optional,
        "disk": {str(path): _room(path) for path in _folders(config)},
        "origin": {name: str(package_guard.ROOT / name) for name in package_guard.PACKAGES},
    }
    found["problems"] = [f"{name} is not installed: pip install {name}" for name, v in packages.items() if v is None]
    if not packages:
        found["problems"].append(f"leviathan itself is not installed: pip install -e {package_guard.ROOT}")
    found["advice"] = [
        f"{name} is not installed ({OPTIONAL[name]}): pip install {name}" for name, v in optional.items() if v is None
    ]
    if files < FEW_FILES:
        found["advice"].append(f"only {files} files may be open at once: ulimit -n {FEW_FILES} or more before a run")
    shared = found["disk"].get(str(SHARED_MEMORY))
    if shared and shared["free_bytes"] < SMALL_SHARED_MEMORY:
        found["advice"].append(f"{SHARED_MEMORY} has only {_size(shared['free_bytes'])} left; NCCL may want more")
    return found


def _required() -> list[str]:
    """The packages that every run needs, as the installed distribution says; none where none is installed."""
    try:
        lines = importlib.metadata.requires("leviathan") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def _precision() -> dict[str, dict[str, list[str]]]:
    """Who could do FP8 products here: by backend and recipe the reasons why not."""
    return availability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _precision_lines(found: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    for backend, recipes in found.items():
        can = [recipe for recipe, reasons in recipes.items() if not reasons]
        yield f"{'FP8 by ' + backend:<20} {', '.join(can) or 'none'}"
        refusals: dict[str, list[str]] = {}
        for recipe, reasons in recipes.items():
            for reason in reasons:
                refusals.setdefault(reason, []).append(recipe)
        yield from (f"{'':<20} not {', '.join(without)}: {reason}" for reason, without in refusals.items())


def _devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return devices


def _folders(config: DoctorConfig) -> list[Path]:
    folders = [Path(config.cache).expanduser(), Path(config.runs).expanduser()]
    return [*folders, SHARED_MEMORY] if SHARED_MEMORY.exists() else folders


def _room(path: Path) -> dict[str, Any]:
    free, writable = room(path)
    return {"free_bytes": free, "writable": writable}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _table(found: dict[str, Any]) -> str:
    machine = {**found["machine"], "memory_bytes": _size(found["machine"]["memory_bytes"])}
    lines = [f"{key.removesuffix('_bytes'):<20} {value}" for key, value in machine.items()]
    lines += [
        f"{'device ' + str(i):<20} {d['name']}, {_size(d['memory_bytes'])}" for i, d in enumerate(found["devices"])
    ]
    lines += [] if found["devices"] else [f"{'device':<20} no GPU: runs use the CPU"]
    lines += [f"{'CUDA ' + part:<20} {version or 'none'}" for part, version in found["cuda"].items()]
    lines += [f"{name:<20} {'yes' if there else 'no'}" for name, there in found["backends"].items()]
    lines += list(_precision_lines(found["precision"]))
    lines += [
        f"{name:<20} {version or 'missing'}" for name, version in {**found["packages"], **found["optional"]}.items()
    ]
    for path, free in found["disk"].items():
        lines.append(
            f"{'disk':<20} {path}: {_size(free['free_bytes'])} free{'' if free['writable'] else ', NOT writable'}"
        )
    lines.append(f"{'installed from':<20} {package_guard.ROOT}")
    lines += [f"advice: {line}" for line in found["advice"]] + [f"PROBLEM: {line}" for line in found["problems"]]
    return "\n".join(lines)
