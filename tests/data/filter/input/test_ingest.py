"""A file is hashed, counted and read in pieces by any number of ranks, into the same shards as by one from its start."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError, DataError
from data import files
from data.files import json_lines
from data.filter import runs
from data.filter.config import InputConfig
from data.filter.input import ingest, readers
from data.filter.input.ingest import Ingest, scan
from data.filter.input.readers import RecordPart, input_parts
from data.filter.store import OneWorker, StageStore, Workers
from tests.data.filter.threads import on_threads

TEXTS = [
    b"",
    b"\n",
    b"a",
    b"ab\ncd\n",
    b"ab\r\n\r\n cd\r\n",
    b"\xef\xbb\xbfab\n\n\n  \ncd",
    b"\xef\xbb\xbf\nx\n",
    b"\n\na\n",
]


@pytest.mark.parametrize("content", TEXTS, ids=range(len(TEXTS)))
def test_lines_of_ranges_are_the_lines_of_the_file(tmp_path, content):
    """For any two cuts, each line is read once, with its number and offset, whatever it ends with."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    whole = list(json_lines(path))
    for first in range(len(content) + 1):
        for second in range(first, len(content) + 1):
            cuts = [0, first, second, len(content)]
            numbers = [1 + content[:cut].count(b"\n") for cut in cuts]
            ranges = zip(cuts[:-1], cuts[1:], numbers[:-1], strict=True)
            assert [line for start, stop, number in ranges for line in json_lines(path, start, stop, number)] == whole


def lines(count: int) -> bytes:
    """Return lines of uneven lengths, some blank, malformed or with CRLF, and no line end after the last."""
    rows = [json.dumps({"text": f"note {number} " + "x" * (number * 37 % 90)}).encode() for number in range(count)]
    rows[3], rows[11], rows[12], rows[20] = b"", b"{", b"  ", rows[20] + b"\r"
    return b"\n".join(rows)


def ingested(
    source: Path,
    out: Path,
    workers: Workers | None = None,
    fails: bool = False,
    report: Callable[[str], Any] = str,
    **keys: Any,
) -> dict[str, bytes]:
    workers = workers or OneWorker()
    stage = StageStore(out, "key", {})
    Ingest(stage, scan(input_parts(InputConfig(input=str(source), **keys)), workers), workers, 7, fails).run(report)
    assert sum(stage.shards.values()) and not (out / "sorted").exists()
    return {name: stage.path(name).read_bytes() for name in stage.shards}


def write_input(folder: Path, kind: str) -> Path:
    path = folder / f"in.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(lines(60))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines(60)))
        case _:
            rows = [{"text": None if number == 5 else f"note {number}"} for number in range(60)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=17)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_ranks_make_the_shards_of_one_process(tmp_path, monkeypatch, kind):
    path = write_input(tmp_path, kind)
    whole = ingested(path, tmp_path / "whole")
    for size, count in ((40, 1), (40, 4), (300, 2)):
        monkeypatch.setattr(readers, "_RANGE_BYTES", size)
        pieces = scan(input_parts(InputConfig(input=str(path))), OneWorker())[0].pieces
        assert bool(pieces) == (kind != "jsonl.gz")
        assert on_threads(count, partial(ingested, path, tmp_path / f"{size}-{count}")) == [whole] * count
    if kind == "jsonl":
        monkeypatch.setattr(readers, "_RANGE_BYTES", 40)
        assert 0 in [piece.records for piece in scan(input_parts(InputConfig(input=str(path))), OneWorker())[0].pieces]


def test_a_range_that_loses_a_line_is_noticed(tmp_path, monkeypatch):
    """Control: a reader that begins one line too late makes other shards, or finds too few records."""
    path = write_input(tmp_path, "jsonl")
    whole = ingested(path, tmp_path / "whole")
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    late = partial(
        lambda real, path, start, number: list(real(path, start, number))[start > 0 :], readers.read_rows_from
    )
    monkeypatch.setattr(readers, "read_rows_from", late)
    with pytest.raises((AssertionError, DataError)):
        assert ingested(path, tmp_path / "late") == whole


