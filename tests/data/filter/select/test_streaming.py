"""Selection from a stream holds the keep rate from the first batches on, under drift, ties and jumps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.errors import DataError
from data.filter.config import FilterRules, OnError, SelectConfig
from data.filter.input.records import Reason
from data.filter.select import streaming as module
from data.filter.select.selection import CODE, ShardScores
from data.filter.select.streaming import StreamSelector
from tests.data.filter.select.test_selection import KEPT, take

COUNT = 20_000


def records(kind: str, seed: int = 0, tokens: bool = False) -> ShardScores:
    random = np.random.default_rng(seed)
    length = np.ceil(np.exp(random.normal(6, 1.2, COUNT))).astype(np.int64)
    scores = {
        "normal": random.normal(0, 1, COUNT),
        "ties": random.integers(1, 6, COUNT).astype(np.float64),
        "constant": np.full(COUNT, 3.0),
        "drift": random.normal(0, 0.5, COUNT) - np.linspace(0, 4, COUNT),
        "fast drift": random.normal(0, 0.1, COUNT) - np.linspace(0, 40, COUNT),
        "rise": random.normal(0, 0.1, COUNT) + np.linspace(0, 40, COUNT),
        "jump": random.normal(0, 1, COUNT) + 10 * (np.arange(COUNT) > COUNT // 2),
        "tails": random.standard_cauchy(COUNT) * 1000,
    }[kind]
    weight, hashes = length if tokens else np.ones(COUNT, np.int64), random.integers(0, 2**64, COUNT, dtype=np.uint64)
    return ShardScores("stream", scores, np.zeros(COUNT, np.int64), length, weight, hashes)


def batches(shard: ShardScores, size: int) -> list[ShardScores]:
    starts = range(0, len(shard.score), size)
    return [take(shard, slice(start, start + size), f"batch at {start}") for start in starts]


def decided(shard: ShardScores, size: int, rules: FilterRules, noise: float | None = None) -> np.ndarray:
    selector = StreamSelector("code", rules, noise)
    return np.concatenate([selector.decide(batch) for batch in batches(shard, size)])


def assert_held(shard: ShardScores, codes: np.ndarray, rate: float, after: int = COUNT // 10):
    """Assert at every 1,000th record from `after`: the total is off by at most the larger of 1% and one document."""
    weight = shard.weight[: len(codes)]
    total, kept = np.cumsum(weight), np.cumsum(weight * KEPT[codes])
    ends = np.arange(after, len(codes) + 1, 1000) - 1
    target = rate * total[ends]
    off, largest = np.abs(kept[ends] - target), np.maximum.accumulate(weight)[ends]
    assert (off <= np.maximum(0.01 * target, largest)).all(), f"off by {(off / target).max():.3f}"


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "drift", "fast drift", "rise", "jump", "tails"])
def test_rate_is_held(kind, tokens):
    shard = records(kind, tokens=tokens)
    for size, keep in ((1000, 0.5), (250, 0.2)):
        assert_held(shard, decided(shard, size, FilterRules(keep=keep)), keep)


@pytest.mark.parametrize("kind", ["drift", "ties", "jump"])
def test_a_constant_threshold_misses_the_rate(kind):
    shard = records(kind)
    codes = np.where(shard.score >= np.median(shard.score[: COUNT // 20]), CODE[Reason.hard], CODE[Reason.easy])
    with pytest.raises(AssertionError, match="off by"):
        assert_held(shard, codes, 0.5)


def test_without_repayment_drift_misses_the_rate(monkeypatch):
    monkeypatch.setattr(module, "_REPAID", 0.0)
    monkeypatch.setattr(module, "_TOLERANCE", 1.0)
    shard = records("drift")
    with pytest.raises(AssertionError, match="off by"):
        assert_held(shard, decided(shard, 1000, FilterRules()), 0.5)


@pytest.mark.parametrize("tokens", [False, True])
def test_batches_of_one_record(tokens):
    shard = take(records("normal", tokens=tokens), slice(2500))
    kept = KEPT[decided(shard, 1, FilterRules())]
    assert abs(shard.weight[kept].sum() / shard.weight.sum() - 0.5) < 0.01
    assert shard.score[kept].mean() > shard.score[~kept].mean() + (0.2 if tokens else 0.5), "the harder half"


def test_the_threshold_remembers():
    """Each batch is all hard or all easy. A quantile of each batch alone would keep half of the easy batches."""
    shard = records("normal")
    half = np.random.default_rng(0).random(COUNT // 100) < 0.5
    sign = np.where(np.repeat(half, 100), 1, -1)
    shard = replace(shard, score=sign * np.abs(shard.score))
    codes = decided(shard, 100, FilterRules())
    assert KEPT[codes[sign > 0]].mean() > 0.55 > 0.45 > KEPT[codes[sign < 0]].mean()


def test_a_deficit_is_repaid_and_not_only_bounded():
    """A first batch of noise leaves a deficit. All later batches are the same, so only repayment can remove it."""
    shard = records("normal")
    selector, owed = StreamSelector("code", FilterRules(), noise=50.0), []
    for batch in (replace(shard, score=np.full(COUNT, 99.0)), *[shard] * 12):
        selector.decide(batch)
        owed.append(0.5 * selector.seen - selector.kept)
    assert owed[0] == COUNT // 2 and owed[1] > 50, "the deficit that the tolerance allows"
    assert abs(owed[-1]) < owed[1] / 4


def test_order_within_a_batch_does_not_matter():
    shard = batches(records("ties"), 1000)[0]
    codes = [decided(one, 1000, FilterRules()) for one in (shard, take(shard, slice(None, None, -1)))]
    assert np.array_equal(codes[0], codes[1][::-1])


def test_revived_noise_protected_and_unscored():
    shard = records("normal")
    shard.score[::40], shard.score[1::40] = 100.0, np.nan
    codes = decided(shard, 1000, FilterRules(keep=0.4, select=SelectConfig(revive=0.25)), noise=50.0)
    assert (codes[::40] == CODE[Reason.noise]).all() and (codes[1::40] == CODE[Reason.unscored]).all()
    assert abs(KEPT[codes].mean() - 0.4) < 0.004
    assert abs((codes == CODE[Reason.revived]).sum() / KEPT[codes].sum() - 0.25) < 0.03
    whole = decided(shard, 1000, FilterRules(keep=0.4, select=SelectConfig(protect=["code"])), noise=50.0)
    assert (whole == CODE[Reason.protected]).all()
    everything = FilterRules(keep=1.0, select=SelectConfig(revive=0.2))  # the revival probability rounds above 1
    assert KEPT[decided(batches(records("normal"), 1000)[0], 1000, everything)].all()


def test_unscored_records_follow_on_error():
    batch = batches(records("normal"), 1000)[0]
    batch.score[:100] = np.nan
    codes = StreamSelector("code", FilterRules(on_error=OnError.keep)).decide(batch)
    assert (codes[:100] == CODE[Reason.protected]).all() and abs(KEPT[codes].sum() - 500) <= 1
    with pytest.raises(DataError, match="100 records of batch at 0 have no finite score"):
        StreamSelector("code", FilterRules(on_error=OnError.fail)).decide(batch)
