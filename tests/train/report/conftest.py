"""Fixtures for tests of the report."""

from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the pictures out of pages: they take seconds to draw."""
    monkeypatch.setattr("train.report.page.draw", lambda runs: [])
