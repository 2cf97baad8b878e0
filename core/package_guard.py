"""Our top-level packages carry plain names (`data`, `train`, ...): make sure that it is ours that are imported.

A user's folder may hold a `data/` or a `model.py` of its own. Python puts the current folder first on the path of
`python -m`, so we take it off; what is shadowed all the same (by another distribution, say) is refused by name.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from core.errors import LeviathanError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "model", "precision", "parallel", "hparam", "data", "train", "launch", "configs")


class ForeignPackageError(LeviathanError):
    """A package of ours is hidden by somebody else's of the same name."""

    exit_code = 2


def drop_working_directory() -> None:
    """Take the current folder off the import path, unless our packages live there."""
    here = Path.cwd().resolve()
    if here != ROOT:
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]


def check_packages(names: tuple[str, ...] = PACKAGES) -> None:
    """Raise `ForeignPackageError` where a name of ours leads elsewhere, with the file and the fix."""
    for name in names:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent != ROOT / name:
            found = "missing" if spec is None else origin or "a folder without __init__.py"
            raise ForeignPackageError(
                f"the package {name!r} is not Leviathan's but {found}: set PYTHONSAFEPATH=1, start through the "
                f"leviathan command, or remove what else provides {name!r}"
            )


def sources_digest() -> str:
    """Hash of every source file of our packages, 16 hexadecimal digits: which version of the code this is."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((ROOT / name).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
