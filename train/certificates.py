"""Certificates that this machine has: which axes this very code has been proven under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.files import read_json, write_json
from core.origin import sources_digest


def keep(certificate: Mapping[str, Any], cache: Path) -> Path:
    """Store a certificate where `find` looks; returns its path."""
    path = _folder(cache) / f"{'_'.join(certificate['axes'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, certificate)
    return path


def find(axes: Mapping[str, int], cache: Path) -> str | None:
    """The hash of a certificate that covers these axes, of this code and this torch; None where there is none."""
    for path in sorted(_folder(cache).glob("*.json")):
        certificate = read_json(path)
        if certificate["pass"] and set(axes) <= set(certificate["axes"]):
            return hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest()[:16]
    return None


def _folder(cache: Path) -> Path:
    return cache / "certificates" / f"{sources_digest()}-{torch.__version__}"
