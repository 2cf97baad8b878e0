"""Selection from a stream: the rate is held from the first batches on, whatever the stream does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError, DataError
from data.filter.config import FilterRules, OnError, SelectConfig
from data.filter.input.records import Reason
from data.filter.select import streaming as module
from data.filter.select.selection import CODE, REASONS, ShardScores
from data.filter.select.streaming import StreamSelector

KEPT = np.array([reason.kept for reason in REASONS])
NAMES = ("code", "prose")
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
    weight = length if tokens else np.ones(COUNT, np.int64)
    domain, hashes = random.choice(2, COUNT, p=[0.7, 0.3]), random.integers(0, 2**64, COUNT, dtype=np.uint64)
    return ShardScores("stream", scores, domain, length, weight, hashes)


def batches(all_: ShardScores, size: int) -> list[ShardScores]:
    columns = (all_.score, all_.domain, all_.length, all_.weight, all_.hash)
    return [
        ShardScores(f"batch at {start}", *(column[start : start + size] for column in columns))
        for start in range(0, len(all_.score), size)
    ]


def assert_held(shard: ShardScores, codes: np.ndarray, rate: float, after: int = COUNT // 10) -> None:
    """Each thousand records past the first `after`, each domain is within the larger of 1% and one document."""
    for domain in range(2):
        mine = shard.domain[: len(codes)] == domain
        weight = np.where(mine, shard.weight[: len(codes)], 0)
        total, kept = np.cumsum(weight), np.cumsum(weight * KEPT[codes])
        ends = np.arange(after, len(codes) + 1, 1000) - 1
        target = rate * total[ends]
        off, largest = np.abs(kept[ends] - target), np.maximum.accumulate(weight)[ends]
        assert (off <= np.maximum(0.01 * target, largest)).all(), f"domain {domain}: off by {(off / target).max():.3f}"


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "drift", "fast drift", "rise", "jump", "tails"])
def test_rate_is_held(kind: str, tokens: bool) -> None:
    for size, keep in ((1000, 0.5), (250, 0.2)):
        shard = records(kind, tokens=tokens)
        selector = StreamSelector(NAMES, FilterRules(keep=keep))
        codes = np.concatenate([selector.decide(batch) for batch in batches(shard, size)])
        assert_held(shard, codes, keep)


@pytest.mark.parametrize("kind", ["drift", "ties", "jump"])
def test_a_threshold_from_the_beginning_does_not_hold_it(kind: str) -> None:
    shard = records(kind)
    codes = np.where(shard.score >= np.median(shard.score[: COUNT // 20]), CODE[Reason.hard], CODE[Reason.easy])
    with pytest.raises(AssertionError, match="off by"):
        assert_held(shard, codes, 0.5)


def test_without_repayment_and_tolerance_drift_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPAID", 0.0)
    monkeypatch.setattr(module, "_TOLERANCE", 1.0)
    shard = records("drift")
    selector = StreamSelector(NAMES, FilterRules())
    codes = np.concatenate([selector.decide(batch) for batch in batches(shard, 1000)])
    with pytest.raises(AssertionError, match="off by"):
        assert_held(shard, codes, 0.5)


@pytest.mark.parametrize("tokens", [False, True])
def test_batches_of_one_record(tokens: bool) -> None:
    shard = records("normal", tokens=tokens)
    selector = StreamSelector(NAMES, FilterRules())
    codes = np.concatenate([selector.decide(batch) for batch in batches(shard, 1)[:4000]])
    weight = shard.weight[:4000]
    assert abs(weight[KEPT[codes]].sum() / weight.sum() - 0.5) < 0.01
    kept = KEPT[codes]
    assert shard.score[:4000][kept].mean() > shard.score[:4000][~kept].mean() + (0.2 if tokens else 0.5), (
        "still the harder"
    )


def test_the_threshold_remembers() -> None:
    """A steady stream, in batches that each cover one half of the scores: a quantile of each batch would keep half of
    the easy half.
    """
    shard = records("normal")
    half = np.random.default_rng(0).random(COUNT // 100) < 0.5
    sign = np.where(np.repeat(half, 100), 1, -1)
    shard = replace(shard, score=sign * np.abs(shard.score), domain=np.zeros(COUNT, np.int64))
    selector = StreamSelector(NAMES, FilterRules())
    codes = np.concatenate([selector.decide(batch) for batch in batches(shard, 100)])
    assert KEPT[codes[sign > 0]].mean() > 0.55 > 0.45 > KEPT[codes[sign < 0]].mean()


def test_what_is_owed_is_paid_back_and_not_only_kept_within_bounds() -> None:
    """A first batch of noise leaves a debt; then every batch is the same, so that nothing but repayment ends it."""
    shard = replace(records("normal"), domain=np.zeros(COUNT, np.int64))
    selector, owed = StreamSelector(NAMES, FilterRules(), noise=50.0), []
    for batch in (replace(shard, score=np.full(COUNT, 99.0)), *[shard] * 12):
        selector.decide(batch)
        state = selector.state()["code"]
        owed.append(0.5 * state["seen"] - state["kept"])
    assert owed[0] == COUNT // 2 and owed[1] > 50, "as much as the tolerance leaves"
    assert abs(owed[-1]) < owed[1] / 4


def test_a_stream_goes_on_from_its_state() -> None:
    parts = batches(records("drift", tokens=True), 500)
    whole = StreamSelector(NAMES, FilterRules())
    expected = [whole.decide(part) for part in parts]
    first = StreamSelector(NAMES, FilterRules())
    for part in parts[:7]:
        first.decide(part)
    second = StreamSelector(NAMES, FilterRules())
    second.load(json.loads(json.dumps(first.state())))
    assert all(np.array_equal(second.decide(part), codes) for part, codes in zip(parts[7:], expected[7:], strict=True))
    fresh = StreamSelector(NAMES, FilterRules())
    assert not all(np.array_equal(fresh.decide(p), c) for p, c in zip(parts[7:], expected[7:], strict=True))


def test_a_state_of_other_domains_is_refused() -> None:
    state = StreamSelector(NAMES, FilterRules()).state()
    with pytest.raises(DataError, match="of domains"):
        StreamSelector(("code",), FilterRules()).load(state)


def test_order_within_a_batch_does_not_matter() -> None:
    shard = batches(records("ties"), 1000)[0]
    turned = ShardScores(
        "turned", *(getattr(shard, key)[::-1] for key in ("score", "domain", "length", "weight", "hash"))
    )
    codes = [StreamSelector(NAMES, FilterRules()).decide(batch) for batch in (shard, turned)]
    assert np.array_equal(codes[0], codes[1][::-1])


def test_revived_noise_protected_and_unscored() -> None:
    shard = records("normal")
    shard.score[::40], shard.score[1::40] = 100.0, np.nan
    rules = FilterRules(keep=0.4, select=SelectConfig(revive=0.25, protect=["prose"]))
    selector = StreamSelector(NAMES, rules, noise=50.0)
    codes = np.concatenate([selector.decide(batch) for batch in batches(shard, 1000)])
    code = shard.domain == 0
    assert (codes[~code] == CODE[Reason.protected]).all()
    assert (codes[::40][code[::40]] == CODE[Reason.noise]).all()
    assert (codes[1::40][code[1::40]] == CODE[Reason.unscored]).all()
    assert abs(KEPT[codes[code]].mean() - 0.4) < 0.004
    revived = (codes[code] == CODE[Reason.revived]).sum() / KEPT[codes[code]].sum()
    assert abs(revived - 0.25) < 0.03


def test_unscored_records_are_kept_or_refused_when_asked() -> None:
    batch = batches(records("normal"), 1000)[0]
    batch.score[:100] = np.nan
    codes = StreamSelector(NAMES, FilterRules(on_error=OnError.keep)).decide(batch)
    assert (codes[:100] == CODE[Reason.protected]).all() and abs(KEPT[codes].sum() - 500) <= 1
    with pytest.raises(DataError, match="100 records of batch at 0 have no finite score"):
        StreamSelector(NAMES, FilterRules(on_error=OnError.fail)).decide(batch)


def test_a_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor"):
        StreamSelector(NAMES, FilterRules(select=SelectConfig(floor=3)))
