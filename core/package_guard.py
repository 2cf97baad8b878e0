"""Make sure that `data`, `train`, ... are imported from Leviathan and not from a user's folder.

A user's folder may contain its own `data/` or `model.py`, and `python -m` puts the current folder first on the import
path. This module removes that folder from the path, or puts it last if PYTHONPATH names it, and reports a package that
is still shadowed, for example by another distribution.
"""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from core.errors import LeviathanError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "model", "precision", "parallel", "hparam", "data", "train", "launch", "configs")


class ForeignPackageError(LeviathanError):
    """Another package of the same name shadows one of ours."""

    exit_code = 2


def drop_working_directory() -> None:
    """Remove the current folder from the import path, unless our packages are in it. If PYTHONPATH names it, it becomes
    the last of the path, where it shadows nothing.
    """
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        raise LeviathanError("the working directory no longer exists: change to another one (cd)") from None
    if here != ROOT:
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]
        named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        if not sys.flags.ignore_environment and here in [Path(entry).resolve() for entry in named]:
            sys.path.append(str(here))


def check_packages(names: tuple[str, ...] = PACKAGES) -> None:
    """Raise `ForeignPackageError` if one of our package names resolves to another file."""
    for name in names:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent != ROOT / name:
            found = "missing" if spec is None else origin or "a folder without __init__.py"
            raise ForeignPackageError(
                f"the package {name!r} is not Leviathan's but {found}: set PYTHONSAFEPATH=1, start through the "
                f"leviathan command, or remove the other package {name!r}"
            )


def sources_digest() -> str:
    """Return a hash of all source files of our packages, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((ROOT / name).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
