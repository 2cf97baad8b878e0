"""The audit adds up, says the same whatever the order of the shards, warns where it should, and trusts no text."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from core.errors import DataError
from core.html import page
from data.filter.audit.page import write_audit
from data.filter.audit.plots import draw
from data.filter.audit.statistics import Audit, ScorerInfo
from data.filter.audit.tally import Tally, counts, first_of_each, key_of, quantile, spearman, value_of
from data.filter.config import FilterRules, KeepUnit, SelectConfig
from data.filter.input.records import Reason
from data.filter.score.scorer import Direction

SCORER = ScorerInfo("ngram", "bits per byte", Direction.hard, "0123")
RULES = FilterRules(keep=0.5, unit=KeepUnit.documents, select=SelectConfig(length_buckets=1))


def decisions(score: Any, reason: Any, domain: Any = "web", seed: int = 0, **columns: Any) -> pyarrow.Table:
    """A shard of the selection; lengths by lot, one bucket."""
    count, chance = len(score), np.random.default_rng(seed)
    size = columns.pop("bytes", chance.integers(40, 4000, count))
    reasons = [reason] * count if isinstance(reason, str) else list(reason)
    found = {
        "id": [f"{seed}-{place}" for place in range(count)],
        "domain": [domain] * count if isinstance(domain, str) else list(domain),
        "source": [f"notes.jsonl:{place}" for place in range(count)],
        "score": np.asarray(score, float),
        "tokens": np.asarray(size) // 4 + 1,
        "bytes": size,
        "tie": chance.integers(0, 2**63, count).astype(np.uint64),
        "bucket": np.zeros(count, np.int32),
        "kept": [Reason[name].kept for name in reasons],
        "reason": reasons,
        "scored_bytes": size,
        "detail": [None] * count,
    }
    return pyarrow.table(found | columns)


def halved(count: int, seed: int = 0, **more: Any) -> pyarrow.Table:
    """Scores by lot, of which the higher half was kept."""
    score = np.random.default_rng(seed + 100).normal(4, 1, count)
    return decisions(score, np.where(score >= np.median(score), "hard", "easy"), seed=seed, **more)


def audited(*tables: pyarrow.Table, rules: FilterRules = RULES, text: str = "a text", **more: Any) -> dict[str, Any]:
    shards = {f"{place:05}": table for place, table in enumerate(tables)}
    rows = {name: table.num_rows for name, table in shards.items()}
    audit = Audit(rules, SCORER, rows, more.pop("thresholds", {}), "notes.jsonl", **more)
    for name, table in shards.items():
        audit.add(name, table)
    return audit.finish(lambda shard, row: text)


def kinds(audit: dict[str, Any]) -> set[str]:
    return {warning["kind"] for warning in audit["warnings"]}


def test_counts_are_those_of_a_plain_count_and_add_up():
    tables = [halved(300, 1, domain=["web", "code", "maths"] * 100), decisions([np.nan] * 7, "duplicate", "code")]
    audit = audited(*tables, tokens=sum(int(np.sum(table["tokens"].to_numpy())) for table in tables))
    rows = pyarrow.concat_tables(tables).to_pylist()
    assert audit["totals"]["in"]["documents"] == 307
    assert audit["totals"]["kept"]["tokens"] == sum(row["tokens"] for row in rows if row["kept"])
    assert audit["reasons"]["duplicate"]["documents"] == 7
    assert list(audit["reasons"]) == [reason.name for reason in Reason]
    for unit in ("documents", "tokens", "bytes"):
        assert sum(size[unit] for size in audit["reasons"].values()) == audit["totals"]["in"][unit]
    code = [row for row in rows if row["domain"] == "code"]
    assert audit["domains"]["code"]["in"]["tokens"] == sum(row["tokens"] for row in code)
    assert audit["domains"]["code"]["competed"]["documents"] == 100
    assert sum(audit["scores"]["overall"]["documents"]) == 300
    assert sum(audit["scores"]["overall"]["kept"]) == audit["totals"]["kept"]["documents"]
    assert sum(domain["share_after"] for domain in audit["domains"].values()) == pytest.approx(1, abs=1e-5)


def test_a_lost_row_is_noticed():
    table = halved(100)
    audit = Audit(RULES, SCORER, {"a": 100}, {}, "x")
    with pytest.raises(DataError, match="a has 99 decisions for 100 records"):
        audit.add("a", table.slice(1))


def test_lost_tokens_a_lost_shard_and_a_shard_that_comes_twice_are_noticed():
    table = halved(100)
    with pytest.raises(DataError, match=r"the reasons add up to .* tokens"):
        audited(table, tokens=int(np.sum(table["tokens"].to_numpy())) + 1)
    audit = Audit(RULES, SCORER, {"a": 100, "b": 100}, {}, "x")
    audit.add("a", table)
    with pytest.raises(DataError, match="there twice"):
        audit.add("a", table)
    with pytest.raises(DataError, match="unknown"):
        audit.add("c", table)
    with pytest.raises(DataError, match="1 shards are missing, b"):
        audit.finish(lambda shard, row: "")


@pytest.mark.parametrize(("reason", "kept"), [("easy", True), ("hard", False), ("boring", False), (None, False)])
def test_a_decision_that_contradicts_its_reason_is_noticed(reason, kept):
    table = decisions([1.0], "hard")
    table = table.set_column(8, "kept", pyarrow.array([kept])).set_column(
        9, "reason", pyarrow.array([reason], "string")
    )
    with pytest.raises(DataError, match=f"reason={reason} and kept={kept}"):
        audited(table)


def test_the_order_of_shards_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("data.filter.audit.statistics._SAMPLE", 150)  # less than there are, so that something is chosen
    monkeypatch.setattr("data.filter.audit.page.draw", lambda audit, dark=False: {})
    names = ["web", "code"] * 50
    tables = {f"{place}": halved(100, place, domain=names, **{"score:length": np.arange(100.0)}) for place in range(5)}
    tables["5"] = decisions([np.nan] * 9, "malformed", "")
    rows = {name: table.num_rows for name, table in tables.items()}
    written = []
    for order in (list(tables), list(reversed(tables)), ["2", "5", "0", "4", "1", "3"]):
        audit = Audit(RULES, SCORER, rows, {}, "x")
        for name in order:
            audit.add(name, tables[name])
        write_audit(audit.finish(lambda shard, row: f"text {shard} {row}"), tmp_path, "leviathan filter")
        written.append((tmp_path / "audit.json").read_bytes())
    assert written[0] == written[1] == written[2]
    tables["0"] = halved(100, 77, domain=names, **{"score:length": np.arange(100.0)})
    audit = Audit(RULES, SCORER, rows, {}, "x")
    for name, table in tables.items():
        audit.add(name, table)
    assert (json.dumps(audit.finish(lambda shard, row: "text"), indent=2) + "\n").encode() != written[0]


def test_nothing_to_complain_of_gives_no_warning():
    assert audited(halved(400, domain=["web", "code"] * 200), parameters=10)["warnings"] == []


def length_is_the_score() -> dict[str, Any]:
    size = np.arange(100, 500)
    return audited(decisions(size, np.where(size >= 300, "hard", "easy"), bytes=size))


WARNED = {
    "malformed": lambda: audited(halved(100), decisions([np.nan], "malformed")),
    "unscored": lambda: audited(halved(100), decisions([np.nan] * 3, "unscored")),
    "constant_scores": lambda: audited(decisions([2.5] * 100, ["hard", "easy"] * 50)),
    "off_target": lambda: audited(decisions(np.arange(100.0), ["easy"] * 40 + ["hard"] * 60)),
    "length": length_is_the_score,
    "mix": lambda: audited(halved(90), decisions(np.arange(90.0), ["easy"] * 80 + ["hard"] * 10, "code")),
    "one_document": lambda: audited(halved(100), decisions([1.0], "hard", "code")),
    "scarce": lambda: audited(halved(100), parameters=10**9),
}


@pytest.mark.parametrize("kind", WARNED)
def test_warns(kind):
    assert kind in kinds(WARNED[kind]())


def test_does_not_warn_just_inside_the_limits():
    assert kinds(audited(halved(100), decisions([np.nan] * 1, "unscored"))) == set()
    assert kinds(audited(decisions(np.arange(3.0), ["easy", "hard", "hard"]))) == set()  # one document off
    floor = replace(RULES, select=SelectConfig(floor=8))
    kept_whole = decisions(np.arange(8.0), "protected", "code")
    assert "off_target" not in kinds(audited(halved(100), kept_whole, rules=floor))
    ruled = replace(RULES, select=SelectConfig(protect=["code"]))
    assert "off_target" not in kinds(audited(halved(100), kept_whole, rules=ruled))
    assert "off_target" in kinds(audited(halved(100), kept_whole))


def test_warns_of_a_target_missed_by_more_than_one_document():
    """Of 20 documents, each 5% of its domain, one more than the half or fewer, and two."""
    score = np.arange(20.0)
    for kept, warned in ((8, True), (9, False), (10, False), (11, False), (12, True)):
        audit = audited(decisions(score, ["easy"] * (20 - kept) + ["hard"] * kept))
        assert ("off_target" in kinds(audit)) == warned


def test_length_inside_buckets_is_told_apart_from_length_overall():
    """Two buckets of length, the longer with higher scores, and by lot inside each."""
    chance = np.random.default_rng(0)
    bucket = np.repeat([0, 1], 200).astype(np.int32)
    size = bucket * 1000 + chance.integers(100, 900, 400)
    score = bucket * 50 + chance.normal(0, 1, 400)
    medians = np.array([np.median(score[bucket == place]) for place in range(2)])
    reason = np.where(score >= medians[bucket], "hard", "easy")
    audit = audited(decisions(score, reason, bytes=size).set_column(7, "bucket", pyarrow.array(bucket)))
    assert audit["length"]["overall"] > 0.7 and abs(audit["length"]["inside_buckets"]) < 0.2
    (warning,) = audit["warnings"]
    assert "inside length buckets" in warning["text"]


@pytest.mark.parametrize("column", ["scored_bytes", "bytes"])
@pytest.mark.parametrize("sign", [1, -1])
def test_both_lengths_of_pairs_are_looked_at_in_either_direction(column, sign):
    """A score that is one length, up or down, while the other length is by lot."""
    size, other = np.arange(100, 500), np.random.default_rng(0).integers(100, 900, 400)
    lengths = {"bytes": other, "scored_bytes": other} | {column: size}
    score = sign * size.astype(float)
    audit = audited(decisions(score, np.where(score >= np.median(score), "hard", "easy"), **lengths))
    figures = {"scored_bytes": audit["length"], "bytes": audit["whole_length"]}
    assert figures.pop(column)["inside_buckets"] == sign
    (rest,) = figures.values()
    assert abs(rest["inside_buckets"]) < 0.2
    (warning,) = audit["warnings"]
    assert warning["kind"] == "length" and f"{sign:+.2f}" in warning["text"]
    assert ("prompt and answer" in warning["text"]) == (column == "bytes")


def test_samples_are_the_closest_to_the_threshold_and_texts_are_cut():
    score = np.arange(100.0)
    table = decisions(score, np.where(score >= 60, "hard", "easy"))
    audit = audited(table.slice(50), table.slice(0, 50), text="x" * 999)
    sides = audit["samples"]["web"]
    assert [row["score"] for row in sides["kept"]] == list(range(60, 70))
    assert [row["score"] for row in sides["dropped"]] == list(range(59, 49, -1))
    assert {row["threshold"] for row in sides["kept"]} == {60} and len(sides["kept"][0]["text"]) == 300
    given = {"domains": {"web": {"buckets": [{"score": 59.5}]}}}
    assert audited(table, thresholds=given)["samples"]["web"]["dropped"][0]["threshold"] == 59.5
    assert {reason: len(rows) for reason, rows in audit["examples"].items()} == {"hard": 5, "easy": 5}


def test_a_lot_would_have_kept_all_lengths_alike():
    audit = length_is_the_score()
    assert audit["lot"]["rate"] == 0.5
    assert [quarter["kept"] for quarter in audit["lot"]["lengths"]] == [0, 0, 1, 1]
    assert [quarter["documents"] for quarter in audit["lot"]["lengths"]] == [100] * 4
    assert audit["lot"]["mean_score"] == pytest.approx({"lot": 299.5, "kept": 399.5}, rel=1e-4)


def test_scorers_are_compared_where_both_have_a_score():
    score = np.arange(100.0)
    other = np.where(score < 90, -score, np.nan)
    audit = audited(decisions(score, ["easy"] * 50 + ["hard"] * 50, **{"score:loss": other}))
    assert audit["agreement"] == [{"scorers": ["ngram", "loss"], "records": 90, "correlation": -1.0}]


@pytest.mark.parametrize(
    "tables",
    [
        [decisions([], [])],
        [decisions([np.nan] * 3, "malformed", "")],
        [decisions([np.nan] * 3, "unscored"), decisions([np.inf], "unscored", "code")],
        [decisions([1.0], "hard", bytes=np.array([0]))],
        [decisions([2.0] * 50, ["hard", "easy"] * 25)],
        [decisions([-1e300, 0, 1e300], ["easy", "hard", "hard"])],
    ],
    ids=["nothing", "malformed", "unscored", "one", "constant", "huge"],
)
def test_poor_data_is_drawn_too(tables, tmp_path):
    write_audit(audited(*tables), tmp_path, "leviathan filter")
    json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)  # no NaN, no infinity
    assert (tmp_path / "audit.html").read_text().endswith("</html>\n")


class Tags(HTMLParser):
    """What a browser would make of a page: its tags, and whether they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00\x1b\u202e\ud800 $\\frac{ @BODY@ &amp;"
    name = evil.replace("\ud800", "")
    table = halved(40, domain=[name, "other"] * 20)
    table = table.set_column(0, "id", pyarrow.array([name] * 40)).set_column(2, "source", pyarrow.array([name] * 40))
    audit = audited(table, decisions([np.nan], "malformed", name), text=evil)
    write_audit(audit | {"input": name}, tmp_path, f"leviathan filter input={name}")
    content = (tmp_path / "audit.html").read_text()
    tags = Tags()
    tags.feed(content)
    assert not tags.open and "script" not in tags.seen and "onerror" not in tags.attributes
    assert "&lt;script&gt;" in content
    assert not set(content) & set("\x00\x1b\u202e")


def test_a_script_would_be_noticed():
    tags = Tags()
    tags.feed(page("x", "<script>alert(1)</script>"))
    assert "script" in tags.seen


def test_the_page_says_how_to_look_up_and_repeat_and_needs_nothing_else(tmp_path):
    thresholds = {"noise": 5.82, "domains": {"web": {"buckets": [{"score": 3.9}, {"score": None}, {"score": 4.1}]}}}
    audit = audited(halved(60), thresholds=thresholds)
    write_audit(audit, tmp_path, "leviathan filter input=notes.jsonl keep=0.5")
    content = (tmp_path / "audit.html").read_text()
    assert f"leviathan filter explain=ID out={tmp_path}" in content
    assert "leviathan filter input=notes.jsonl keep=0.5" in content
    assert "http" not in content and "50.0%" in content
    assert "3.9 to 4.1" in content and "above 5.82" in content


def test_pictures_are_pictures_in_both_inks():
    from matplotlib.image import imread

    audit = audited(halved(60, domain=["web", "code"] * 30))
    light, dark = draw(audit), draw(audit, dark=True)
    assert list(light) == list(dark) == ["scores", "scores_0", "scores_1", "length"]
    for name, content in light.items():
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[2] == 4 and pixels[0, 0, 3] == 0, "drawn on nothing"
        assert content != dark[name]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.filter.audit.page.write_json", full)
    with pytest.raises(DataError, match="No space left"):
        write_audit(audited(halved(10)), tmp_path, "")


def test_keys_sort_like_numbers_and_come_back():
    values = np.array([-1e30, -7.25, -1e-9, 0.0, 1e-9, 1, 3, 3.14159, 65_535, 1e30])
    keys = key_of(values)
    assert (np.diff(keys) > 0).all()
    assert value_of(keys) == pytest.approx(values, rel=4e-5)
    assert (value_of(key_of(np.arange(65_536.0))) == np.arange(65_536)).all()


def test_ranks_quantiles_and_histograms_by_hand():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16])) == pytest.approx(1)
    # ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1: -4.5 / sqrt(4.5 * 5)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([9.0, 8, 7, 6])) == pytest.approx(-4.5 / np.sqrt(22.5))
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert quantile(np.array([1.0, 2, 3]), np.array([1, 2, 1]), 0.5) == 2
    edges = np.array([0.0, 1, 2])
    assert counts(np.array([-5.0, 0.5, 1, 2, 9]), np.array([1, 1, 1, 1, 1]), edges).tolist() == [2, 3]


def test_first_of_each_and_sums_are_those_of_a_plain_loop():
    chance = np.random.default_rng(0)
    group, value = chance.integers(0, 5, 200), chance.permutation(200)
    table = pyarrow.table({"group": group, "value": value})
    found = first_of_each(table, ["group"], [("value", "descending")], 3).to_pylist()
    assert [row["value"] for row in found] == [
        v for g in range(5) for v in sorted(value[group == g].tolist(), reverse=True)[:3]
    ]
    tally = Tally(["group"], {"value": "sum"})
    tally.add(table.slice(0, 70))
    tally.add(table.slice(70))
    assert tally.rows() == [{"group": g, "value": int(value[group == g].sum())} for g in range(5)]
