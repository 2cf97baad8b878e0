"""What transformers made of the sizes and pictures: see make_fixtures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def theirs() -> Any:
    with np.load(Path(__file__).with_name("fixtures.npz")) as stored:
        return dict(stored)
