"""The audit's counts add up in any order of the shards. It warns when it should, and it escapes all text."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pytest
from matplotlib.image import imread

from core.errors import DataError
from core.html import page
from data.filter.audit.outputs import write_audit
from data.filter.audit.plots import draw
from data.filter.audit.separation import spearman
from data.filter.audit.statistics import Audit
from data.filter.config import FilterRules, KeepUnit, SelectConfig
from data.filter.input.records import Reason
from data.filter.score.baselines import LengthScorer

RULES = FilterRules(keep=0.5, unit=KeepUnit.documents, select=SelectConfig(length_buckets=1))


def decisions(score: Any, reasons: Any, domain: Any = "web", seed: int = 0, **columns: Any) -> pyarrow.Table:
    """Return the decisions of one shard: random lengths, all in one length bucket."""
    count, chance = len(score), np.random.default_rng(seed)
    size = columns.pop("bytes", chance.integers(40, 4000, count))
    reasons = [reasons] * count if isinstance(reasons, str) else list(reasons)
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
    """Return a shard with random scores, of which the higher half was kept."""
    score = np.random.default_rng(seed + 100).normal(4, 1, count)
    return decisions(score, np.where(score >= np.median(score), "hard", "easy"), seed=seed, **more)


def audited(*tables: pyarrow.Table, rules: FilterRules = RULES, text: str = "a text", **more: Any) -> dict[str, Any]:
    """Audit the tables. `more`: `thresholds`, and `lost`, the documents or tokens read but absent from the tables."""
    tokens = sum(int(np.sum(table["tokens"].to_numpy())) for table in tables)
    read = {"documents": sum(map(len, tables)), "tokens": tokens}
    read |= {unit: read[unit] + size for unit, size in more.get("lost", {}).items()}
    audit = Audit(rules, LengthScorer(), more.get("thresholds", {}), "notes.jsonl", **read)
    for place, table in enumerate(tables):
        audit.add(f"{place:05}", table)
    return audit.finish(lambda shard, row: text)


def kinds(audit: dict[str, Any]) -> set[str]:
    return {warning["kind"] for warning in audit["warnings"]}


def test_counts_are_those_of_a_plain_count_and_add_up():
    tables = [halved(300, 1, domain=["web", "code", "maths"] * 100), decisions([np.nan] * 7, "duplicate", "code")]
    audit = audited(*tables)
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


@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_lost_documents_and_tokens_are_noticed(unit):
    with pytest.raises(DataError, match=f"the reasons add up to .* {unit}, but .* were read"):
        audited(halved(100), lost={unit: 1})


@pytest.mark.parametrize(("reason", "kept"), [("easy", True), ("hard", False), ("boring", False), (None, False)])
def test_a_decision_must_match_its_reason(reason, kept):
    columns = {"kept": [kept], "reason": pyarrow.array([reason], "string")}
    with pytest.raises(DataError, match=f"reason={reason} and kept={kept}"):
        audited(decisions([1.0], "hard", **columns))


def test_the_order_of_shards_changes_no_byte(monkeypatch):
    monkeypatch.setattr("data.filter.audit.statistics._SAMPLE", 150)  # fewer than the records
    names = ["web", "code"] * 50
    tables = {f"{place}": halved(100, place, domain=names, **{"score:length": np.arange(100.0)}) for place in range(5)}
    tables["5"] = decisions([np.nan] * 9, "malformed", "")

    def written(order: list[str]) -> str:
        tokens = sum(int(np.sum(table["tokens"].to_numpy())) for table in tables.values())
        audit = Audit(RULES, LengthScorer(), {}, "x", 509, tokens)
        for name in order:
            audit.add(name, tables[name])
        return json.dumps(audit.finish(lambda shard, row: f"text {shard} {row}"))

    first = written(list(tables))
    assert first == written(list(reversed(tables))) == written(["2", "5", "0", "4", "1", "3"])
    tables["0"] = halved(100, 77, domain=names, **{"score:length": np.arange(100.0)})
    assert first != written(list(tables))


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
}


@pytest.mark.parametrize("kind", WARNED)
def test_warns(kind):
    assert kind in kinds(WARNED[kind]())


def test_a_domain_that_shrinks_is_named_alone():
    fallen = decisions(np.arange(90.0), ["easy"] * 80 + ["hard"] * 10, "code")
    (text,) = [one["text"] for one in audited(halved(900), fallen)["warnings"] if one["kind"] == "mix"]
    assert "code 9" in text and "web" not in text


def test_does_not_warn_just_inside_the_limits():
    """No warning for ordinary results, one unscored record, one document too many, a floor or a protected domain."""
    assert audited(halved(400, domain=["web", "code"] * 200))["warnings"] == []
    assert kinds(audited(halved(100), decisions([np.nan] * 1, "unscored"))) == set()
    assert kinds(audited(decisions(np.arange(3.0), ["easy", "hard", "hard"]))) == set()
    floor = replace(RULES, select=SelectConfig(floor=8))
    kept_whole = decisions(np.arange(8.0), "protected", "code")
    assert "off_target" not in kinds(audited(halved(100), kept_whole, rules=floor))
    ruled = replace(RULES, select=SelectConfig(protect=["code"]))
    assert "off_target" not in kinds(audited(halved(100), kept_whole, rules=ruled))
    assert "off_target" in kinds(audited(halved(100), kept_whole))
    for kept, warned in ((8, True), (9, False), (10, False), (11, False), (12, True)):  # of 20 documents
        audit = audited(decisions(np.arange(20.0), ["easy"] * (20 - kept) + ["hard"] * kept))
        assert ("off_target" in kinds(audit)) == warned


def test_length_inside_buckets_differs_from_length_overall():
    """Make two length buckets. Scores are higher in the longer one and random inside each."""
    chance = np.random.default_rng(0)
    bucket = np.repeat([0, 1], 200).astype(np.int32)
    size = bucket * 1000 + chance.integers(100, 900, 400)
    score = bucket * 50 + chance.normal(0, 1, 400)
    medians = np.array([np.median(score[bucket == place]) for place in range(2)])
    reason = np.where(score >= medians[bucket], "hard", "easy")
    audit = audited(decisions(score, reason, bytes=size, bucket=bucket))
    assert audit["length"]["overall"] > 0.7 and abs(audit["length"]["inside_buckets"]) < 0.2
    (warning,) = audit["warnings"]
    assert "inside length buckets" in warning["text"]


@pytest.mark.parametrize("column", ["scored_bytes", "bytes"])
@pytest.mark.parametrize("sign", [1, -1])
def test_both_lengths_of_pairs_are_checked_in_both_directions(column, sign):
    """The score follows one length, rising or falling; the other length is random."""
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


def test_samples_are_closest_to_the_threshold_and_texts_cut():
    score = np.arange(100.0)
    table = decisions(score, np.where(score >= 60, "hard", "easy"))
    given = {"domains": {"web": {"buckets": [{"score": 60.0}]}}}
    audit = audited(table.slice(50), table.slice(0, 50), text="x" * 999, thresholds=given)
    sides = audit["samples"]["web"]
    assert [row["score"] for row in sides["kept"]] == list(range(60, 70))
    assert [row["score"] for row in sides["dropped"]] == list(range(59, 49, -1))
    assert {row["threshold"] for row in sides["kept"]} == {60} and len(sides["kept"][0]["text"]) == 300
    given["domains"]["web"]["buckets"][0]["score"] = 59.5
    assert audited(table, thresholds=given)["samples"]["web"]["dropped"][0]["threshold"] == 59.5
    assert {reason: len(rows) for reason, rows in audit["examples"].items()} == {"hard": 5, "easy": 5}


def test_random_dropping_keeps_all_lengths_alike():
    random = length_is_the_score()["random"]
    assert random["rate"] == 0.5 and [quarter["kept"] for quarter in random["lengths"]] == [0, 0, 1, 1]
    assert [quarter["documents"] for quarter in random["lengths"]] == [100] * 4
    assert random["mean_score"] == pytest.approx({"random": 299.5, "kept": 399.5}, rel=1e-4)


def test_scorers_are_compared_where_both_have_a_score():
    other = np.where(np.arange(100) < 90, -np.arange(100.0), np.nan)
    audit = audited(decisions(np.arange(100.0), ["easy"] * 50 + ["hard"] * 50, **{"score:loss": other}))
    assert audit["agreement"] == [{"scorers": ["length", "loss"], "records": 90, "correlation": -1.0}]


POOR = {
    "nothing": [decisions([], [])],
    "malformed": [decisions([np.nan] * 3, "malformed", "")],
    "unscored": [decisions([np.nan] * 3, "unscored"), decisions([np.inf], "unscored", "code")],
    "one": [decisions([1.0], "hard", bytes=np.array([0]))],
    "constant": [decisions([2.0] * 50, ["hard", "easy"] * 25)],
    "huge": [decisions([-1e300, 0, 1e300], ["easy", "hard", "hard"])],
}


@pytest.mark.parametrize("name", POOR)
def test_poor_data_has_a_page_too(name, tmp_path):
    write_audit(audited(*POOR[name]), tmp_path, "leviathan filter")
    json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)  # no NaN, no infinity
    assert (tmp_path / "audit.html").read_text().endswith("</html>\n")


class Tags(HTMLParser):
    """Collect the tags and attributes of a page. Fail if tags do not close in order."""

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
    evil = (
        "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00\x1b\u202e\ud800 $\\frac{ @BODY@ {{ 7*7 }} &amp;"
    )
    name = evil.replace("\ud800", "")
    names = {key: [name] * 40 for key in ("id", "source", "detail", "why")}
    table = halved(40, domain=[name, "other"] * 20, **names, **{f"score:{name}": np.arange(40.0)})
    thresholds = {"noise": 1.0, "domains": {name: {"buckets": [{"score": 4.0}, {"score": 4.5}]}}}
    unread = decisions([np.nan], "malformed", name, detail=[name], why=[name])
    audit = audited(table, unread, text=evil, thresholds=thresholds)
    write_audit(audit | {"input": name}, tmp_path, f"leviathan filter input={name}")
    content = (tmp_path / "audit.html").read_text()
    tags = Tags()
    tags.feed(content)
    assert not tags.open and "script" not in tags.seen and "onerror" not in tags.attributes
    assert "&lt;script&gt;" in content and "{{ 7*7 }}" in content
    assert not set(content) & set("\x00\x1b\u202e")
    tags.feed(page("x", "<script>alert(1)</script>"))
    assert "script" in tags.seen, "control: a script is noticed"


def test_the_page_has_commands_and_is_self_contained(tmp_path, monkeypatch):
    monkeypatch.setattr("data.filter.audit.outputs.draw", lambda audit, dark=False: {})
    thresholds = {"noise": 5.82, "domains": {"web": {"buckets": [{"score": 3.9}, {"score": None}, {"score": 4.1}]}}}
    audit = audited(halved(60), thresholds=thresholds)
    write_audit(audit, tmp_path, "leviathan filter input=notes.jsonl keep=0.5")
    content = (tmp_path / "audit.html").read_text()
    assert f"leviathan filter explain=ID out={tmp_path}" in content
    assert "leviathan filter input=notes.jsonl keep=0.5" in content
    assert "http" not in content and "50.0%" in content
    assert "3.9 to 4.1" in content and "above 5.82" in content


def test_pictures_have_two_inks():
    audit = audited(halved(60, domain=["web", "code"] * 30))
    light, dark = draw(audit), draw(audit, dark=True)
    assert list(light) == list(dark) == ["scores", "scores_0", "scores_1"]
    for name, content in light.items():
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[2] == 4 and pixels[0, 0, 3] == 0, "the background is transparent"
        assert content != dark[name]


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("data.filter.audit.outputs.write_json", full)
    with pytest.raises(DataError, match="No space left"):
        write_audit(audited(halved(10)), tmp_path, "")


def test_ranks_by_hand():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16])) == pytest.approx(1)
    # ranks 1, 2.5, 2.5, 4 and 4, 3, 2, 1: sum of products of deviations -4.5, sums of squares 4.5 and 5
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([9.0, 8, 7, 6])) == pytest.approx(-4.5 / np.sqrt(22.5))
    assert spearman(np.ones(5), np.arange(5.0)) is None
