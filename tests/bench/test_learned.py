"""The scorer `learned` tells hard from easy on every labelled kind, from 500 labels and with default settings.

Only problems without a label count. The kinds were committed before the scorer was written.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest

from bench.data.difficulty import KINDS
from bench.data.problems import Problem, records
from data.filter.audit.separation import Estimate, auc, length_buckets
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.score.learned import LearnedScorer
from data.filter.score.linear import Weighting, learn
from launch.cli import main

FLOORS = {"counted steps": 0.58, "mathematics": 0.66, "code": 0.58}
COUNT, LABELS = 2000, 500


def area(problems: list[Problem], scores: np.ndarray, chosen: np.ndarray) -> float:
    """Return the AUC inside domains and buckets of the length of the answer, over the chosen problems."""
    domains = np.unique([problem.family for problem in problems], return_inverse=True)[1]
    lengths = np.array([len(problem.response) for problem in problems])
    buckets = 100 * domains + length_buckets(lengths, 8)
    labels = np.array([problem.label for problem in problems])
    return auc({"": scores[chosen]}, labels[chosen], buckets[chosen], resamples=0)[""].value


@pytest.mark.slow  # 15 s for each kind and seed
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_500_labels_tell_hard_from_easy(kind, seed, tmp_path):
    problems = KINDS[kind](COUNT, seed)
    labelled = np.random.default_rng(seed).permutation(COUNT) < LABELS
    with (tmp_path / "in.jsonl").open("w") as file:
        for one, known in zip(problems, labelled, strict=True):
            label = one.label if known else None
            row = {"q": one.prompt, "a": one.response, "kind": one.family, "level": label}
            file.write(json.dumps(row) + "\n")
    keys = ["prompt_key=q", "response_key=a", "domain_key=kind", "label_key=level", "unit=documents"]
    assert main(["filter", f"input={tmp_path / 'in.jsonl'}", *keys, f"out={tmp_path / 'out'}"]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet")
    scores, kept = table["score"].to_numpy(), table["kept"].to_numpy()
    chosen = ~labelled & np.isfinite(scores)
    assert area(problems, scores, chosen) >= FLOORS[kind]
    labels = np.array([problem.label for problem in problems])
    shares = [kept[chosen & (labels == label)].mean() for label in np.unique(labels)]
    assert np.polyfit(np.unique(labels), shares, 1)[0] > 0 and shares[-1] > shares[0] + 0.1
    if kind != "counted steps":  # eight labels of 190 problems each: neighbours may change places by chance
        assert shares == sorted(shares)


@pytest.mark.parametrize("order", ["true", "permuted"])
def test_labels_teach_and_permuted_labels_do_not(order, tmp_path):
    """A quick version on one seed, and its negative control."""
    problems, count = KINDS["mathematics"](400, 1), 150
    places = np.arange(count) if order == "true" else np.random.default_rng(0).permutation(count)
    labels = [problems[place].label for place in places] + [None] * (len(problems) - count)
    data = [replace(record, label=label) for record, label in zip(records(problems), labels, strict=True)]
    scorer = LearnedScorer(ScorerConfig(ScorerKind.learned), tmp_path)
    scorer.fit(lambda: data)
    found = area(problems, scorer.score(data), np.arange(len(problems)) >= count)
    assert (found > FLOORS["mathematics"]) == (order == "true")


def of_permuted_labels(kind: str, count: int, draws: int, one_domain: bool) -> list[Estimate]:
    """Return the cross-fitted AUC in buckets of 20 by domain and length, for labels in random order."""
    problems = KINDS[kind](800, 30)
    data = [replace(one, domain="all") if one_domain else one for one in records(problems)]
    domains = np.unique([one.domain for one in data], return_inverse=True)[1]
    lengths, labels = (np.array(x) for x in ([len(one.answer) for one in data], [one.label for one in problems]))
    weighting, found = Weighting.fitted([data]), []
    for draw in range(draws):
        chance = np.random.default_rng([count, draw])
        mine = chance.choice(len(data), count, replace=False)
        sample, label = [data[place] for place in mine], chance.permutation(labels[mine])
        buckets = 8 * domains[mine]
        for one in np.unique(buckets):
            same = buckets == one
            buckets[same] += length_buckets(lengths[mine][same], int(np.clip(same.sum() // 20, 1, 8)))
        scores, folds = learn(weighting, sample, label, data[:200]).score(sample)
        found.append(auc({"": scores}, label, buckets, 100, draw, folds)[""])
    return found


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("one_domain", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_permuted_labels_contain_chance(kind, one_domain):
    found = [of_permuted_labels(kind, count, 100, one_domain) for count in (60, 100, 200)]
    assert abs(np.mean([one.value for mine in found for one in mine]) - 0.5) < 0.015
    # 300 intervals at 95%: the share of those that contain it has a standard error of 1.3%. Intervals that ignore the
    # folds are too short by sqrt(2) and contain it in 83% of the cases.
    assert np.mean([one.low <= 0.5 <= one.high for mine in found for one in mine]) > 0.9
