"""Records are read from every kind of file. Malformed records are counted, kept or refused with their location."""

from __future__ import annotations

import gzip
import json
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from data.filter.config import InputConfig
from data.filter.input.readers import MalformedRecord, clean_records, input_parts, read_record
from data.filter.input.records import Record
from tests.support.filtering import filtered, prose, write_lines


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
    assert texts(read(tmp_path)) == ["a note", *wanted * 3], "a folder: files with known suffixes, by name"
    assert texts(read(tmp_path / "*.jsonl")) == wanted, "a pattern"


def test_columns_of_parquet_are_kept_or_refused_by_name(tmp_path):
    row: dict[str, Any] = {
        "text": "a text",
        "bytes": b"\x00\xff",
        "nan": float("nan"),
        "nested": [{"inf": float("-inf"), "bytes": [b"a"]}],
        "date": date(2024, 2, 29),
        "price": Decimal("1.10"),
        "none": None,
    }
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (one,), (broken,) = read(path), read(path, text_key="bytes")
    assert isinstance(one, Record) and isinstance(broken, MalformedRecord) and broken.raw == (one.raw or "").encode()

    assert json.loads(one.raw or "", parse_constant=pytest.fail) == row | {
        "bytes": {"base64": "AP8="},
        "nan": None,
        "nested": [{"inf": None, "bytes": [{"base64": "YQ=="}]}],
        "date": "2024-02-29",
        "price": "1.10",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"took": timedelta(1)}]), path)
    with pytest.raises(ConfigError, match=r"^input=table\.parquet:0: the column 'took' holds a timedelta, .*drop that"):
        read(path)


def test_half_of_a_surrogate_pair_stays_escaped():
    record = read_record(InputConfig(input=""), {"text": "é", "note": "\ud800"}, "in.parquet:0")
    assert isinstance(record, Record) and record.raw == r'{"text": "\u00e9", "note": "\ud800"}'


def test_a_folder_for_the_datasets_library(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "data.jsonl", ROWS)
    found = read(dataset=str(folder), id_key="n")
    assert texts(found) == [row["text"] for row in ROWS] and [one.id for one in found] == ["0", "1", "2"]
    before = input_parts(InputConfig(dataset=str(folder)))[0].fingerprint
    (folder / "data.jsonl").write_text('{"text": "other", "n": 5}\n')
    assert input_parts(InputConfig(dataset=str(folder)))[0].fingerprint != before
    with pytest.raises(ConfigError, match=r"^dataset=.*: cannot be read: "):
        read(dataset=str(tmp_path / "none"))


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
    write_lines(path, [{"q": q, "a": "So."} for q in ("", " \n")])
    for one in read(path, prompt_key="q", response_key="a", template="Q: {prompt}\nA: {response}\n"):
        assert (one.text, one.answer_start) == ("So.", 0), "the template alone is no prompt"


def chat(*said: str) -> list[dict[str, str]]:
    """Return chat messages. Each of `said` has the form "role: content"."""
    return [dict(zip(("role", "content"), one.split(": "), strict=True)) for one in said]


def test_the_response_of_a_chat_is_the_last_answer(tmp_path):
    whole = chat("user: hello", "assistant: hi", "user: go on", "assistant: the last", "user: and this is ignored")
    bare = [chat("assistant: bare"), chat("system:  ", "user: ", "assistant: bare")]
    bad = [chat("user: no answer"), ["text"], [{"role": "user"}], "no list", None]
    path = write_lines(tmp_path / "chats.jsonl", [{"m": messages} for messages in [whole, *bare, *bad]])
    first, *others = read(path, messages_key="m")
    assert first.answer == "the last" and first.prompt.endswith("user:\ngo on\n\nassistant:\n")
    assert all((one.text, one.answer_start) == ("bare", 0) for one in others[:2]), "roles alone are no prompt"
    assert texts(others[2:]) == [
        "! no message of the assistant",
        "! a message is not an object with role and content",
        "! no 'content'; it has 'role'",
        "! 'm' is str, not list",
        "! 'm' is null, not list",
    ]


def test_names_and_domains_are_text_or_whole_numbers(tmp_path):
    pairs: list[Any] = [(7, "a"), ("x", 3), (1.5, "a"), (True, "a"), ("y", None)]
    rows = [{"text": "t", "id": name, "d": domain} for name, domain in pairs]
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
    packed, path = gzip.compress(lines), tmp_path / "in.jsonl.gz"
    for content in (packed[:-200], packed[:200] + b"\0" * 50 + packed[250:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"input=.*/in\.jsonl\.gz: cannot be read: "):
            read(path)
    path.write_bytes(packed)
    assert len(read(path)) == 300, "control"


def test_wrong_inputs_are_refused(tmp_path):
    (tmp_path / "in.csv").write_text("a,b")
    for keys, reason in (
        ({"input": str(tmp_path / "in.csv")}, "input=.*: unknown suffix; try .jsonl, .jsonl.gz"),
        ({"input": str(tmp_path / "none")}, "input=.*: no such file"),
        ({"input": "a", "dataset": "b"}, "name a file or folder"),
        ({"input": "a", "prompt_key": "q"}, "go together"),
        ({"input": "a", "prompt_key": "q", "response_key": "a", "messages_key": "m"}, "set it, or prompt_key"),
        ({"input": "a", "template": "{response}{prompt}"}, "needs {prompt} and, after it, {response}"),
    ):
        with pytest.raises(ConfigError, match=reason):
            input_parts(InputConfig(**keys))


def test_two_records_with_one_id_are_refused(tmp_path):
    rows = [{**row, "id": f"r{number}"} for number, row in enumerate(prose(20))]
    filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "fine", id_key="id")
    rows[17]["id"] = "r4"
    message = r"^id_key: two records are called 'r4': in\.jsonl:5 and in\.jsonl:18; make the ids unique, or omit id_key"
    with pytest.raises(ConfigError, match=message):
        filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", id_key="id")


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
