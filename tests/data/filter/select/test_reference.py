"""Selection decides as plain loops over sorted records do, for random records, rules, shards and batches."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data.filter.config import DuplicateConfig, FilterRules, KeepUnit, OnError, SelectConfig
from data.filter.input.records import Reason, Record
from data.filter.pipeline import Filter
from data.filter.select import selection
from data.filter.select.selection import CODE, REASONS, ShardScores, Thresholds, length_bin, quantise, select
from data.filter.select.streaming import StreamSelector
from data.sampling import key_of
from tests.data.filter.select.test_selection import take
from tests.support.filtering import FixedScorer, job, prose, rows_of, write_outputs

NAMES = ("a", "b", "c")
Key = tuple[int, ...]


def records(seed: int, most: int = 260) -> ShardScores:
    """Return records with ties of scores and of hashes, equal lengths, missing scores and outliers."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, most))
    score = random.choice(
        [random.integers(1, 6, count) * 1.0, random.normal(0, 1, count), random.normal(0, 1e-5, count)]
    )
    score[random.random(count) < 0.06] = random.choice([np.nan, np.inf, -np.inf])
    domain = random.choice(3, count, p=[0.75, 0.2, 0.05])
    length = np.where(random.random(count) < 0.3, random.integers(0, 9, count), random.integers(1, 1 << 20, count))
    weight = random.choice([np.ones(count, np.int64), random.integers(1, 400, count)])
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    hashes[random.random(count) < 0.1] = hashes[0]
    return ShardScores("all", score, domain, length, weight, hashes)


def swapped(hash_: int) -> int:
    return (hash_ % 2**32) * 2**32 + hash_ // 2**32


def best(rows: list[int], key: dict[int, Key], weight: dict[int, int], wanted: float) -> tuple[list[int], list[int]]:
    """Return the rows of the highest keys whose weight is at most `wanted`, and those of the next key."""
    ordered, above = sorted({key[row] for row in rows}, reverse=True), 0
    for place, one in enumerate(ordered):
        at = [row for row in rows if key[row] == one]
        if wanted <= 0 or above + sum(weight[row] for row in at) > wanted:
            exact = wanted <= 0 or above == wanted
            return [row for row in rows if key[row] in ordered[:place]], [] if exact else at
        above += sum(weight[row] for row in at)
    return list(rows), []


def keep(groups: list[list[int]], key: dict[int, Key], weight: dict[int, int], wanted: list[float]) -> set[int]:
    """Keep the wanted weight of each group of a domain. The rounding error carries over from the last group on."""
    kept: set[int] = set()
    carry = 0.0
    for rows, one in zip(groups[::-1], wanted[::-1], strict=True):
        sure, next_ = best(rows, key, weight, one)
        without = carry + one - sum(weight[row] for row in sure)
        with_them = without - sum(weight[row] for row in next_)
        stay = abs(with_them) <= abs(without)
        carry = with_them if stay else without
        kept |= {*sure, *(next_ if stay else ())}
    return kept


