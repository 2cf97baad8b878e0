"""The figures of scores against labels are those of loops over pairs, with the same resamples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow
import pytest

from data.filter.audit import proof, separation
from data.filter.audit.separation import auc, first_of_each, length_buckets, rank_correlation, rounded

RESAMPLES = 12


def labelled(seed: int, count: int = 70) -> dict[str, np.ndarray]:
    """Return scores with ties and gaps, labels, buckets of uneven sizes (one of one record) and folds."""
    random = np.random.default_rng(seed)
    score = np.round(random.normal(0, 1, count), 1)
    score[random.random(count) < 0.15] = random.choice([np.nan, np.inf])
    label = random.integers(1, 4, count).astype(float)
    bucket = random.choice([7, 2, 4], count, p=[0.6, 0.25, 0.15])
    bucket[0] = 3
    return {"score": score, "label": label, "bucket": bucket, "fold": random.integers(0, 3, count)}


def draws(bucket: np.ndarray) -> list[list[int]]:
    """Return the rows of the sample and of each resample: as many of each bucket as it has, in the order of buckets."""
    random, found = np.random.default_rng(0), [[] for _ in range(RESAMPLES + 1)]
    for place in sorted(set(bucket.tolist())):
        mine = np.flatnonzero(bucket == place)
        drawn = random.integers(0, len(mine), (RESAMPLES + 1, len(mine)))
        for number, rows in enumerate(found):
            rows += (mine if number == 0 else mine[drawn[number]]).tolist()
    return found


def higher(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)) or one == other:
        return 0.5
    return float(one > other)


def strata(rows: Iterable[int], bucket: np.ndarray, fold: np.ndarray | None) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for row in rows:
        found.setdefault((bucket[row], None if fold is None else fold[row]), []).append(row)
    return list(found.values())


def area(score: np.ndarray, label: np.ndarray, groups: list[list[int]]) -> float:
    won = [higher(score[a], score[b]) for mine in groups for a in mine for b in mine if label[a] > label[b]]
    return float(np.mean(won)) if won else 0.5


def ranks(values: np.ndarray, rows: list[int]) -> list[float]:
    return [sum(higher(values[a], values[b]) for b in rows) - len(rows) / 2 for a in rows]


def correlation(score: np.ndarray, label: np.ndarray, groups: list[list[int]], size: dict[int, int]) -> float:
    """Return the rank correlation. `size`: the number of records of the sample in the group of a row."""
    parts = [[np.array(ranks(values, rows)) / size[rows[0]] for values in (score, label)] for rows in groups]
    first, second = (np.concatenate(one) for one in zip(*parts, strict=True))
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))


@pytest.mark.parametrize("folded", [False, True])
def test_figures_and_intervals_are_those_of_loops(folded):
    for seed in range(3):
        one = labelled(seed)
        fold, other = one["fold"] if folded else None, np.sin(np.arange(70.0))
        scores = {"a": one["score"], "b": other}
        areas = auc(scores, one["label"], one["bucket"], RESAMPLES, folds=fold)
        correlations = rank_correlation(scores, one["label"], one["bucket"], RESAMPLES, folds=fold)
        groups = [strata(rows, one["bucket"], fold) for rows in draws(one["bucket"])]
        size = {row: len(mine) for mine in groups[0] for row in mine}
        for name, score in scores.items():
            wanted = [area(score, one["label"], mine) for mine in groups]
            assert [areas[name].value, *areas[name].resampled] == pytest.approx(wanted)
            assert [areas[name].low, areas[name].high] == pytest.approx(
                np.quantile(wanted[1:], [0.025, 0.975]).tolist()
            )
            wanted = [correlation(score, one["label"], mine, size) for mine in groups]
            found = correlations[name]
            assert [found.value, *found.resampled] == pytest.approx(wanted)
        lead = areas["a"].minus(areas["b"])
        wanted = (areas["a"].resampled - areas["b"].resampled).tolist()
        assert lead.value == pytest.approx(areas["a"].value - areas["b"].value)
        assert lead.resampled.tolist() == pytest.approx(wanted)
        assert (lead.low, lead.high) == pytest.approx(tuple(np.quantile(wanted, [0.025, 0.975])))


def test_resamples_in_parts_differ_only_by_chance(monkeypatch):
    one = labelled(5)
    given = ({"a": one["score"]}, one["label"], one["bucket"], 300)
    whole = auc(*given)["a"]
    monkeypatch.setattr(separation, "_WEIGHTS_AT_ONCE", 500)
    parts = auc(*given)["a"]
    assert parts.value == whole.value and abs(parts.low - whole.low) < 0.03 and abs(parts.high - whole.high) < 0.03
    assert len(set(parts.resampled.tolist())) > 100, "each part has its own draws"


def test_a_resample_without_pairs_is_chance():
    found = auc({"a": np.array([1.0, 2.0])}, np.array([0.0, 1.0]), np.zeros(2, np.int64), 50)["a"]
    assert found.value == 1 and set(found.resampled.tolist()) == {0.5, 1.0}
    for buckets, folds in (([0, 1], None), ([0, 0], np.array([0, 1]))):
        with pytest.raises(ValueError, match="two labels"):
            auc({"a": np.array([1.0, 2.0])}, np.array([0.0, 1.0]), np.array(buckets), 5, folds=folds)


def test_length_buckets_are_of_equal_size():
    assert length_buckets(np.arange(12), 4).tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert length_buckets(np.array([5, 5, 5, 9]), 2).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("groups", [[], ["g"], ["g", "h"]])
def test_the_first_of_each_group_are_those_of_a_sort(groups):
    random = np.random.default_rng(0)
    table = pyarrow.table({name: random.integers(0, 4 if name != "k" else 1000, 60) for name in "ghk"})
    found = first_of_each([None, table.slice(0, 25), table.slice(25)], groups, [("k", "descending")], 3).to_pylist()
    rows = sorted(table.to_pylist(), key=lambda row: (*(row[name] for name in groups), -row["k"]))
    wanted, seen = [], {}
    for row in rows:
        place = tuple(row[name] for name in groups)
        seen[place] = seen.get(place, 0) + 1
        wanted += [row] if seen[place] <= 3 else []
    assert [row["k"] for row in found] == [row["k"] for row in wanted]


@pytest.mark.parametrize(
    ("labels", "gap"),
    [
        ([1, 2, 3, 4, 5], None),
        ([1, 2, 3, 4, 5] * 9 + [10_000, 30_000] * 9, [5, 10_000]),
        ([1, 2, 3, 4, 5] * 20 + [10_000, 30_000] * 5, None),  # nine of ten are below
        ([1, 5] * 45 + [10_000, 30_000] * 5, [5, 10_000]),
        ([1, 5] * 5 + [10_000, 30_000] * 45, [5, 10_000]),
        ([1, 5] * 5 + [10_000, 30_000] * 46, None),
        ([1, 1, 100, 100], None),  # neither side is a scale
        ([1, 2, 3, 100, 100], None),
        ([1, 3, 23, 25], None),  # ten times as wide, but not ten times as large
        ([0.5, 2.5, 26, 29], [2.5, 26]),
        ([1, 2, 12, 14], None),
        ([-5, -1, 100, 109], None),
        ([7, 7, 7], None),
    ],
)
def test_a_gap_between_two_scales(labels, gap):
    random = np.random.default_rng(0)
    assert proof._scales(random.permutation(np.array(labels, float))) == gap


# -- all figures of a sample


def sample(folds: bool, count: int = 330) -> Any:
    random = np.random.default_rng(3)
    size = random.integers(20, 200, count)
    columns = {
        "domain": random.choice(["x", "y", "z"], count, p=[0.8, 0.15, 0.05]),
        "label": random.integers(1, 6, count).astype(float),
        "score": np.round(random.normal(0, 1, count), 1),
        "scored_bytes": size,
        "bytes": size + random.integers(0, 90, count),
        "tie": random.integers(0, 2**64, count, dtype=np.uint64),
        "score:other": random.normal(0, 1, count),
        "score:random": random.normal(0, 1, count),
        "score:label": random.normal(0, 1, count),
    }
    if folds:
        columns["score:fold"] = random.integers(0, 6, count).astype(float)
    return pyarrow.table(columns)


@pytest.mark.parametrize("folds", [False, True])
def test_all_figures_of_a_sample_are_those_by_hand(folds, monkeypatch):
    monkeypatch.setattr(proof, "_RESAMPLES", RESAMPLES)
    table = sample(folds)
    rows, bucket, hard, alone = table.to_pylist(), {}, {}, {}
    for domain in "xyz":
        mine = [n for n, row in enumerate(rows) if row["domain"] == domain]
        count = min(max(len(mine) // (20 if folds else 8), 1), 8)
        sizes = [rows[n]["scored_bytes"] for n in mine]
        edges = [np.quantile(sizes, place / count) for place in range(1, count)]
        for n in mine:
            bucket[n] = (domain, sum(edge < rows[n]["scored_bytes"] for edge in edges))
            below = sum(rows[m]["label"] < rows[n]["label"] for m in mine)
            equal = sum(rows[m]["label"] == rows[n]["label"] for m in mine)
            middle = (below + equal / 2) / len(mine)
            lowest, highest = (end(rows[m]["label"] for m in mine) for end in (min, max))
            hard[n] = 0.0 if middle < 0.4 or rows[n]["label"] == lowest else np.nan
            hard[n] = 1.0 if middle > 0.6 or rows[n]["label"] == highest else hard[n]
        few = min(sum(hard[n] == side for n in mine) for side in (0, 1))
        used = [n for n in mine if not math.isnan(hard[n])]
        lengths = np.array([row["scored_bytes"] for row in rows], float)
        alone[domain] = None if few < 20 else area(lengths, np.array([hard.get(n, np.nan) for n in range(330)]), [used])
    found = proof._measured(table, "mine")
    label, sides = table["label"].to_numpy(), np.array([hard[n] for n in range(330)])
    columns = {
        "mine": table["score"].to_numpy(),
        "other": table["score:other"].to_numpy(),
        proof.ANSWER: table["scored_bytes"].to_numpy().astype(float),
        proof.PROMPT: (table["bytes"].to_numpy() - table["scored_bytes"].to_numpy()).astype(float),
        proof.RANDOM: table["tie"].to_numpy().astype(float),
    }
    fold = table["score:fold"].to_numpy() if folds else np.zeros(330)
    groups = strata(range(330), np.array([hash(bucket[n]) for n in range(330)]), fold)
    used = [[n for n in mine if not math.isnan(sides[n])] for mine in groups]
    assert [one["name"] for one in found["scorers"]] == list(columns)
    for one in found["scorers"]:
        score = columns[one["name"]]
        assert one["auc"] == pytest.approx(area(score, sides, used), abs=1e-5) and one["low"] < one["auc"] < one["high"]
        wanted = correlation(score, label, groups, {row: len(mine) for mine in groups for row in mine})
        assert one["correlation"] == pytest.approx(wanted, abs=1e-5)
        assert one["correlation_low"] < one["correlation"] < one["correlation_high"]
    by_domain = strata(range(330), table["domain"].to_numpy(zero_copy_only=False), None)
    size = {row: len(mine) for mine in by_domain for row in mine}
    assert found["prompts"] and found["labels"] == {
        "sample": 330,
        "hard": int((sides == 1).sum()),
        "easy": int((sides == 0).sum()),
        "distinct": 5,
        "scales": None,
        "learned": int((fold < 5).sum()),
        "buckets": len(set(bucket.values())),
        "length": rounded(correlation(columns[proof.ANSWER], label, by_domain, size)),
    }
    for name, one in found["domains"].items():
        assert one["labels"] == sum(row["domain"] == name for row in rows)
        assert (one["length"] is None) == (alone[name] is None)
        if alone[name] is not None:
            assert one["length"]["auc"] == pytest.approx(alone[name], abs=1e-5)
    assert {name: one is None for name, one in alone.items()} == {"x": False, "y": True, "z": True}
    first = found["scorers"][0]["auc"]
    leads = {one["over"]: one["auc"] for one in found["lead"]}
    assert leads == pytest.approx({one["name"]: first - one["auc"] for one in found["scorers"][2:4]}, abs=1e-5)
