"""Documents in jsonl, parquet and text files, compressed or not: each is read, dropped or refused."""

from __future__ import annotations

import gzip
import io
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import ConfigError
from data.config import DataConfig, SourceConfig, SourceKind, Undecodable
from data.filter.config import InputConfig
from data.filter.input.readers import MalformedRecord, RecordPart, json_keys, read_record
from data.filter.input.records import Record
from data.filter.screen.contamination import _ngrams
from data.sources import FileSource
from tests.fuzz.mutations import assert_reads_or_refuses, files, hostile, json_bytes, json_files, spoiled

CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
ROW = {
    "id": 7,
    "domain": "x",
    "text": "a b c d",
    "prompt": "a b",
    "response": "c d",
    "messages": CHAT,
    "n": [1.5, None],
}
LINES = b"".join(json_bytes({**ROW, "id": number}) + b"\n" for number in range(3))
KEYS = [
    InputConfig(input="x"),
    InputConfig(input="x", id_key="id", domain_key="domain"),
    InputConfig(input="x", prompt_key="prompt", response_key="response"),
    InputConfig(input="x", messages_key="messages"),
]


def parquet(table: pa.Table, **options: object) -> bytes:
    made = io.BytesIO()
    pq.write_table(table, made, **options)
    return made.getvalue()


TABLE = pa.table({"text": ["a b c d", None, "é" * 99], "id": [1, 2, 3], "b": [b"x", None, b"\xff"]})
MAPS = pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64()))
ODD = pa.table({"text": pa.array([1, 2], pa.timestamp("ns")), "d": [Decimal("1.5"), None], "m": MAPS})
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
    "a.txt": "Grüße, 世界\n".encode(),
    "a.parquet": parquet(TABLE),
    "b.parquet": parquet(TABLE, compression="zstd", data_page_version="2.0", write_page_checksum=True),
    "c.parquet": parquet(ODD, use_dictionary=False, compression="gzip"),
}


def documents(path: Path, undecodable: Undecodable) -> list[str]:
    config = SourceConfig(kind=SourceKind.files, path=str(path))
    data = DataConfig(sources={"a": config}, undecodable=undecodable)
    return [document.text for document in FileSource("a", config, data).documents()]


def records(path: Path, config: InputConfig) -> list[str]:
    found = list(RecordPart("a", config, path).records())
    return [one.text if isinstance(one, Record) else one.reason for one in found]


@pytest.mark.parametrize("name", FILES)
def test_any_file_of_documents_is_read_or_refused(place, name):
    path = place / name

    @given(files(FILES[name]), st.sampled_from(Undecodable), st.sampled_from(KEYS))
    def check(content, undecodable, config):
        path.write_bytes(content)
        for text in assert_reads_or_refuses(lambda: documents(path, undecodable), ConfigError) or []:
            text.encode()  # the tokenizer takes UTF-8
        for text in assert_reads_or_refuses(lambda: records(path, config), ConfigError) or []:
            assert isinstance(text, str)
        assert_reads_or_refuses(lambda: _ngrams("a", str(path), 3), ConfigError)

    check()


@given(json_files(ROW), st.sampled_from(KEYS))
def test_any_line_is_a_record_or_malformed(content, config):
    found = assert_reads_or_refuses(lambda: read_record(config, content, "a:1"))
    assert isinstance(found, Record | MalformedRecord)
    if isinstance(found, Record):
        (found.id + found.domain + found.text).encode()
    else:
        assert "\n" not in found.reason
    assert isinstance(json_keys(content), list)


@example({"text": "a", "\ud800": 1})
@example({"": "\ud800"})
@given(spoiled(ROW) | st.dictionaries(st.text(), hostile() | st.dates() | st.decimals() | st.uuids() | st.binary()))
def test_any_row_is_a_record_or_malformed(row):
    row = row if isinstance(row, dict) else {"text": row}
    found = assert_reads_or_refuses(lambda: read_record(InputConfig(input="x"), row, "a:1"), ConfigError)
    assert found is None or isinstance(found, Record | MalformedRecord)
