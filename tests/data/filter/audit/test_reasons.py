"""Input keys, the reason for each decision, and thresholds per bucket, in the outputs and in `explain`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from markupsafe import escape

from core.errors import ConfigError
from data.filter.audit.outputs import write_audit_of
from data.filter.config import ContaminationConfig, DuplicateConfig, OnError, SelectConfig
from data.filter.explain import explain
from data.filter.pipeline import Filter
from data.filter.score.scorer import Direction
from tests.support.filtering import FixedScorer, filtered, job, kept, prose, rows_of, write_lines, write_outputs

PAIR = {"prompt_key": "text", "response_key": "other"}
CHANGED_KEYS = {
    "text_key": ({}, "other"),
    "prompt_key": (PAIR, "again"),
    "response_key": (PAIR, "again"),
    "template": (PAIR, "{prompt}\n{response}"),
    "messages_key": ({"messages_key": "chat"}, "talk"),
    "id_key": ({}, "name"),
    "domain_key": ({}, "name"),
}


def test_a_changed_input_key_is_rejected_by_name(tmp_path):
    """A changed key makes other records of the same file, so the stages of an earlier run cannot be reused."""
    rows = [
        {"text": one["text"], "other": two["text"], "again": one["text"] + two["text"], "name": f"r{n}"}
        | {key: [{"role": "assistant", "content": one["text"]}] for key in ("chat", "talk")}
        for n, (one, two) in enumerate(zip(prose(4), prose(4, 1), strict=True))
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    for key, (before, new) in CHANGED_KEYS.items():
        out = tmp_path / str(sorted(before))
        filtered(source, out, **before)
        with pytest.raises(ConfigError, match=rf"records: was made with {key}=.* \(now .*\)") as caught:
            Filter(job(source, out, **{**before, key: new})).run()
        assert "\n" not in str(caught.value)
        Filter(job(source, tmp_path / key, **{**before, key: new})).run()


PROBLEMS = [
    ({"domain_key": "q"}, "no 'text'; it has 'q', 'a', 'n'; try text_key=, "),
    ({"prompt_key": "Q", "response_key": "a"}, "no 'Q'; it has 'q', 'a', 'n'; try text_key=, "),
    ({"text_key": "n"}, "'n' is int, not str; its keys are 'q', 'a', 'n'; try text_key=, "),
    ({"text_key": "q", "domain_key": "topics"}, "no 'topics'; it has 'q', 'a', 'n'; try domain_key="),
]


@pytest.mark.parametrize(("keys", "problem"), PROBLEMS)
def test_an_unreadable_input_is_rejected_until_keys_fit(tmp_path, keys, problem):
    source = write_lines(
        tmp_path / "in.jsonl", [{"q": row["text"], "a": "x" + row["text"], "n": 3} for row in prose(2)]
    )
    message = f"none of 2 records can be read; in.jsonl:1: {problem}"
    for on_error in OnError:
        expected = "input=in.jsonl:1: cannot be read: " if on_error is OnError.fail else message
        with pytest.raises(ConfigError) as caught:
            Filter(job(source, tmp_path / "out", on_error=on_error, **keys)).run()
        assert expected in str(caught.value)
    assert len(rows_of(filtered(source, tmp_path / "out", prompt_key="q", response_key="a"))) == 2


def test_one_readable_record_in_any_shard_is_enough(tmp_path, small_shards):
    source = write_lines(tmp_path / "in.jsonl", [{"no": 1}] * 40 + prose(1))
    filtered(source, tmp_path / "out")
    assert len(kept(tmp_path / "out")) == 1


def test_reasons_name_the_set_the_original_or_the_problem(tmp_path, small_shards):
    """Plant duplicates of a record in another shard, a passage of an evaluation set, and a line without text."""
    rows: list[Any] = prose(60, words=60)
    exam = write_lines(tmp_path / "exam.jsonl", [{"q": rows[7]["text"]}])
    rows[40] = {"text": rows[3]["text"].upper()}
    rows[41] = {"text": rows[3]["text"] + " and more"}
    rows[42] = {"text": rows[41]["text"]}
    rows[50] = {"words": "no <b>text\x1b[2J"}
    sets = ContaminationConfig({"none": str(write_lines(tmp_path / "none.jsonl", prose(1, 99))), "exam": str(exam)})
    done = filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", contamination=sets)
    found = {row["id"]: (row["reason"], row["detail"]) for row in rows_of(done) if row["detail"] is not None}
    problem = """no 'text'; it has 'words': {"words": "no <b>text\\u001b[2J"}"""
    assert found == {
        "in.jsonl:8": ("contaminated", "exam"),
        "in.jsonl:41": ("duplicate", "in.jsonl:4"),
        "in.jsonl:42": ("near_duplicate", "in.jsonl:4"),
        "in.jsonl:43": ("duplicate", "in.jsonl:4"),
        "in.jsonl:51": ("malformed", problem),
    }
    write_audit_of(done, tmp_path / "out", "in.jsonl")
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    page = (tmp_path / "out" / "audit.html").read_text()
    for name, text in {
        "in.jsonl:8": "contaminated by exam",
        "in.jsonl:41": "duplicate of in.jsonl:4",
        "in.jsonl:42": "near_duplicate of in.jsonl:4",
        "in.jsonl:51": f"malformed: {problem}",
    }.items():
        assert explain(tmp_path / "out", name).splitlines()[0].endswith(f"dropped, {text}")
        (example,) = [row for row in audit["examples"][found[name][0]] if row["id"] == name]
        assert example["detail"] == found[name][1] and str(escape(text)) in page


def test_a_kept_unreadable_record_has_its_problem(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [*prose(10), {"words": 1}])
    with open(source, "ab") as file:
        file.write(b"\xff\x1b" + b"x" * 5000)
    unreadable = source.read_bytes().split(b"\n")[-2:]
    *_, last, binary = rows_of(filtered(source, tmp_path / "out", on_error=OnError.keep))
    assert kept(tmp_path / "out")[-2:] == unreadable, "unreadable records are kept unchanged"
    assert (last["reason"], last["detail"]) == ("protected", """no 'text'; it has 'words': {"words": 1}""")
    assert "\x1b" not in binary["detail"] and len(binary["detail"]) < 500 and binary["detail"].endswith("xxx")


def test_a_gated_record_is_not_an_original(tmp_path):
    """If a gate rejects a record, a later record with the same or nearly the same text is no duplicate."""
    rows = [{"q": row["text"], "a": f"So {other['text']}"} for row, other in zip(prose(20), prose(20, 1), strict=True)]
    rows[2] = {"q": f"{rows[9]['q']}\n\n{rows[9]['a']}", "a": ""}
    rows[3] = {"q": f"{rows[10]['q']}\n\n{rows[10]['a']} indeed", "a": ""}
    source = write_lines(tmp_path / "in.jsonl", rows)
    found = rows_of(filtered(source, tmp_path / "out", prompt_key="q", response_key="a"))
    assert [found[place]["reason"] for place in (2, 3)] == ["empty"] * 2
    assert {row["reason"] for place, row in enumerate(found) if place not in (2, 3)} == {"hard", "easy"}
    rows[2], rows[3] = dict(rows[9]), {"q": rows[10]["q"], "a": f"{rows[10]['a']} indeed"}
    source = write_lines(tmp_path / "whole.jsonl", rows)
    found = rows_of(filtered(source, tmp_path / "whole", prompt_key="q", response_key="a"))
    assert [found[place]["reason"] for place in (9, 10)] == ["duplicate", "near_duplicate"], "control"


def test_buckets_are_by_the_length_of_the_scored_part(tmp_path):
    """Buckets by prompt length or by token count would differ, since neither follows the length of the answer."""

    def text(seed: int, is_long: int) -> str:
        return str(prose(1, seed, words=10 + 60 * is_long)[0]["text"])

    rows = [{"q": text(n, n % 2), "a": text(n + 500, n // 2 % 2)} for n in range(160)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    made = job(source, tmp_path / "out", prompt_key="q", response_key="a", select=SelectConfig(length_buckets=2))
    done = Filter(replace(made, count_tokens=lambda texts: [10_000 - len(text) for text in texts]))
    done.run()
    write_outputs(done, tmp_path / "out")
    found = rows_of(done)
    assert [row["scored_bytes"] for row in found] == [len(row["a"]) for row in rows]
    assert [row["length"] for row in found] == [len(row["q"]) + 2 + len(row["a"]) for row in rows]
    assert {row["bucket"] for row in found} == {0, 1}
    assert all(row["bucket"] == (len(one["a"]) > 200) for row, one in zip(found, rows, strict=True))


def test_each_bucket_of_a_domain_has_its_threshold(tmp_path):
    rows = [
        row | {"domain": domain}
        for domain, seeds in (("code", (0, 1)), ("web", (2, 3)))
        for seed, words in zip(seeds, (8, 60), strict=True)
        for row in prose(40, seed, words)
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    done = filtered(source, tmp_path / "out", select=SelectConfig(length_buckets=2), domain_key="domain")
    found = rows_of(done)
    assert [row["bucket"] for row in found] == ([0] * 40 + [1] * 40) * 2
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    thresholds = audit["thresholds"]["domains"]
    limits = {(name, n): one["score"] for name, given in thresholds.items() for n, one in enumerate(given["buckets"])}
    placed = {row["id"]: (row["domain"], row["bucket"]) for row in found}
    shown = [row for found in audit["samples"].values() for side in found.values() for row in side]
    assert {placed[row["id"]] for row in shown} == set(limits) and len(set(limits.values())) == 4
    assert all(row["threshold"] == pytest.approx(limits[placed[row["id"]]], abs=1e-3) for row in shown)
    for row in found[::20]:
        bucket = thresholds[row["domain"]]["buckets"][row["bucket"]]
        among = f"for records of its domain with {bucket['length']:,} scored bytes or more"
        assert explain(tmp_path / "out", row["id"]).endswith(f"\nthreshold {bucket['score']:.4f} {among}")


def test_a_score_of_quality_is_explained_as_better_or_worse(tmp_path):
    scorer = FixedScorer(lambda record: float(record.id.split(":")[1]))
    scorer.direction = Direction.quality
    filtered(write_lines(tmp_path / "in.jsonl", prose(10)), tmp_path / "out", scorer)
    for row, reason in ((1, "dropped, worse"), (10, "kept, better")):
        assert explain(tmp_path / "out", f"in.jsonl:{row}").splitlines()[0].endswith(reason)


def test_without_deduplication_no_signatures_are_read(tmp_path, monkeypatch):
    find = Mock(side_effect=AssertionError("looked"))
    monkeypatch.setattr("data.filter.pipeline._signatures", find)
    source = write_lines(tmp_path / "in.jsonl", prose(10) * 2)
    done = filtered(source, tmp_path / "out", duplicates=DuplicateConfig(exact=False, near=None))
    assert {row["reason"] for row in rows_of(done)} == {"easy", "hard"}
    with pytest.raises(AssertionError, match="looked"):
        filtered(source, tmp_path / "control", duplicates=DuplicateConfig(near=None))