def test_each_range_is_hashed_by_one_rank(tmp_path, monkeypatch):
    path = write_input(tmp_path, "jsonl")
    monkeypatch.setattr(readers, "_RANGE_BYTES", 500)
    parts, real, hashed = input_parts(InputConfig(input=str(path))), RecordPart.scan, []

    def counted(part: RecordPart, start: int, stop: int) -> tuple[str, int, int]:
        hashed.append(start)
        return real(part, start, stop)

    alone = scan(parts, OneWorker())
    monkeypatch.setattr(RecordPart, "scan", counted)
    assert on_threads(3, partial(scan, parts)) == [alone] * 3
    assert sorted(hashed) == list(range(0, path.stat().st_size, 500)) and len(hashed) > 6
    before = alone[0].fingerprint
    assert parts[0].fingerprint == before
    content = path.read_bytes()
    path.write_bytes(content.replace(b"note 50", b"note 05"))
    assert scan(parts, OneWorker())[0].fingerprint != before
    path.with_name("other.jsonl").write_bytes(content)
    other = input_parts(InputConfig(input=str(path.with_name("other.jsonl"))))
    assert scan(other, OneWorker())[0].fingerprint != before, "ids are file and line"


@pytest.mark.parametrize("size", [100, 1000])
def test_a_kill_while_reading_changes_nothing(tmp_path, monkeypatch, size):
    """A shard that is missing in the middle is made again, also if others begin in its piece. A manifest is written
    only when all are there.
    """
    path = write_input(tmp_path, "jsonl")
    monkeypatch.setattr(readers, "_RANGE_BYTES", size)
    whole = ingested(path, tmp_path / "whole")
    real = StageStore.write
    for deadly in range(len(whole)):
        out, written = tmp_path / f"{deadly}", []

        def dying(stage: StageStore, name: str, table: Any, deadly: int = deadly, written: list[str] = written) -> None:
            if len(written) == deadly:
                raise KeyboardInterrupt
            written.append(name)
            real(stage, name, table)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StageStore, "write", dying)
            ingested(path, out)
        assert not (out / "manifest.json").exists()
        assert ingested(path, out) == whole


@pytest.mark.parametrize("left", [50, 59])
def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path, monkeypatch, left):
    path = write_input(tmp_path, "jsonl")
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    real = ingest.scan

    def cut(*args: Any) -> Any:
        found = real(*args)
        path.write_bytes(lines(left))
        return found

    monkeypatch.setitem(globals(), "scan", cut)
    with pytest.raises(DataError, match=r"in\.jsonl changed while it was read: run again"):
        ingested(path, tmp_path / "out")


def test_a_line_that_is_too_long_is_named_in_any_range(tmp_path, monkeypatch):
    path = write_input(tmp_path, "jsonl")
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    number = next(place for place, line in enumerate(lines(60).split(b"\n"), start=1) if len(line) > 99)
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=rf"in\.jsonl: cannot be read: line {number} has more than"):
            on_threads(workers, partial(ingested, path, tmp_path / f"{workers}"))


def test_a_lost_shard_of_a_file_without_pieces_is_made_again(tmp_path):
    path, out = write_input(tmp_path, "jsonl.gz"), tmp_path / "out"
    whole = ingested(path, out)
    (out / "manifest.json").unlink()
    (out / f"{list(whole)[3]}.parquet").unlink()
    assert ingested(path, out) == whole


def test_a_damaged_table_and_a_missing_id_are_named(tmp_path, monkeypatch):
    path = write_input(tmp_path, "parquet")
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    with pytest.raises(ConfigError, match=r"no 'name'; it has 'text'; try id_key=$"):
        ingested(path, tmp_path / "out", id_key="name")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"in\.parquet: cannot be read: "):
        ingested(path, tmp_path / "out")


