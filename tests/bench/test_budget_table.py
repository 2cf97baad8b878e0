"""The table of counts in the guide is what the command prints."""

from __future__ import annotations

import pytest

from bench import budget
from bench.budget_table import table
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text()
FOUND = {
    "launches": {"1": 121, "32": 121},
    "launches_recompute": {"none": 121, "selective": 125, "full": 160},
    "launches_gathered": 120,
    "launches_ep": 150,
    "launches_prepare": {"1": 33, "32": 32},
    "moved_bytes": {"add_": 26.4e9, "_to_copy": 13.97e9},
    "syncs": 0,
    "syncs_ep": 1,
    "syncs_fp8": {"none": 1},
    "saved_bytes": {"none": 141.8e3, "full": 10.3e3},
    "saved_bytes_fp8": {"full": 10.3e3},
    "loss_peak_bytes": 436e6,
    "loss_peak_bytes_tp2": 436e6,
    "loss_launches": 213,
    "loss_launches_tp2": 122,
    "step_syncs": 0,
}


def test_counts_become_a_table():
    lines = table(FOUND).splitlines()
    assert lines[3] == "| launches of a layer, 32 documents a row | 1,074 | 121 | 139 |"
    for line in (
        "| memory traffic of a layer to add up gradients (`add_`) |  | 26.4 GB | 26.5 GB |",
        "| launches once per micro-batch, for all layers |  | 33 | 33 |",
        "| activations a token keeps in a layer, `recompute=none` | 294 kB | 142 kB | 145 kB |",
        "| activations a token keeps in a layer, `precision=fp8`, `recompute=full` |  | 10 kB | 12 kB |",
        "| peak memory of head and loss | 20.00 GB | 0.44 GB | 0.50 GB |",
        "| peak memory of head and loss, `tp=2` |  | 0.44 GB | 0.50 GB |",
        "| launches of head and loss, `tp=2` |  | 122 | 122 |",
    ):
        assert line in lines


@pytest.mark.slow
def test_the_guide_has_the_counts_of_today():
    assert table(budget.report()) in PAGE
    assert table(FOUND) not in PAGE, "control"
