"""Provide a finished run, its export and its import, which hostile tests damage copies of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.tiny import TINY


@pytest.fixture(scope="module")
def finished(tmp_path_factory, executables, small_corpus) -> Path:
    """Return the directory of a run with two checkpoints."""
    root = tmp_path_factory.mktemp("hostile")
    own = [f"run.root={root}", "run.name=done", "checkpoint.every=3", "evaluation.sequences=2"]
    leviathan(executables, root, "train", *TINY, *small_corpus, *own)
    return root / "done"


@pytest.fixture(scope="module")
def exported(executables, finished) -> Path:
    out = finished.parent / "exported"
    leviathan(executables, out.parent, "export", str(finished), f"out={out}", "drop_selection_bias=true", "check=never")
    return out


@pytest.fixture(scope="module")
def imported(executables, exported) -> Path:
    out = exported.parent / "imported"
    leviathan(executables, out.parent, "import", str(exported), f"out={out}", "check=never")
    return out


def leviathan(executables: Path, folder: Path, *words: str) -> None:
    subprocess.run([executables / "leviathan", *words], cwd=folder, check=True, capture_output=True, timeout=300)
