"""Record the software, the command and the environment variables of a run."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

import torch

from core.exit_codes import host_name

_PREFIXES = (
    *("CUDA", "FI_", "GLOO", "GOMP", "KMP", "LEVIATHAN", "MASTER", "MKL", "NCCL", "NVIDIA", "NVTE", "OMP"),
    *("PYTHON", "PYTORCH", "RANK", "SLURM", "TORCH", "UCX", "WORLD"),
)
_SECRET = ("AUTH", "CREDENTIAL", "JWT", "KEY", "PASS", "SECRET", "TOKEN")


def environment() -> dict[str, Any]:
    """Return host, versions, command and environment variables of torch and its libraries, without secrets."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) and not any(word in name for word in _SECRET)
    }
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": host_name(),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "variables": variables,
    }
