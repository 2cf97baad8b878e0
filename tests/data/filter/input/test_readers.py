"""Records come out of every kind of file; malformed ones are counted, kept or refused by name."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from data.filter.config import OnError
from data.filter.input.readers import RECORD_KEYS, InputConfig, MalformedRecord, clean_records, input_parts
from data.filter.input.records import Record
from tests.support.filtering import filtered, kept, prose, rows_of, write_lines


def read(path: Path | None = None, **keys: Any) -> list[Record | MalformedRecord]:
    config = InputConfig(**({"input": str(path)} if path else {}), **keys)
    return [record for part in input_parts(config) for record in part.records()]


def texts(found: list[Record | MalformedRecord]) -> list[str]:
    return [one.text if isinstance(one, Record) else f"! {one.reason}" for one in found]


ROWS = [{"text": f"document {number} \u2028 é", "n": number} for number in range(3)]


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    wanted = [row["text"] for row in ROWS]
    for name, first in (("plain.jsonl", 1), ("packed.jsonl.gz", 1), ("table.parquet", 0)):
        found = read(tmp_path / name)
        assert texts(found) == wanted
        assert [one.id for one in found] == [f"{name}:{first + n}" for n in range(3)]
    (tmp_path / "note.md").write_text("a note")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(read(tmp_path)) == ["a note", *wanted * 3], "a folder: files of a known suffix, by name"
    assert texts(read(tmp_path / "*.jsonl")) == wanted, "a pattern"


def test_columns_of_parquet_are_kept_or_refused_by_name(tmp_path):
    row: dict[str, Any] = {
        "text": "a text",
        "bytes": b"\x00\xff",
        "nan": float("nan"),
        "nested": [{"inf": float("-inf"), "bytes": [b"a"]}],
        "date": date(2024, 2, 29),
        "when": datetime(2024, 2, 29, 12, 30, 1, 5, UTC),
        "price": Decimal("1.10"),
        "sure": True,
        "none": None,
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "table.parquet")
    (one,) = read(tmp_path / "table.parquet")
    (broken,) = read(tmp_path / "table.parquet", text_key="bytes")
    assert isinstance(one, Record) and isinstance(broken, MalformedRecord) and broken.raw == (one.raw or "").encode()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(one.raw or "", parse_constant=refuse) == row | {
        "bytes": {"base64": "AP8="},
        "nan": None,
        "nested": [{"inf": None, "bytes": [{"base64": "YQ=="}]}],
        "date": "2024-02-29",
        "when": "2024-02-29T12:30:01.000005+00:00",
        "price": "1.10",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"took": timedelta(1)}]), tmp_path / "table.parquet")
    with pytest.raises(ConfigError, match=r"^input=table\.parquet:0: the column 'took' holds a timedelta, .*drop that"):
        read(tmp_path / "table.parquet")


def test_a_folder_for_the_datasets_library(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = read(dataset=str(folder), id_key="n")
    assert texts(found) == [row["text"] for row in ROWS] and [one.id for one in found] == ["0", "1", "2"]
    before = input_parts(InputConfig(dataset=str(folder)))[0].fingerprint
    (folder / "data.jsonl").write_text('{"text": "other", "n": 5}\n')
    assert input_parts(InputConfig(dataset=str(folder)))[0].fingerprint != before
    with pytest.raises(ConfigError, match=r"^dataset=.*: cannot be read: "):
        read(dataset=str(tmp_path / "none"))
    given = {key: f"{{prompt}} {key} {{response}}" for key in RECORD_KEYS if key != "messages_key"}
    for keys in (given, {"messages_key": "chat"}):
        (part,) = input_parts(InputConfig(dataset="a set", **keys))
        assert part.keys == {key: getattr(InputConfig(dataset="a set"), key) for key in RECORD_KEYS} | keys


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "several")
    wanted = [row["text"] for row in ROWS]
    assert texts(read(dataset=str(tmp_path / "one"))) == texts(read(dataset=str(tmp_path / "several"))) == wanted
    assert texts(read(dataset=str(tmp_path / "several"), split="test")) == wanted[1:2]
    with pytest.raises(ConfigError, match=r"^split=dev: .*several was saved without it; try test or train"):
        read(dataset=str(tmp_path / "several"), split="dev")


def test_pairs_are_put_together_by_the_template(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [{"q": "Why {response}?", "a": "So {prompt}."}])
    (one,) = read(path, prompt_key="q", response_key="a", template="Q: {prompt}\nA: {response}\n")
    assert (one.prompt, one.answer) == ("Q: Why {response}?\nA: ", "So {prompt}.\n"), "braces in a text are not fields"
    (one,) = read(path, prompt_key="q", response_key="a")
    assert one.text == "Why {response}?\n\nSo {prompt}."


def test_the_response_of_a_chat_is_the_last_answer(tmp_path):
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "the last"},
        {"role": "user", "content": "and this is ignored"},
    ]
    bad = [[{"role": "user", "content": "no answer"}], ["text"], [{"role": "user"}], "no list", None]
    path = write_lines(tmp_path / "chats.jsonl", [{"m": messages} for messages in [chat, *bad]])
    first, *others = read(path, messages_key="m")
    assert first.answer == "the last" and first.prompt.endswith("user:\ngo on\n\nassistant:\n")
    assert texts(others) == [
        "! no message of the assistant",
        "! a message is not an object with role and content",
        "! no 'content'; it has 'role'",
        "! 'm' is str, not list",
        "! 'm' is null, not list",
    ]


def test_names_and_domains_are_text_or_whole_numbers(tmp_path):
    rows: list[Any] = [
        {"text": "t", "id": i, "d": d} for i, d in [(7, "a"), ("x", 3), (1.5, "a"), (True, "a"), ("y", None)]
    ]
    found = read(write_lines(tmp_path / "in.jsonl", rows), id_key="id", domain_key="d")
    assert [(one.id, one.domain) for one in found if isinstance(one, Record)] == [("7", "a"), ("x", "3")]
    assert [one.reason for one in found if isinstance(one, MalformedRecord)] == [
        "'id' is float, not str or int",
        "'id' is bool, not str or int",
        "'d' is null, not str or int",
    ]


MALFORMED = {
    b"{": "Expecting property name",
    b"[1]": "not an object with keys and values",
    b'{"other": "x"}': "no 'text'; it has 'other'",
    b'{"text": 3}': "'text' is int, not str",
    b'{"text": null}': "'text' is null, not str",
    b'{"text": "\xff"}': "can't decode byte 0xff",
    b'{"text": "\\ud800"}': "holds half of a surrogate pair",
    b"[" * 100_000: "recursion",
    b'{"text": ' + b"9" * 5000 + b"}": "Exceeds the limit",
}


@pytest.mark.parametrize("line", MALFORMED, ids=[f"{number}" for number in range(len(MALFORMED))])
def test_malformed_records_say_why(tmp_path, line):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}')
    before, broken, after = read(tmp_path / "in.jsonl")
    assert isinstance(broken, MalformedRecord) and MALFORMED[line] in broken.reason and len(broken.reason) <= 200
    assert broken.source == "in.jsonl:2" and broken.raw == line
    assert texts([before, after]) == ["before", "after"]


def test_lines_are_unchanged_but_for_their_ends(tmp_path):
    content = b'\xef\xbb\xbf{"text": "first"}\r\n\n \t{ "text":"caf\\u00e9" }  \n'
    (tmp_path / "in.jsonl").write_bytes(content)
    found = read(tmp_path / "in.jsonl")
    assert [one.raw for one in found] == ['{"text": "first"}', ' \t{ "text":"caf\\u00e9" }  ']
    assert texts(found) == ["first", "café"] and found[1].id == "in.jsonl:3"


def test_a_damaged_file_is_named(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in prose(300)).encode()
    packed = gzip.compress(lines)
    damaged = {
        "cut.jsonl.gz": packed[:-200],
        "mixed.jsonl.gz": packed[:200] + b"\0" * 50 + packed[250:],
        "no.jsonl.gz": b"no gzip",
        "cut.parquet": b"PAR1 and no more",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"input=.*/{name}: cannot be read: "):
            read(tmp_path / name)
    (tmp_path / "whole.jsonl.gz").write_bytes(packed)
    assert len(read(tmp_path / "whole.jsonl.gz")) == 300, "control"


def test_wrong_inputs_are_refused(tmp_path):
    (tmp_path / "in.csv").write_text("a,b")
    for path, reason in (
        (tmp_path / "in.csv", "unknown suffix; try .jsonl, .jsonl.gz"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(ConfigError, match=f"input=.*: {reason}"):
            input_parts(InputConfig(input=str(path)))
    for keys, reason in (
        ({}, "name a file or folder"),
        ({"input": "a", "dataset": "b"}, "name a file or folder"),
        ({"input": "a", "prompt_key": "q"}, "go together"),
        ({"input": "a", "prompt_key": "q", "response_key": "a", "messages_key": "m"}, "set it, or prompt_key"),
        ({"input": "a", "template": "{response}{prompt}"}, "needs {prompt} and, after it, {response}"),
    ):
        with pytest.raises(ConfigError, match=reason):
            InputConfig(**keys)


def test_malformed_records_follow_on_error(tmp_path):
    mixed = [b"{", b'{"text": "\xff"}', b'{"no": 1}']
    lines = [json.dumps(row).encode() for row in prose(40)]
    lines[10:10] = mixed
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    for on_error, malformed, reason in ((OnError.drop, 3, "malformed"), (OnError.keep, 0, "protected")):
        out = tmp_path / reason
        rows = rows_of(filtered(source, out, on_error=on_error))
        audit = json.loads((out / "audit.json").read_text())
        assert audit["reasons"]["malformed"]["documents"] == malformed and audit["totals"]["in"]["documents"] == 43
        found = [(row["id"], row["reason"]) for row in rows if row["domain"] == "unreadable"]
        assert found == [(f"in.jsonl:{line}", reason) for line in (11, 12, 13)]
        assert [line for line in kept(out) if line in mixed] == ([] if malformed else mixed)
    with pytest.raises(ConfigError, match=r"input=in\.jsonl:11: cannot be read: Expecting .*; try on_error=drop"):
        filtered(source, tmp_path / "out", on_error=OnError.fail)


def test_empty_prompts_and_responses(tmp_path):
    rows = [{"q": row["text"], "a": row["text"][::2]} for row in prose(20)]
    rows[3]["a"], rows[4]["a"], rows[5]["q"], rows[6]["q"] = "", " \n", "", " \n"
    source = write_lines(tmp_path / "in.jsonl", rows)
    for template in ("{prompt}\n\n{response}", "Question: {prompt}\nAnswer: {response}\n"):
        keys = {"prompt_key": "q", "response_key": "a", "template": template}
        done = filtered(source, tmp_path / f"{len(template)}", **keys)
        reasons = [row["reason"] for row in rows_of(done)]
        assert reasons[3:7] == ["empty"] * 4 and "empty" not in reasons[:3] + reasons[7:]


def test_roles_alone_are_no_prompt(tmp_path):
    def chat(*said: str) -> dict[str, Any]:
        roles = ("system", "user", "assistant")[-len(said) :]
        return {"m": [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]}

    answers = [row["text"] for row in prose(4)]
    said = [(answers[0],), (" ", answers[1]), ("You add.", "", answers[2]), ("You add.", "2 + 2?", answers[3])]
    rows = [chat(*one) for one in said]
    done = filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", messages_key="m")
    assert [row["reason"] == "empty" for row in rows_of(done)] == [True, True, False, False]


def test_two_records_with_one_id_are_refused(tmp_path):
    rows = [{**row, "id": f"r{number}"} for number, row in enumerate(prose(20))]
    filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "fine", id_key="id")
    rows[17]["id"] = "r4"
    with pytest.raises(ConfigError) as caught:
        filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", id_key="id")
    assert str(caught.value) == (
        "id_key: two records are called 'r4': in.jsonl:5 and in.jsonl:18; "
        "make the ids unique, or omit id_key: then the id is file and line"
    )
    filtered(tmp_path / "in.jsonl", tmp_path / "by-place")


def test_clean_text_has_the_form_of_the_input_or_none(tmp_path):
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"q": "why?", "a": "so."}])
    (tmp_path / "clean.txt").write_text("plain text")
    config = InputConfig(input="any", prompt_key="q", response_key="a", id_key="missing")
    assert [one.answer for one in clean_records(str(pairs), config)] == ["so."]
    assert [one.text for one in clean_records(str(tmp_path / "clean.txt"), config)] == ["plain text"]
    for path, reason in (
        (tmp_path / "none.txt", "no such file"),
        (write_lines(tmp_path / "bad.jsonl", [{"q": "why?"}]), "cannot be read: no 'a'"),
        (write_lines(tmp_path / "empty.jsonl", []), "holds no record"),
    ):
        with pytest.raises(ConfigError, match=rf"^select\.clean=.*: {reason}"):
            clean_records(str(path), config)
