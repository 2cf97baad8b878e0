"""Check this machine and installation: hardware, packages, FP8 backends, disks and limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core import package_guard
from core.config import load
from core.files import read_json
from launch.diagnose import jitter
from launch.diagnose.machine import FEW_FILES, cores, driver, free_space
from parallel.layout import ParallelConfig
from precision.config import Backend, Compute, PrecisionConfig
from precision.resolve import FLOAT8_LIBRARIES, availability, no_compilation, no_triton, no_varlen, slow_experts
from train.config import RunConfig, TrainConfig
from train.run_directory import RunDirectory, write_config

OPTIONAL = {
    "transformers": "make bench compares with it",
    "lm-eval": "evaluate runs its tasks",
    "triton": "GPUs need it, unless precision.kernels=torch",
}
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = 1 << 30


def measure(ranks: int, parallel: ParallelConfig, runs: str, found: dict[str, Any], quiet: bool) -> int:
    """Run `launch.diagnose.nodes` on ranks of this machine and add its findings to `found`; return its exit code."""
    from launch.agent import Node, run

    with tempfile.TemporaryDirectory(prefix="leviathan-") as scratch:
        folder = Path(scratch)
        config = replace(load("train", TrainConfig, []), parallel=parallel, run=RunConfig(root=runs, name=".doctor"))
        write_config(folder / "config.yaml", config)
        command = ("-m", "launch.diagnose.nodes", str(folder / "config.yaml"), str(folder))
        code = run(Node(command, ranks, folder / "logs", shows_output=not quiet, shows_errors=not quiet))
        if (folder / "findings.json").exists():
            found["ranks"] = read_json(folder / "findings.json")
        shutil.rmtree(RunDirectory.of(config).path, ignore_errors=True)
    return code


def examine(folders: list[Path]) -> dict[str, Any]:
    """Return findings by section, with the disk space of `folders`. `problems` stop every run; `advice` does not."""
    shared = [SHARED_MEMORY] if SHARED_MEMORY.exists() else []
    packages = {name: _version(name) for name in _required()}
    optional = {name: _version(name) for name in OPTIONAL}
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        "precision": availability(device),
        "kernels": {
            "flash attention": no_varlen(PrecisionConfig(Compute.bfloat16), device),
            "Triton kernels": no_triton(device),
            "torch.compile": no_compilation(device),
            **({"grouped matmuls of experts": slow_experts(device)} if device.type == "cuda" else {}),
        },
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "jitter": jitter.settings(),
        "packages": packages,
        "optional": optional,
        "disk": {str(path): free_space(path) for path in [*folders, *shared]},
        "origin": {name: str(package_guard.ROOT / name) for name in package_guard.PACKAGES},
    }
    found["problems"] = [f"{name} is not installed: pip install {name}" for name, v in packages.items() if v is None]
    if not packages:
        found["problems"].append(f"leviathan itself is not installed: pip install -e {package_guard.ROOT}")
    found["advice"] = [
        f"{name} is not installed ({OPTIONAL[name]}): pip install {name}" for name, v in optional.items() if v is None
    ]
    found["advice"] += jitter.advice()
    if files < FEW_FILES:
        found["advice"].append(f"only {files} files may be open at once: run `ulimit -n {FEW_FILES}` or more first")
    for path in shared:
        if (free := found["disk"][str(path)]["free_bytes"]) < SMALL_SHARED_MEMORY:
            found["advice"].append(f"{path} has only {_size(free)} left; NCCL may need more")
    return found


def _required() -> list[str]:
    """Return the packages that the installed distribution requires, or [] if leviathan is not installed."""
    try:
        lines = importlib.metadata.requires("leviathan") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def _precision_lines(found: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str]]:
    """Yield the FP8 recipes that each backend supports here, then the reasons why it does not support the others."""
    for backend, recipes in found.items():
        supported = [recipe for recipe, reasons in recipes.items() if not reasons]
        yield f"FP8 by {backend}", ", ".join(supported) or "none"
        if supported and (slow := FLOAT8_LIBRARIES[Backend(backend)].EXPERTS):
            yield "", slow
        refusals: dict[str, list[str]] = {}
        for recipe, reasons in recipes.items():
            for reason in reasons:
                refusals.setdefault(reason, []).append(recipe)
        yield from (("", f"not {', '.join(without)}: {reason}") for reason, without in refusals.items())
    yield "FP8 pays", "by estimate for matrices [F, D] with DF / (D + F) of 280 or more; of experts see docs/fp8.md"


def _devices() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in found]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def table(found: dict[str, Any]) -> str:
    """Return the findings as lines for the terminal."""
    machine = {**found["machine"], "memory_bytes": _size(found["machine"]["memory_bytes"])}
    devices = {f"device {i}": f"{d['name']}, {_size(d['memory_bytes'])}" for i, d in enumerate(found["devices"])}
    entries = [
        *((key.removesuffix("_bytes"), value) for key, value in machine.items()),
        *(devices or {"device": "no GPU: runs use the CPU"}).items(),
        *((f"CUDA {part}", version or "none") for part, version in found["cuda"].items()),
        *((name, "yes" if available else "no") for name, available in found["backends"].items()),
        *_precision_lines(found["precision"]),
        *((name, "no: " + reason if reason else "yes") for name, reason in found["kernels"].items()),
        *((name, f"{one['value']} ({one['reason']})") for name, one in found["jitter"].items()),
        *((name, version or "missing") for name, version in {**found["packages"], **found["optional"]}.items()),
    ]
    for path, disk in found["disk"].items():
        writable = "" if disk["writable"] else ", NOT writable"
        entries.append(("disk", f"{path}: {_size(disk['free_bytes'])} free{writable}"))
    entries.append(("installed from", package_guard.ROOT))
    lines = [f"{key:<20} {value}" for key, value in entries]
    lines += [f"advice: {line}" for line in found["advice"]] + [f"PROBLEM: {line}" for line in found["problems"]]
    return "\n".join(lines)
