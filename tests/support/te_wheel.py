"""The sources of Transformer Engine that `precision/transformer_engine.py` is written for.

Its wheel of pure Python (1.2 MB) comes from the package registry once and is unpacked beside pytest's cache, not
installed: tests of "not installed" would differ, and without its libraries it imports nowhere.
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

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".pytest_cache" / f"transformer-engine-{VERSION}"


def sources() -> Path:
    """The folder that holds the package `transformer_engine`. Without it a test fails: nothing else holds the file to
    the library.
    """
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
    """A module's syntax."""
    path = sources().joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
