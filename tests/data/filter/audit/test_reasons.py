"""What makes a record, why it went, and among which others it competed: as the outputs and `explain` tell it."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from data.filter.audit.outputs import write_audit_of
from data.filter.config import ContaminationConfig, DuplicateConfig, OnError, SelectConfig
from data.filter.explain import explain
from data.filter.pipeline import Filter
from tests.support.filtering import filtered, job, kept, prose, rows_of, write_lines, write_outputs

CHANGED_KEYS = {
    "text_key": ({}, "other"),
    "prompt_key": ({"prompt_key": "text", "response_key": "other"}, "again"),
    "response_key": ({"prompt_key": "text", "response_key": "other"}, "again"),
    "template": ({"prompt_key": "text", "response_key": "other"}, "{prompt}\n{response}"),
    "messages_key": ({"messages_key": "chat"}, "talk"),
    "id_key": ({}, "name"),
    "domain_key": ({}, "name"),
}


@pytest.mark.parametrize("key", CHANGED_KEYS)
def test_another_key_of_the_input_is_refused_by_name(tmp_path, key):
    """It makes other records of the same file, so what an earlier run found is not theirs."""
    rows = [
        {"text": one["text"], "other": two["text"], "again": three["text"], "name": f"r{n}"}
        | {key: [{"role": "assistant", "content": one["text"]}] for key in ("chat", "talk")}
        for n, (one, two, three) in enumerate(zip(prose(20), prose(20, 1), prose(20, 2), strict=True))
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    before, new = CHANGED_KEYS[key]
    filtered(source, tmp_path / "out", **before)
    filtered(source, tmp_path / "out", **before)
    with pytest.raises(ConfigError, match=rf"records: was made with {key}=.* \(now .*\)") as caught:
        filtered(source, tmp_path / "out", **{**before, key: new})
    assert "\n" not in str(caught.value)
    filtered(source, tmp_path / "other", **{**before, key: new})


FIRST = "none of 2 records can be read; in.jsonl:1: "
UNREADABLE = {
    "forgotten": ({}, f"{FIRST}no 'text'; it has 'q', 'a', 'n'; try text_key=, "),
    "wrong": ({"prompt_key": "Q", "response_key": "a"}, f"{FIRST}no 'Q'; it has 'q', 'a', 'n'; try text_key=, "),
    "not text": ({"text_key": "n"}, f"{FIRST}'n' is int, not str; its keys are 'q', 'a', 'n'; try text_key=, "),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_input_of_which_nothing_can_be_read_is_refused_and_may_be_read_by_other_keys(tmp_path, case):
    rows = [{"q": row["text"], "a": "x" + row["text"], "n": 3} for row in prose(2)]
    source, (keys, message) = write_lines(tmp_path / "in.jsonl", rows), UNREADABLE[case]
    for on_error in (OnError.drop, OnError.keep):
        with pytest.raises(ConfigError) as caught:
            filtered(source, tmp_path / "out", on_error=on_error, **keys)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"input=in\.jsonl:1: cannot be read: "):
        filtered(source, tmp_path / "out", on_error=OnError.fail, **keys)
    assert len(rows_of(filtered(source, tmp_path / "out", prompt_key="q", response_key="a"))) == 2


def test_one_readable_record_in_any_shard_is_enough(tmp_path, small_shards):
    source = write_lines(tmp_path / "in.jsonl", [{"no": 1}] * 40 + prose(1))
    filtered(source, tmp_path / "out")
    assert len(kept(tmp_path / "out")) == 1
    (tmp_path / "in.jsonl").write_bytes(b"broken\n" * 40)
    with pytest.raises(ConfigError, match=r"none of 40 records can be read; in\.jsonl:1: Expecting value"):
        filtered(source, tmp_path / "broken")


# -- details of the reasons


def planted(tmp_path: Path) -> Filter:
    """Copies of a record of another shard, a passage of an evaluation set, and what is no record."""
    rows: list[Any] = prose(60, words=60)
    exam = write_lines(tmp_path / "exam.jsonl", [{"q": rows[7]["text"]}])
    rows[40] = {"text": rows[3]["text"].upper()}
    rows[41] = {"text": rows[3]["text"] + " and more"}
    rows[42] = {"text": rows[41]["text"]}
    rows[50] = {"words": "no <b>text\x1b[2J"}
    sets = ContaminationConfig({"none": str(write_lines(tmp_path / "none.jsonl", prose(1, 99))), "exam": str(exam)})
    return filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", contamination=sets)


def test_every_reason_says_by_which_set_of_which_record_or_why_it_is_no_record(tmp_path, small_shards):
    done = planted(tmp_path)
    told = {row["id"]: (row["reason"], row["detail"]) for row in rows_of(done) if row["detail"] is not None}
    problem = """no 'text'; it has 'words': {"words": "no <b>text\\u001b[2J"}"""
    assert told == {
        "in.jsonl:8": ("contaminated", "exam"),
        "in.jsonl:41": ("duplicate", "in.jsonl:4"),
        "in.jsonl:42": ("near_duplicate", "in.jsonl:4"),
        "in.jsonl:43": ("duplicate", "in.jsonl:4"),
        "in.jsonl:51": ("malformed", problem),
    }
    write_audit_of(done, tmp_path / "out", "in.jsonl")
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    page = (tmp_path / "out" / "audit.html").read_text()
    wanted = {
        "in.jsonl:8": "contaminated by exam",
        "in.jsonl:41": "duplicate of in.jsonl:4",
        "in.jsonl:42": "near_duplicate of in.jsonl:4",
        "in.jsonl:51": f"malformed: {problem}",
    }
    for name, text in wanted.items():
        assert explain(tmp_path / "out", name).splitlines()[0].endswith(f"left out, {text}")
        (example,) = [row for row in audit["examples"][told[name][0]] if row["id"] == name]
        assert example["detail"] == told[name][1] and escape(text) in page


def test_what_could_not_be_read_says_why_though_it_is_kept(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [*prose(10), {"words": 1}])
    with open(source, "ab") as file:
        file.write(b"\xff\x1b" + b"x" * 5000)
    *_, last, binary = rows_of(filtered(source, tmp_path / "out", on_error=OnError.keep))
    assert (last["reason"], last["detail"]) == ("protected", """no 'text'; it has 'words': {"words": 1}""")
    assert "\x1b" not in binary["detail"] and len(binary["detail"]) < 500 and binary["detail"].endswith("xxx")


def test_what_a_gate_left_out_is_nobodys_original(tmp_path):
    """Of two pairs the whole text is the same, or nearly so, and the first has no answer of its own."""
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


# -- buckets of length


def test_records_compete_with_those_whose_scored_part_is_as_long(tmp_path):
    """Prompts of another length, and tokens in the opposite order: each would make other buckets."""
    rows = [
        {
            "q": prose(1, n, words=10 + 60 * (n % 2))[0]["text"],
            "a": prose(1, n + 500, words=10 + 60 * (n // 2 % 2))[0]["text"],
        }
        for n in range(160)
    ]
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


def test_buckets_are_numbered_inside_each_domain_and_each_has_its_threshold(tmp_path):
    rows = [
        {**row, "domain": domain}
        for seed, domain in enumerate(("code", "web"))
        for part, words in enumerate((8, 60))
        for row in prose(40, 2 * seed + part, words)
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    done = filtered(source, tmp_path / "out", select=SelectConfig(length_buckets=2), domain_key="domain")
    found = rows_of(done)
    assert [row["bucket"] for row in found] == ([0] * 40 + [1] * 40) * 2
    thresholds = json.loads((tmp_path / "out" / "audit.json").read_text())["thresholds"]["domains"]
    for row in found[::20]:
        bucket = thresholds[row["domain"]]["buckets"][row["bucket"]]
        among = f"among records of its domain, of {bucket['length']:,} scored bytes and more"
        assert explain(tmp_path / "out", row["id"]).endswith(f"\nthreshold {bucket['score']:.4f} {among}")


def test_where_no_copies_are_looked_for_no_signatures_are_read(tmp_path, monkeypatch):
    def look(*arguments: Any) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr("data.filter.pipeline.find_duplicates", look)
    source = write_lines(tmp_path / "in.jsonl", prose(10) * 2)
    done = filtered(source, tmp_path / "out", duplicates=DuplicateConfig(exact=False, near=None))
    assert {row["reason"] for row in rows_of(done)} == {"easy", "hard"}
    with pytest.raises(AssertionError, match="looked"):
        filtered(source, tmp_path / "control", duplicates=DuplicateConfig(near=None))
