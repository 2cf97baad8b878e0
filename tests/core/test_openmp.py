"""Waiting OpenMP threads yield their core, unless the environment says otherwise."""

from __future__ import annotations

import os

import pytest

from core.openmp import SPIN_COUNT, share_cores


@pytest.mark.parametrize(
    "given, spins", [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_the_spin_count_is_set_unless_the_environment_decides(monkeypatch, given, spins):
    monkeypatch.setattr(os, "environ", dict(given))
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
