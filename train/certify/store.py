"""Store certificates on this machine, and find one for exactly this code, a model, its axes and its techniques."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.config import plain
from core.errors import UnreadableFileError
from core.files import read_json, write_json
from core.package_guard import sources_digest
from model.config import ModelConfig
from parallel.layout import ParallelConfig
from precision.config import PrecisionConfig
from train.certify.plan import shrink, techniques
from train.optim.config import OptimizerKind

_SHAPE = {"axes": [str], "model": object, "techniques": object, "pass": bool}


def save(certificate: Mapping[str, Any], cache: Path) -> Path:
    """Store a certificate, passed or failed, where `find` looks for it. Return its path."""
    subject = _digest([certificate["model"], certificate["techniques"]])
    path = _folder(cache) / f"{'_'.join(certificate['axes'])}-{subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, certificate)
    return path


def find(
    axes: Mapping[str, int],
    model: ModelConfig,
    parallel: ParallelConfig,
    cache: Path,
    kind: OptimizerKind = OptimizerKind.adamw,
    precision: PrecisionConfig | None = None,
    freeze: Sequence[str] = (),
) -> str | None:
    """Return the digest of a passed certificate, or None. The certificate must be of this code and this version of
    torch and cover these axes, the shrunk model and the techniques.
    """
    wanted = [plain(shrink(model, parallel)), techniques(parallel, kind, precision, freeze)]
    for path in sorted(_folder(cache).glob("*.json")):
        try:
            certificate = read_json(path, _SHAPE)
        except UnreadableFileError:  # damaged: it certifies nothing
            continue
        subject = [certificate["model"], certificate["techniques"]]
        if certificate["pass"] and set(axes) <= set(certificate["axes"]) and subject == wanted:
            return _digest(certificate)
    return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _folder(cache: Path) -> Path:
    return cache / "certificates" / f"{sources_digest()}-{torch.__version__}"
