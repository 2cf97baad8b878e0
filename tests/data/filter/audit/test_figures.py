"""All figures of an audit are those of plain loops over its rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow
import pytest
from scipy.stats import spearmanr

from data.filter.audit import statistics
from data.filter.audit.statistics import Audit
from data.filter.config import FilterRules, KeepUnit, SelectConfig
from data.filter.input.records import Reason
from data.filter.score.baselines import LengthScorer
from tests.data.filter.audit.test_audit import decisions

COMPETED = ("hard", "revived", "protected", "easy", "noise", "unscored")
SIZES = ("documents", "tokens", "bytes")


def shards(seed: int = 0, count: int = 800) -> list[pyarrow.Table]:
    """Return shards of three domains, the smallest with constant scores, with all reasons and two length buckets."""
    random = np.random.default_rng(seed)
    reasons = random.choice([*COMPETED, "duplicate", "empty"], count, p=[0.3, 0.1, 0.1, 0.3, 0.05, 0.05, 0.05, 0.05])
    domain = random.choice(["a", "b", "c"], count, p=[0.6, 0.35, 0.05])
    scored = np.isin(reasons, COMPETED) & (reasons != "unscored") & (random.random(count) < 0.95)
    score = np.where(scored, np.where(domain == "c", 2.0, np.round(random.normal(0, 1, count), 1)), np.nan)
    columns = {
        "bytes": random.integers(30, 2000, count),
        "scored_bytes": random.integers(10, 60, count),
        "tokens": random.integers(1, 500, count),
        "bucket": random.integers(0, 2, count).astype(np.int32),
        "label": np.where(random.random(count) < 0.6, random.integers(0, 30, count), np.nan),
        "score:other": np.where(random.random(count) < 0.5, score + random.normal(0, 1, count), np.nan),
    }
    whole = decisions(score, reasons, domain, seed, **columns)
    none = {name: whole[name].slice(0, 9) for name in columns}
    none = decisions([np.nan] * 9, "unscored", "d", 1, **none)
    return [whole.slice(0, 300), pyarrow.concat_tables([whole.slice(300, 40), none]), whole.slice(340)]


def sizes(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {"documents": len(rows)} | {name: sum(row[name] for row in rows) for name in SIZES[1:]}


def kept_share(rows: list[dict[str, Any]], unit: str) -> Any:
    whole = sizes(rows)[unit]
    return pytest.approx(sizes([row for row in rows if row["kept"]])[unit] / whole, rel=1e-5)


def parts(rows: list[dict[str, Any]], name: str, count: int) -> list[list[dict[str, Any]]]:
    """Divide rows into parts of about equal size; equal values stay together, in the part of the first of them."""
    values = sorted(row[name] for row in rows)
    limits = [values[-(-len(values) * place // count) - 1] for place in range(1, count)]
    place = {id(row): sum(limit < row[name] for limit in limits) for row in rows}
    return [mine for part in range(count) if (mine := [row for row in rows if place[id(row)] == part])]


@pytest.mark.parametrize("unit", KeepUnit)
def test_figures_are_those_of_loops(unit):
    tables = shards()
    rows = pyarrow.concat_tables(tables).to_pylist()
    rules = FilterRules(keep=0.6, unit=unit, select=SelectConfig(domains={"b": 0.7}, protect=["c"]))
    audit = Audit(rules, LengthScorer(), {}, "in", len(rows), sum(row["tokens"] for row in rows))
    for place, table in enumerate(tables):
        audit.add(f"{place}", table)
    found = audit.finish(lambda shard, row: "")
    competed, kept = [row for row in rows if row["reason"] in COMPETED], [row for row in rows if row["kept"]]
    assert found["totals"] == {"in": sizes(rows), "competed": sizes(competed), "kept": sizes(kept)}
    assert found["reasons"] == {r.name: sizes([row for row in rows if row["reason"] == r.name]) for r in Reason}
    for name, target in (("a", 0.6), ("b", 0.7), ("c", 1.0), ("d", 0.6)):
        mine, domain = [row for row in rows if row["domain"] == name], found["domains"][name]
        mine_competed, mine_kept = ([row for row in some if row["domain"] == name] for some in (competed, kept))
        assert {key: domain[key] for key in ("in", "competed", "kept", "target", "longest", "constant")} == {
            "in": sizes(mine),
            "competed": sizes(mine_competed),
            "kept": sizes(mine_kept),
            "target": target,
            "longest": max(row["tokens"] for row in mine_competed),
            "constant": name == "c",
        }
        assert domain["scored"] == sum(np.isfinite(row["score"]) for row in mine_competed)
        shares = sizes(mine)["tokens"] / sizes(rows)["tokens"], sizes(mine_kept)["tokens"] / sizes(kept)["tokens"]
        assert (domain["share_before"], domain["share_after"]) == pytest.approx(shares, rel=1e-5)
        assert set(domain["reasons"]) == {row["reason"] for row in mine}
        assert found["random"]["domains"][name] == kept_share(mine_competed, unit.name)
    assert found["random"]["rate"] == kept_share(competed, unit.name) and found["random"]["unit"] == unit.name
    scored = [row for row in competed if np.isfinite(row["score"])]
    means = {"random": np.mean([row["score"] for row in scored])}
    means["kept"] = np.mean([row["score"] for row in scored if row["kept"]])
    assert found["random"]["mean_score"] == pytest.approx(means, rel=1e-5)
    for quarter, mine in zip(found["random"]["lengths"], parts(competed, "scored_bytes", 4), strict=True):
        lengths = [row["scored_bytes"] for row in mine]
        assert (quarter["from_bytes"], quarter["to_bytes"], quarter["documents"]) == (
            min(lengths),
            max(lengths),
            len(mine),
        )
        assert quarter["kept"] == kept_share(mine, unit.name)
    both = [row for row in scored if np.isfinite(row["score:other"])]
    wanted = spearmanr([row["score"] for row in both], [row["score:other"] for row in both]).statistic
    (agreement,) = found["agreement"]
    assert (agreement["records"], agreement["correlation"]) == (len(both), pytest.approx(wanted, rel=1e-5))
    for figures, column in ((found["length"], "scored_bytes"), (found["whole_length"], "bytes")):
        for name, one in {"": figures, **figures["domains"]}.items():
            mine = [row for row in scored if name in ("", row["domain"])]
            assert one["records"] == len(mine)
            if name in ("c", "d"):
                assert one["overall"] is None and one["inside_buckets"] is None, "constant or missing scores"
                continue
            wanted = spearmanr([row["score"] for row in mine], [row[column] for row in mine]).statistic
            assert one["overall"] == pytest.approx(wanted, rel=1e-4)
            assert one["inside_buckets"] == pytest.approx(inside(mine, column), rel=1e-4)


def inside(rows: list[dict[str, Any]], column: str) -> float:
    """Return the rank correlation of score and length inside domains and buckets of 30 records or more."""
    first, second = [], []
    for place in itertools.product("abc", (0, 1)):
        mine = [row for row in rows if (row["domain"], row["bucket"]) == place]
        if len(mine) < 30:
            continue
        for found, name in ((first, "score"), (second, column)):
            values = np.array([row[name] for row in mine], float)
            lower, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
            found += ((lower + equal / 2) / len(mine) - 0.5).tolist()
    one, other = np.array(first), np.array(second)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@pytest.mark.parametrize("levels", [10, 11])
def test_kept_fractions_are_by_level_or_by_fifth(levels):
    table = pyarrow.concat_tables(shards())
    label = np.arange(len(table)) ** 2 % levels * 1.0
    label[:levels] = np.arange(levels)
    table = table.set_column(table.column_names.index("label"), "label", [label])
    table = table.append_column("documents", [np.ones(len(table), np.int64)])
    rows = table.to_pylist()
    found = statistics._kept_by_label(table)
    groups = parts(rows, "label", 5)
    if levels == 10:
        groups = [[row for row in rows if row["label"] == level] for level in sorted(set(label.tolist()))]
    for one, mine in zip(found, groups, strict=True):
        values = [row["label"] for row in mine]
        assert (one["from"], one["to"], one["documents"]) == (min(values), max(values), len(mine))
        assert one["kept"] == kept_share(mine, "documents")


def test_histograms_count_all_and_show_the_largest_domains(monkeypatch):
    """The outermost bins count what is beyond their edges, here a twentieth at each end."""
    monkeypatch.setattr(statistics, "SHOWN_DOMAINS", 2)
    monkeypatch.setattr(statistics, "_OUTER", 0.05)
    tables = shards()
    rows = [row for row in pyarrow.concat_tables(tables).to_pylist() if row["reason"] in COMPETED]
    audit = Audit(FilterRules(), LengthScorer(), {}, "in", 809, sum(int(np.sum(one["tokens"])) for one in tables))
    for place, table in enumerate(tables):
        audit.add(f"{place}", table)
    found = audit.finish(lambda shard, row: f"{shard} {row}")
    scores, rows = found["scores"], [row for row in rows if np.isfinite(row["score"])]
    values = sorted(row["score"] for row in rows)
    assert list(scores["domains"]) == ["a", "b"] == list(found["samples"]), "those with the most tokens"
    low, high = (values[-(-len(values) * share // 20) - 1] for share in (1, 19))
    assert (scores["edges"][0], scores["edges"][-1], len(scores["edges"])) == (low, high, 41)
    for name, one in {"": scores["overall"], **scores["domains"]}.items():
        mine = [row for row in rows if name in ("", row["domain"])]
        edges = np.linspace(low, high, 41)
        for key, some in (("documents", mine), ("kept", [row for row in mine if row["kept"]])):
            assert one[key] == np.histogram(np.clip([row["score"] for row in some], low, high), edges)[0].tolist()
        assert one["median"] == sorted(row["score"] for row in mine)[(len(mine) - 1) // 2]
    for name, sides in found["samples"].items():
        for side, shown in sides.items():
            reason = "hard" if side == "kept" else "easy"
            assert len(shown) == 10 and {(row["domain"], row["reason"]) for row in shown} == {(name, reason)}
    for reason, shown in found["examples"].items():
        mine = [row for row in pyarrow.concat_tables(tables).to_pylist() if row["reason"] == reason]
        first = sorted(mine, key=lambda row: row["tie"])[:5]
        assert [row["id"] for row in shown] == [row["id"] for row in first], "at random"
    texts = [row["text"] for shown in found["examples"].values() for row in shown]
    places = {
        f"{number} {row}": table["id"][row].as_py() for number, table in enumerate(tables) for row in range(len(table))
    }
    assert [places[text] for text in texts] == [row["id"] for shown in found["examples"].values() for row in shown]
