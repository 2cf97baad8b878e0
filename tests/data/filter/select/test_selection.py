"""Selection meets the keep rate for any distribution of scores and any partition of the records over ranks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from core.errors import DataError
from data.filter.config import FilterRules, OnError, SelectConfig
from data.filter.input.records import Reason
from data.filter.select import selection as module
from data.filter.select.selection import CODE, REASONS, ShardScores, Thresholds, noise_threshold, quantise, select
from tests.data.filter.threads import on_threads

KEPT = np.array([reason.kept for reason in REASONS])
NAMES = ("code", "prose", "single", "few")


def records(count: int, seed: int, scores: str = "normal", unit: str = "documents") -> ShardScores:
    """Return `count` records in two large domains, one of 1 record and one of 5. `normal` scores grow with length."""
    random = np.random.default_rng(seed)
    domain = random.choice(2, count, p=[0.8, 0.2])
    domain[random.choice(count, 6, replace=False)] = [2, 3, 3, 3, 3, 3]
    length = np.ceil(np.exp(random.normal(6, 1.5, count))).astype(np.int64)
    made: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: random.normal(3 + np.log(length) / 3, 1),
        "ties": lambda: random.integers(1, 6, count).astype(np.float64),
        "constant": lambda: np.full(count, 2.5),
        "drift": lambda: random.normal(5, 0.5, count) - np.linspace(0, 4, count),
        "tails": lambda: random.standard_cauchy(count) * 100,
        "lengths": lambda: length.astype(np.float64),
    }
    weight = length if unit == "tokens" else np.ones(count, np.int64)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    return ShardScores("all", made[scores](), domain, length, weight, hashes)


def take(shard: ShardScores, rows: np.ndarray | slice, name: str = "part") -> ShardScores:
    columns = (shard.score, shard.domain, shard.length, shard.weight, shard.hash)
    return ShardScores(name, *(column[rows] for column in columns))


def decide(shard: ShardScores, rules: FilterRules, noise: float | None = None) -> tuple[Thresholds, np.ndarray]:
    decision = select(lambda: [shard], NAMES, rules, noise)
    return decision, decision.reasons(shard)


def assert_rates(shard: ShardScores, codes: np.ndarray, rate: float | dict[int, float]):
    """Assert that the kept weight of each domain misses its target by at most the larger of 1% and one document."""
    for domain in np.unique(shard.domain):
        mine = shard.domain == domain
        target = (rate[domain] if isinstance(rate, dict) else rate) * shard.weight[mine].sum()
        kept = shard.weight[mine & KEPT[codes]].sum()
        assert abs(kept - target) <= max(0.01 * target, shard.weight[mine].max()), f"domain {domain}: rate is off"


ALL_SCORES = ["normal", "ties", "constant", "drift", "tails", "lengths"]


@pytest.mark.parametrize("scores", ALL_SCORES)
@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_rate_is_met_to_half_a_document(scores, unit):
    for seed, keep in enumerate((0.5, 0.07, 0.93, 1.0, *[0.3] * 4)):
        shard = records(3000 if keep != 0.3 else 200 + seed, seed, scores, unit)
        for buckets in (1, 8):
            _, codes = decide(shard, FilterRules(keep=keep, select=SelectConfig(length_buckets=buckets)))
            for domain in range(4):
                weight = shard.weight[shard.domain == domain]
                kept = weight[KEPT[codes[shard.domain == domain]]].sum()
                assert abs(kept - keep * weight.sum()) <= weight.max() / 2 + 1e-6


@pytest.mark.parametrize(("scores", "seen"), [("ties", 3000), ("drift", 150)])
def test_a_plain_median_misses_the_rate(scores, seen):
    """Control: a median threshold misses the rate if scores tie, or if they drift and only the first 150 are used."""
    shard = records(3000, 0, scores)
    codes = np.where(shard.score >= np.median(shard.score[:seen]), CODE[Reason.hard], CODE[Reason.easy])
    with pytest.raises(AssertionError, match="rate is off"):
        assert_rates(shard, codes, 0.5)


def test_length_buckets_remove_the_preference_for_length():
    """Scores grow with length, so without buckets the kept half of the documents has far more than half the tokens."""
    shard = records(5000, 2)
    kept_tokens = []
    for buckets in (1, 8):
        _, codes = decide(shard, FilterRules(select=SelectConfig(length_buckets=buckets)))
        kept_tokens.append(shard.length[KEPT[codes]].sum() / shard.length.sum())
    assert kept_tokens[0] > 0.64 and abs(kept_tokens[1] - 0.5) < 0.08


def test_buckets_hold_whole_lengths_and_keep_their_hardest():
    shard = records(5000, 3)
    decision, codes = decide(shard, FilterRules(select=SelectConfig(length_buckets=4)))
    group = decision.group(shard)
    assert all(len(np.unique(group[(shard.domain == 0) & (shard.length == n)])) <= 1 for n in np.unique(shard.length))
    sizes = np.bincount(group[shard.domain == 0])
    assert len(sizes) == 4 and sizes.min() > 0.9 * sizes.max()
    assert len(decision.starts[3]) == 1, "five records are too few for buckets"
    for place in np.unique(group):
        scores, kept = shard.score[group == place], KEPT[codes[group == place]]
        if kept.any() and not kept.all():
            assert scores[kept].min() >= scores[~kept].max() - 2**-16


# ranks and partitions


@pytest.mark.parametrize("bins", [1 << 22, 1 << 10])
@pytest.mark.parametrize("scores", ["normal", "ties", "constant"])
def test_decisions_do_not_depend_on_ranks_or_shards(scores, bins, monkeypatch):
    """With a small `_BINS`, shards are added up as they come, and ranks are summed one domain at a time."""
    shard = records(2000, 4, scores, "tokens")
    shard.score[::50] = np.nan
    rules = FilterRules(keep=0.4, select=SelectConfig(revive=0.1, floor=4))
    _, codes = decide(shard, rules, noise=7.0)
    monkeypatch.setattr(module, "_BINS", bins)
    decision, _ = decide(shard, rules, noise=7.0)
    for ranks in (1, 2, 4):
        order = np.random.default_rng(ranks).permutation(2000)
        pieces = np.array_split(order, 3 if ranks == 4 else 7)  # a rank may have no shard
        parts = [[take(shard, rows) for rows in pieces[rank::ranks]] for rank in range(ranks)]
        for other in on_threads(
            ranks, lambda one, parts=parts: select(lambda: parts[one.rank], NAMES, rules, 7.0, one.sum)
        ):
            assert other.thresholds == decision.thresholds
            assert all(map(np.array_equal, other.starts, decision.starts))
            assert np.array_equal(other.reasons(shard), codes)
    assert len(np.unique(codes)) >= 4, "the case must contain at least four reasons"
    assert all(len(starts) == 8 for starts in decision.starts[:2])


def test_ranks_that_do_not_sum_decide_differently():
    shard = records(2000, 4)
    halves = [take(shard, rows) for rows in np.array_split(np.arange(2000), 2)]
    alone = [select(lambda half=half: [half], NAMES, FilterRules()) for half in halves]
    assert alone[0].thresholds != alone[1].thresholds


def test_small_histograms_mean_more_passes_only(monkeypatch):
    shard, passes = records(2000, 6, "tails", "tokens"), []

    def shards() -> list[ShardScores]:
        passes[-1] += 1
        return [shard]

    seen = []
    for bins in (1 << 22, 1 << 8):
        monkeypatch.setattr(module, "_BINS", bins)
        passes.append(0)
        seen.append(select(shards, NAMES, FilterRules()).reasons(shard))
    assert np.array_equal(*seen) and passes[0] < passes[1]


def test_memory_does_not_grow_with_domains(monkeypatch):
    """Control: memory grows with `_BINS`, the allowed size of a histogram."""
    random, count, domains = np.random.default_rng(0), 4000, 2000
    length, ones = np.ceil(np.exp(random.normal(6, 1.5, count))).astype(np.int64), np.ones(count, np.int64)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    shard = ShardScores("all", random.normal(0, 1, count), np.arange(count) % domains, length, ones, hashes)
    names, peaks = [str(place) for place in range(domains)], []
    for bins in (1 << 17, 1 << 22):
        monkeypatch.setattr(module, "_BINS", bins)
        tracemalloc.start()
        try:
            codes = select(lambda: [shard], names, FilterRules()).reasons(shard)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[0] < 30e6 < 60e6 < peaks[1], "a table of all lengths would be 131 MB"
    assert (np.bincount(shard.domain, KEPT[codes]) == 1).all(), "half of each domain"


# revived records, noise, protected domains and missing scores


def test_revived_are_a_random_share_of_the_kept():
    shard = records(8000, 7, unit="tokens")
    _, codes = decide(shard, FilterRules(keep=0.4, select=SelectConfig(revive=0.2)))
    assert_rates(shard, codes, 0.4)
    revived, hard, easy = (codes == CODE[reason] for reason in (Reason.revived, Reason.hard, Reason.easy))
    share = shard.weight[revived].sum() / shard.weight[revived | hard].sum()
    assert abs(share - 0.2) < 0.01
    mine = shard.domain == 0
    assert abs(shard.score[mine & revived].mean() - shard.score[mine & easy].mean()) < 0.1, "drawn at any score"
    assert shard.score[mine & hard].mean() > shard.score[mine & revived].mean() + 0.5
    assert not (decide(shard, FilterRules(keep=0.4))[1] == CODE[Reason.revived]).any(), "none by default"


def test_revival_is_independent_of_tie_breaks():
    """All scores are equal, so the hash decides which are hard. The revived must not be the next ones by hash."""
    shard = records(3000, 5, "constant")
    _, codes = decide(shard, FilterRules(keep=0.5, select=SelectConfig(revive=0.5, length_buckets=1)))
    mine = shard.domain == 0
    revived, easy = (shard.hash[mine & (codes == CODE[one])].astype(float) for one in (Reason.revived, Reason.easy))
    assert len(revived) > 500 and abs(revived.mean() / easy.mean() - 1) < 0.05 and revived.min() < easy.max()


def test_noise_is_dropped_before_the_share_is_taken():
    """A tenth is noise and is dropped, yet half of all records is kept. Without a noise threshold, noise is kept."""
    shard = records(4000, 8)
    shard.score[::10] += 1000
    clean = np.delete(shard.score, np.arange(0, 4000, 10))
    noise = noise_threshold(np.append(clean, np.nan), 1.0)
    _, codes = decide(shard, FilterRules(), noise)
    assert (codes[::10] == CODE[Reason.noise]).sum() == 400 == (codes == CODE[Reason.noise]).sum()
    large = shard.domain < 2
    assert_rates(take(shard, large), codes[large], 0.5)
    _, without = decide(shard, FilterRules())
    assert (without[::10] == CODE[Reason.hard]).sum() > 390
    _, codes = decide(shard, FilterRules(keep=0.9), float(np.median(shard.score)))
    assert ((codes == CODE[Reason.hard]) == (codes != CODE[Reason.noise])).all(), "too much noise for the target"


def test_noise_threshold_is_a_quantile_of_finite_scores():
    clean = np.array([3.0, np.nan, 0.0, 1.0, 2.0])
    assert noise_threshold(clean, 0.9) == 3.0 and noise_threshold(clean, 2 / 3) == 2.0
    with pytest.raises(DataError, match="no finite score"):
        noise_threshold(np.array([np.nan]), 0.99)


def test_protected_domains_are_whole_and_floors_hold():
    shard = records(2000, 10)
    shard.score[np.flatnonzero(shard.domain == 1)[:5]] = np.nan
    rules = FilterRules(keep=0.1, select=SelectConfig(protect=["prose"], floor=4))
    _, codes = decide(shard, rules)
    assert (codes[shard.domain == 1] == CODE[Reason.protected]).all()
    few = shard.domain == 3
    assert KEPT[codes[few]].sum() == 4, "one would be kept without a floor"
    assert shard.score[few & ~KEPT[codes]].max() <= shard.score[few & KEPT[codes]].min()
    assert KEPT[codes[shard.domain == 2]].sum() == 1, "a floor keeps no more than the domain has"
    assert_rates(take(shard, shard.domain == 0), codes[shard.domain == 0], 0.1)
    _, codes = decide(shard, FilterRules(keep=0.1))
    assert KEPT[codes[few]].sum() <= 1 and KEPT[codes[shard.domain == 2]].sum() == 0, "control: without a floor"


@pytest.mark.parametrize(("unit", "keep"), [("documents", 0.2), ("tokens", 0.03)])
def test_a_floor_counts_documents_and_the_revived(unit, keep):
    shard = replace(records(100, 3, unit=unit), domain=np.zeros(100, np.int64))
    _, codes = decide(shard, FilterRules(keep=keep, select=SelectConfig(revive=0.5, floor=20)))
    assert KEPT[codes].sum() == 20 and (codes == CODE[Reason.revived]).any()
    assert (codes == CODE[Reason.protected]).any() == (unit == "tokens")


def test_rates_of_single_domains():
    shard = records(3000, 11, unit="tokens")
    rules = FilterRules(keep=0.5, select=SelectConfig(domains={"prose": 0.2, "few": 0.0}))
    _, codes = decide(shard, rules)
    assert_rates(shard, codes, {0: 0.5, 1: 0.2, 2: 0.5, 3: 0.0})
    assert not KEPT[codes[shard.domain == 3]].any()
    with pytest.raises(AssertionError, match="domain 1: rate is off"):
        assert_rates(shard, codes, 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unscored_records(bad):
    shard = records(2000, 12)
    shard.score[:300] = bad
    large = shard.domain < 2
    for on_error, reason in ((OnError.drop, Reason.unscored), (OnError.keep, Reason.protected)):
        _, codes = decide(shard, FilterRules(on_error=on_error))
        assert (codes[:300] == CODE[reason]).all() and not (codes[300:] == CODE[reason]).any()
        assert_rates(take(shard, large), codes[large], 0.5)
    with pytest.raises(DataError, match=r"300 records have no finite score .*shard all"):
        decide(shard, FilterRules(on_error=OnError.fail))
    scored = records(100, 12)
    assert np.array_equal(decide(scored, FilterRules(on_error=OnError.fail))[1], decide(scored, FilterRules())[1])


def test_equal_keys_are_kept_or_dropped_together():
    shard = replace(records(100, 16, "constant"), domain=np.zeros(100, np.int64), hash=np.zeros(100, np.uint64))
    for keep, kept in ((0.4, 0), (0.6, 100)):
        _, codes = decide(shard, FilterRules(keep=keep, select=SelectConfig(length_buckets=1)))
        assert KEPT[codes].sum() == kept


# functions of the module


def test_quantise_is_monotone_and_clamped():
    values = np.sort(np.concatenate([np.random.default_rng(0).standard_cauchy(5000) * 3000, [8192, 8192.4, -8193]]))
    steps = quantise(values)
    assert (np.diff(steps) >= 0).all()
    assert quantise(np.array([1e300]))[0] == 2**31 - 1 and quantise(np.array([-1e300]))[0] == -(2**31 - 1)
    assert quantise(np.array([1.0, -1.0])).tolist() == [65536, -65536]
    assert len(np.unique(quantise(np.arange(100_000).astype(np.float64)))) == 100_000, "lengths stay different"


def test_length_bins_are_monotone_and_narrow():
    lengths = np.unique(np.geomspace(1, 2**32 - 1, 20_000).astype(np.int64))
    bins = module.length_bin(lengths)
    assert (np.diff(bins) >= 0).all() and bins[0] == 0 and bins[-1] == module._LENGTHS - 1
    assert (lengths >= module.shortest(bins)).all() and (lengths < 1.008 * module.shortest(bins) + 1).all()
    assert module.length_bin(np.array([0, 2**40])).tolist() == [0, module._LENGTHS - 1]


def test_the_kept_set_is_that_of_a_sort():
    """One domain, no buckets: the top records by (quantised score, hash) are kept, as near the target as possible."""
    for seed, scores in enumerate(ALL_SCORES):
        shard = records(700, seed, scores, "tokens")
        shard = replace(shard, domain=np.zeros(700, np.int64))
        _, codes = decide(shard, FilterRules(keep=0.37, select=SelectConfig(length_buckets=1)))
        order = np.lexsort((shard.hash, quantise(shard.score)))[::-1]
        total = np.concatenate([[0], np.cumsum(shard.weight[order])])
        count = np.abs(total - 0.37 * total[-1]).argmin()
        assert set(np.flatnonzero(KEPT[codes])) == set(order[:count])


def test_without_carried_rounding_the_rate_is_missed(monkeypatch):
    def without_carry(crossing: object, wanted: np.ndarray, domain: np.ndarray, domains: int) -> object:
        """Round each group by itself, as if it were a domain."""
        keys, kept = honest(crossing, wanted, np.arange(len(wanted)), len(wanted))
        return keys, np.stack([np.bincount(domain, row, domains).astype(np.int64) for row in kept])

    honest = module._round
    monkeypatch.setattr(module, "_round", without_carry)
    with pytest.raises(AssertionError):
        test_rate_is_met_to_half_a_document("ties", "documents")
