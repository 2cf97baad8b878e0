"""The table of counts in the guide is what the command prints."""

from __future__ import annotations

import pytest

from bench import budget
from bench.budget_table import table
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text()
FOUND = {
    "launches": {"1": 121, "32": 121},
    "syncs": 0,
    "saved_bytes": {"none": 141.8e3, "full": 10.3e3},
    "loss_peak_bytes": 436e6,
    "loss_peak_bytes_tp2": 436e6,
    "loss_launches": 213,
    "loss_launches_tp2": 122,
    "step_syncs": 0,
}


def test_counts_become_a_table():
    lines = table(FOUND).splitlines()
    assert lines[3] == "| launches of a layer, 32 documents a row | 1,074 | 121 | 150 |"
    assert lines[5] == "| activations a token keeps in a layer, `recompute=none` | 294 kB | 142 kB | 185 kB |"
    assert lines[7:9] == [
        "| peak memory of head and loss | 20.00 GB | 0.44 GB | 1.50 GB |",
        "| peak memory of head and loss, `tp=2` |  | 0.44 GB | 1.50 GB |",
    ]
    assert lines[-2] == "| launches of head and loss, `tp=2` |  | 122 | 400 |"


@pytest.mark.slow
def test_the_guide_has_the_counts_of_today():
    assert table(budget.report()) in PAGE
    assert table(FOUND) not in PAGE, "control"
