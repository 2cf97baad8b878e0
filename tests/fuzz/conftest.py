"""Provide the folder in which the fuzz tests put their files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all examples of a file share: one for each example would take most of the time."""
    return tmp_path_factory.mktemp("fuzz")
