"""A slow exchange of tokens hides behind the shared expert, in both passes, and under recomputation."""

from __future__ import annotations

import pytest

from bench.overlap.__main__ import CASES, LIMIT, measure


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_shorter_of_exchange_and_shared_expert_is_hidden(ranks, name):
    times = measure(ranks, name)
    assert times.ratio <= LIMIT, times
    assert times.waiting_ratio > 1.3, "the control: exchanges that are waited for at once"
