"""Transformer Engine's pure-Python wheel (1.2 MB), in the version that `precision/transformer_engine.py` needs.

Downloaded once from the package registry and unpacked in pytest's cache. It is not installed: that would change the
tests of "not installed", and it does not import without its libraries.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

from precision.transformer_engine import VERSION

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / ".pytest_cache" / f"transformer-engine-{VERSION}"


def sources() -> Path:
    """The folder with the package `transformer_engine`. Tests fail if it cannot be downloaded."""
    if not KEPT.exists():
        KEPT.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT.parent) as scratch:
            _fetch(Path(scratch))
            (Path(scratch) / "unpacked").rename(KEPT)
    return KEPT


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, f"transformer-engine=={VERSION}", "-d", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"these tests need transformer-engine {VERSION} from the package registry: {done.stderr[-500:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    path = sources().joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
