"""The online filter without a run: exact numbers, the hardest sequences, hysteresis, random draws and noise."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import ConfigError
from train.online_filter import OnlineConfig, OnlineFilter, OnlineWindow


def losses_of(ordinals):
    """Return a random but fixed loss for each sequence."""
    return np.asarray([np.random.default_rng(one).normal(3, 1) for one in ordinals])


def make(score=losses_of, **settings):
    return OnlineFilter(OnlineConfig(every=4, **settings), global_batch_size=8, key=1, score=score)


def test_a_window_takes_the_hardest_candidates_exactly():
    window = make(revive=0.0).next(OnlineWindow(), step=0, steps=4)
    assert len(window.rows) == 32 and window.cursor == 64 and window.rows == sorted(window.rows)
    hardest = np.argsort(-losses_of(range(64)))[:32]
    assert set(window.rows) == set(hardest.tolist())
    assert losses_of(window.rows).min() == window.threshold
    easiest = make(lambda ordinals: -losses_of(ordinals), revive=0.0).next(OnlineWindow(), 0, 4)
    assert not set(easiest.rows) & set(window.rows), "control: the easiest"


def test_sequences_near_the_threshold_are_deferred_once():
    filter_ = make(revive=0.0, hysteresis=0.3)
    first = filter_.next(OnlineWindow(), 0, 4)
    near = [one for one in range(64) if first.threshold - 0.3 < losses_of([one])[0] < first.threshold]
    assert near and first.deferred == near
    second = filter_.next(first, 4, 4)
    assert second.cursor == 64 + 64 - len(near) and len(second.rows) == 32
    assert not set(second.deferred) & set(near), "deferred only once"
    assert make(revive=0.0, hysteresis=0.0).next(OnlineWindow(), 0, 4).deferred == [], "control"


def test_no_sequence_comes_twice():
    filter_, window, seen = make(), OnlineWindow(), []
    for step in range(0, 40, 4):
        window = filter_.next(window, step, 4)
        seen += window.rows
    assert len(seen) == len(set(seen)) == 10 * 32 and window.generation == 10


def test_revived_sequences_are_drawn_from_the_rest():
    hard = set(make(revive=0.0).next(OnlineWindow(), 0, 4).rows)
    window = make(revive=0.25).next(OnlineWindow(), 0, 4)
    assert len(window.rows) == 32 and len(set(window.rows) - hard) >= 1
    other = OnlineFilter(OnlineConfig(every=4, revive=0.25), 8, 2, losses_of).next(OnlineWindow(), 0, 4)
    assert other.rows != window.rows, "the draw depends on the key"
    later = make(revive=0.25).next(OnlineWindow(generation=1), 0, 4)
    assert later.threshold == window.threshold and later.rows != window.rows, "and differs between windows"


def noisy(ordinals):
    """Return losses of which a quarter is NaN and another quarter is 9, above `max_loss`."""
    found = losses_of(ordinals)
    found[::4], found[1::4] = np.nan, 9.0
    return found


def test_noise_is_neither_drawn_nor_deferred():
    window = make(noisy, max_loss=8.0, keep=0.25, revive=0.5, hysteresis=10.0).next(OnlineWindow(), 0, 4)
    assert len(window.rows) == 32 and min(one % 4 for one in window.rows) == 2, "drawn only if nothing else is left"
    assert len(window.deferred) == 32 and min(one % 4 for one in window.deferred) == 2
    unbound = make(noisy, keep=0.25, revive=0.5, hysteresis=10.0).next(OnlineWindow(), 0, 4)
    assert 1 in {one % 4 for one in unbound.rows} & {one % 4 for one in unbound.deferred}, "control"


def test_the_first_new_sequence_may_be_deferred():
    def score(ordinals):
        return np.asarray([3.0 + (0 < one - 100 <= 32) - (one > 132) for one in ordinals])

    window = make(score, revive=0.0, hysteresis=1.5).next(OnlineWindow(cursor=100), 0, 4)
    assert window.rows == list(range(101, 133)) and window.deferred == [100]


@pytest.mark.parametrize("setting", [{"keep": 1.0}, {"revive": 1.0}, {"hysteresis": -1.0}])
def test_bad_settings_are_rejected(setting):
    with pytest.raises(ConfigError):
        OnlineConfig(**setting)