def test_ids_that_come_twice_are_named_by_any_rank(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    names = [f"n{number}" for number in range(60)]
    names[42], names[50], names[55] = "n7", "n10", "n7"  # both 7 and 42 begin a shard
    path.write_text("".join(json.dumps({"text": "t", "id": name}) + "\n" for name in names))
    monkeypatch.setattr(readers, "_RANGE_BYTES", 100)
    monkeypatch.setattr(runs, "RANGE_ENTRIES", 10)
    for count in (1, 2, 4):
        out = tmp_path / f"{count}"
        with pytest.raises(ConfigError, match=r"two records are called 'n7': in\.jsonl:8 and in\.jsonl:43; make"):
            on_threads(count, partial(ingested, path, out, id_key="id"))
        assert count > 1 or not out.exists(), "another id_key is not a changed input"


def labelled(folder: Path, labels: list[Any], **keys: Any) -> tuple[list[Any], list[Any], list[str]]:
    """Return the texts and the labels that the stage has, and what was reported."""
    path, reports = folder / "in.jsonl", []
    path.write_text("".join(json.dumps({"text": f"t{n}", "level": one}) + "\n" for n, one in enumerate(labels)))
    ingested(path, folder / "out", report=reports.append, label_key="level", **keys)
    rows = [
        row
        for file in sorted((folder / "out").glob("*.parquet"))
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    assert not any(row["problem"] for row in rows)
    return [row["text"] for row in rows], [row.get("label") for row in rows], reports


def test_what_is_no_number_is_no_label_and_drops_no_text(tmp_path):
    labels = [1, 2.5, math.nan, None, "Level 3", 10**400, math.inf, True, [4], -0.0, *range(5)]
    texts, found, reports = labelled(tmp_path, labels, fails=True)
    assert texts == [f"t{number}" for number in range(15)]
    assert found == [1.0, 2.5, *[None] * 7, -0.0, *map(float, range(5))]
    assert reports[0] == (
        "warning: label_key=level: 5 values ignored, since not a number, such as "
        "'Level 3' in in.jsonl:5; write 3 instead of 'Level 3'"
    )
    assert len(reports) == 2


def test_a_single_value_that_is_no_number_is_reported(tmp_path):
    _, found, (warning, _) = labelled(tmp_path, [1, 2, "x"])
    assert found == [1.0, 2.0, None]
    assert warning == (
        "warning: label_key=level: 1 value ignored, since not a number, such as 'x' in in.jsonl:3; write finite numbers"
    )


def test_gaps_in_a_column_of_labels_are_not_reported(tmp_path):
    assert labelled(tmp_path, [math.nan, None, 3])[1:] == ([None, None, 3.0], ["read 3 records of 1 part"])


def test_decimals_are_labels(tmp_path):
    rows = [{"text": "t", "level": Decimal("1.5")}, {"text": "t", "level": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    (record, other) = input_parts(InputConfig(input=str(tmp_path), label_key="level"))[0].records()
    assert (record.label, record.bad_label, other.label, other.bad_label) == (1.5, None, None, None)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("Level 3", "such as 'Level 3' in in.jsonl:1; write 3 instead of 'Level 3'$"),
        ("3 of 5", "such as '3 of 5' in in.jsonl:1; write finite numbers$"),
        (True, "such as True in in.jsonl:1; write 0 and 1$"),
        (10**400, r"such as 10+\.\.\.0+ in in.jsonl:1; write finite numbers$"),
        (math.nan, "the keys of the first record are 'text', 'level'; try null$"),
    ],
)
def test_columns_without_numbers_are_rejected(tmp_path, level, message):
    with pytest.raises(ConfigError, match=f"^label_key=level: no record has a number under it; {message}"):
        labelled(tmp_path, [level] * 3)