def expected(
    shard: ShardScores, rules: FilterRules, noise: float | None, by_length: Any
) -> tuple[list[tuple[str, int]], list[int], list[float]]:
    """Return the reason and the bucket of each record, and the weight of each domain and of what to keep of it."""
    rows, steps = range(len(shard.score)), quantise(shard.score).tolist()
    weight, ones = dict(enumerate(shard.weight.tolist())), dict.fromkeys(rows, 1)
    bins, hashes = length_bin(shard.length).tolist(), shard.hash.tolist()
    reasons, buckets, config = ["easy"] * len(rows), [0] * len(rows), rules.select
    passed, targets = [], []
    for row in rows:
        if noise is not None and steps[row] > quantise(np.array([noise]))[0]:
            reasons[row] = "noise"
        if not np.isfinite(shard.score[row]):
            reasons[row] = "protected" if rules.on_error is OnError.keep else "unscored"
        if NAMES[shard.domain[row]] in config.protect:
            reasons[row] = "protected"
    for domain, name in enumerate(NAMES):
        mine = [row for row in rows if shard.domain[row] == domain]
        easy = [row for row in mine if reasons[row] == "easy"]
        kept = [row for row in mine if reasons[row] == "protected"]
        size, held, total = (sum(weight[row] for row in some) for some in (easy, kept, mine))
        target = min(max(config.domains.get(name, rules.keep) * total - held, 0), size)
        passed.append(total)
        targets.append(total if name in config.protect else target + held)
        count = min(max(len(easy) // 32, 1), config.length_buckets if by_length[domain] else 1)
        for row in mine:
            shorter = sum(bins[one] < bins[row] for one in easy)
            buckets[row] = min(shorter * count // max(len(easy), 1), count - 1)
        groups = [[row for row in easy if buckets[row] == place] for place in range(count)]
        sizes = [sum(weight[row] for row in group) for group in groups]
        share = target * (1 - config.revive) / max(size, 1)
        by_score = {row: (steps[row], hashes[row]) for row in mine}
        hard = keep(groups, by_score, weight, [min(share * one, one) for one in sizes])
        rest = [row for row in easy if row not in hard]
        owed = max(target - sum(weight[row] for row in hard), 0) if config.revive else 0
        revived = keep([rest], {row: (swapped(hashes[row]),) for row in mine}, weight, [owed])
        rest = [row for row in rest if row not in revived]
        missing = min(config.floor, len(kept) + len(easy)) - len(kept) - len(hard) - len(revived)
        added = keep([rest], by_score, ones, [max(missing, 0)])
        for some, reason in ((hard, "hard"), (revived, "revived"), (added, "protected")):
            for row in some:
                reasons[row] = reason
    return list(zip(reasons, buckets, strict=True)), passed, targets


def found(shard: ShardScores, decision: Thresholds) -> list[tuple[str, int]]:
    first = np.searchsorted(decision.domain_of_group, shard.domain)
    names = [REASONS[code].name for code in decision.reasons(shard)]
    return list(zip(names, (decision.group(shard) - first).tolist(), strict=True))


def case(seed: int) -> tuple[ShardScores, FilterRules, float | None, Any]:
    random = np.random.default_rng(1000 + seed)
    config = SelectConfig(
        domains=({}, {"b": 0.9}, {"a": 0.0, "c": 1.0})[random.integers(3)],
        floor=int(random.choice([0, 0, 3, 40])),
        protect=["b"] if seed % 5 == 0 else [],
        revive=float(random.choice([0, 0, 0.3])),
        length_buckets=int(random.integers(1, 9)),
    )
    on_error = [OnError.drop, OnError.keep][seed % 2]
    rules = FilterRules(keep=float(random.choice([0.5, 0.31, 0.07, 1.0])), select=config, on_error=on_error)
    return records(seed), rules, None if seed % 4 else 1.0, random.integers(0, 2, 3)


@pytest.mark.parametrize("bins", [1 << 22, 1 << 9])
def test_selection_decides_as_loops_do(bins, monkeypatch):
    """Also in three shards, with histograms of 512 cells, which need many passes."""
    monkeypatch.setattr(selection, "_BINS", bins)
    seen = set()
    for seed in range(30) if bins > 512 else range(3):
        shard, rules, noise, by_length = case(seed)
        parts = [take(shard, rows) for rows in np.array_split(np.arange(len(shard.score)), 3)]
        decision = select(lambda parts=parts: parts, NAMES, rules, noise, by_length=by_length)
        wanted, passed, targets = expected(shard, rules, noise, by_length)
        assert found(shard, decision) == wanted, seed
        assert (decision.passed.tolist(), decision.target.tolist()) == (passed, targets)
        seen |= set(wanted)
    if bins > 512:
        assert {reason for reason, _ in seen} == {"easy", "hard", "revived", "protected", "noise", "unscored"}
        assert {bucket for _, bucket in seen} >= set(range(5))


def test_thresholds_are_described_as_scores():
    """The described score of a bucket divides the kept from the others, at any size and sign."""
    for scale in (1.0, 2000.0, 1e6):
        shard = records(7)
        shard = replace(shard, score=np.arange(len(shard.score)) * scale / 50 - scale, domain=shard.domain * 0)
        decision = select(lambda shard=shard: [shard], ["a"], FilterRules(keep=0.8))
        buckets, group = decision.thresholds["domains"]["a"]["buckets"], decision.group(shard)
        hard = decision.reasons(shard) == CODE[Reason.hard]
        assert len(buckets) == len(decision.starts[0]) > 1
        for place, one in enumerate(buckets):
            kept, dropped = (shard.score[side & (group == place)] for side in (hard, ~hard))
            slack = 1.1 if scale > 5000 else 1.1 if abs(kept.min()) > 8000 else 1e-4
            assert dropped.max(initial=-np.inf) - slack <= one["score"] <= kept.min() + slack
            assert len(dropped), "else any lower score would do"
            assert (
                one["length"] <= shard.length[group == place].clip(1).min() and one["bin"] == decision.starts[0][place]
            )
    nothing = select(lambda: [shard], ["a"], FilterRules(select=SelectConfig(domains={"a": 0.0})))
    assert {one["score"] for one in nothing.thresholds["domains"]["a"]["buckets"]} == {None}


def test_all_domains_have_buckets_by_default():
    shard, rules = records(4), FilterRules(keep=0.5, select=SelectConfig(length_buckets=3))
    assert found(shard, select(lambda: [shard], NAMES, rules)) == expected(shard, rules, None, [1, 1, 1])[0]


@pytest.mark.parametrize("unit", KeepUnit)
def test_a_filter_selects_as_loops_do(unit, tmp_path, small_shards):
    """From the input on: each column that selection reads is what it says, in each of the shards."""
    texts, answers = ([row["text"] for row in prose(220, seed)] for seed in (0, 1))
    rows = [
        {"q": q, "a": "é" * (n % 9) + a, "d": "aaaabac"[n % 7]}
        for n, (q, a) in enumerate(zip(texts, answers, strict=True))
    ]
    rows[50] = {**rows[3], "d": "b"}
    lines = [json.dumps(row) for row in rows]
    lines[70] = "{broken"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config = SelectConfig(domains={"b": 0.8}, revive=0.2, floor=3, length_buckets=3)
    given = dict(unit=unit, keep=0.4, seed=5, select=config, duplicates=DuplicateConfig(near=None))
    keys = {"prompt_key": "q", "response_key": "a", "domain_key": "d"}
    scorer = FixedScorer(lambda record: len(record.answer) % 11)
    one = job(tmp_path / "in.jsonl", tmp_path / "out", scorer=scorer, **keys, **given)
    clean = [Record("", "all", "", "x" * 9)]
    done = Filter(replace(one, clean=clean, count_tokens=lambda texts: [text.count(" ") for text in texts]))
    done.run()
    write_outputs(done, tmp_path / "out")
    found = rows_of(done)
    wanted = {n: "duplicate" if n == 50 else "malformed" if n == 70 else None for n in range(220)}
    passed = [n for n in range(220) if wanted[n] is None]
    whole = [f"{row['q']}\n\n{row['a']}" for row in rows]
    shard = ShardScores(
        "all",
        np.array([len(rows[n]["a"]) % 11 for n in passed], float),
        np.array(["abc".index(rows[n]["d"]) for n in passed]),
        np.array([len(rows[n]["a"].encode()) for n in passed]),
        np.array([whole[n].count(" ") if unit is KeepUnit.tokens else 1 for n in passed]),
        np.array([key_of(5, f"in.jsonl:{n + 1}") for n in passed], np.uint64),
    )
    decided, _, _ = expected(shard, done.rules, 9.0, [True] * 3)
    assert [(found[n]["reason"], found[n]["bucket"]) for n in passed] == decided
    assert {reason for reason, _ in decided} >= {"hard", "easy", "revived", "noise"} and max(decided)[1] == 2
    assert [(found[n]["reason"], found[n]["bucket"], found[n]["kept"]) for n in (50, 70)] == [
        ("duplicate", -1, False),
        ("malformed", -1, False),
    ]
    assert found[50]["detail"] == "in.jsonl:4"
    for n in passed:
        assert found[n]["tokens"] == whole[n].count(" ") and found[n]["length"] == len(whole[n].encode())
        assert (
            found[n]["scored_bytes"] == len(rows[n]["a"].encode())
            and found[n]["kept"] == Reason[found[n]["reason"]].kept
        )
    kept_lines = [lines[n].encode() for n in range(220) if found[n]["kept"]]
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == b"".join(line + b"\n" for line in kept_lines)


# -- streams


class Loop:
    """Decides on batches of (score, hash, weight) with a list of sorted records."""

    def __init__(self, rate: float, revive: float) -> None:
        self.rate, self.seen, self.kept, self.key = Fraction(rate), 0, 0, None
        chance = revive * rate / (1 - (1 - revive) * rate) if revive else 0
        self.limit = np.uint64(min(chance, 1.0) * (2**64 - 1025))

    def decide(self, batch: ShardScores, noise: float) -> list[str]:
        steps, hashes, weight = quantise(batch.score).tolist(), batch.hash.tolist(), batch.weight.tolist()
        reasons = ["noise" if one > quantise(np.array([noise]))[0] else "easy" for one in steps]
        reasons = [one if np.isfinite(s) else "unscored" for one, s in zip(reasons, batch.score, strict=True)]
        for row, reason in enumerate(reasons):
            if reason == "easy" and swapped(hashes[row]) < self.limit:
                reasons[row] = "revived"
        key = {row: (steps[row], hashes[row]) for row, reason in enumerate(reasons) if reason in ("easy", "revived")}
        rows = sorted((row for row in key if reasons[row] == "easy"), key=key.__getitem__, reverse=True)
        given = sum(weight[row] for row, reason in enumerate(reasons) if reason == "revived")
        self.seen, self.kept = self.seen + sum(weight), self.kept + given
        if rows:
            sums = [sum(weight[row] for row in rows[:count]) for count in range(len(rows) + 1)]
            owed, wanted = self.rate * self.seen - self.kept, self.rate * sum(weight) - given
            slack, asked = Fraction(0.005) * self.rate * self.seen, (wanted + owed) / 2
            now = 0 if self.key is None else sum(key[row] >= self.key for row in rows)
            goal = asked if self.key is None else (sums[now] + asked) / 2
            goal = min(max(goal, owed - slack), owed + slack)
            count = min(range(len(sums)), key=lambda one: (abs(sums[one] - goal), -sums[one]))
            if self.key is None or count != now:
                self.key = key[rows[count - 1]] if count else (key[rows[0]][0], key[rows[0]][1] + 1)
            self.kept += sum(weight[row] for row in rows if key[row] >= self.key)
        for row in key:
            if self.key is not None and key[row] >= self.key:
                reasons[row] = "hard"
        return reasons


@pytest.mark.parametrize("revive", [0.0, 0.3])
def test_streams_are_decided_as_loops_do(revive):
    seen = set()
    for seed in range(12):
        random, rules = np.random.default_rng(seed), FilterRules(keep=(0.5, 0.03, 0.9)[seed % 3])
        rules = FilterRules(keep=rules.keep, select=SelectConfig(revive=revive))
        selector, loop = StreamSelector("a", rules, 2.0), Loop(rules.keep, revive)
        for number in range(8):
            batch = records(100 * seed + number, 30)
            batch = replace(batch, domain=batch.domain * 0, score=batch.score + random.normal(0, 0.5))
            reasons = [REASONS[code].name for code in selector.decide(batch)]
            assert reasons == loop.decide(batch, 2.0), (seed, number)
            assert (selector.seen, selector.kept) == (loop.seen, loop.kept)
            seen |= set(reasons)
    assert seen == {"easy", "hard", "noise", "unscored", *(["revived"] if revive else [])}
