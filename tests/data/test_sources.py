"""Read files and data sets. Each way in which they can be wrong gives one message with the key and the fix."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from core.files import locate, remove_tree
from data import sources
from data.config import DataConfig, SourceConfig, SourceKind, Undecodable
from data.filter.config import InputConfig
from data.filter.input.readers import input_parts
from data.filter.input.records import Record
from data.sources import Document, Source, make_source
from tests.data.conftest import TEXTS, write_jsonl, write_parquet

FORMATS = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]


def source_of(
    path: Path | str, kind: SourceKind = SourceKind.files, data: dict[str, Any] | None = None, **keys: Any
) -> Source:
    source = SourceConfig(kind=kind, path=str(path), **keys)
    return make_source("mine", source, DataConfig(sources={"mine": source}, **{"held_out": 0.2, **(data or {})}))


def read(path: Path | str, *args: Any, **keys: Any) -> list[Document]:
    return list(source_of(path, *args, **keys).documents())


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents if not document.dropped]


def write(path: Path) -> Path:
    return (write_parquet if path.suffix == ".parquet" else write_jsonl)(path)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_documents(tmp_path, name):
    found = read(write(tmp_path / name))
    assert texts(found) == TEXTS
    assert 4 < sum(d.held_out for d in found) < 22
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number:02d}.md").write_text(text)
    assert read(tmp_path / "text") == found  # the same split, since it hashes the text


def test_a_folder_a_pattern_and_a_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(read(tmp_path)) == texts(read(tmp_path / "**" / "*.txt")) == ["a", "b"]
    assert texts(read(tmp_path / "a.txt")) == ["a"]


def test_copies_are_on_one_side(tmp_path):
    found = read(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3]))
    sides = {text: {d.held_out for d in found if d.text == text} for text in TEXTS}
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values()
    held_out = sum(sources.is_held_out(str(number), 0.05) for number in range(10_000))
    assert 420 < held_out < 580 and not any(sources.is_held_out(str(number), 0.0) for number in range(1000))


def test_held_out_path_is_never_trained_on(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:50]])
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS[50:]])
    found = read(tmp_path, held_out_path=str(held_out))
    assert [d.text for d in found if not d.held_out] == TEXTS[:50]
    assert [d.text for d in found if d.held_out] == TEXTS[50:]
    capped = read(tmp_path, held_out_path=str(held_out), max_bytes=100)
    assert [d.held_out for d in capped] == [False] * 2 + [True] * 10


def test_max_bytes_ends_the_reading(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    found = read(path, max_bytes=1000)
    size = sum(len(d.text) for d in found if not d.held_out)
    assert 1000 <= size < 1100 and found == [d for d in read(path) if d in found]
    path.write_bytes(path.read_bytes() + b"not json\n")
    assert read(path, max_bytes=1000) == found, "later lines are not read"


def test_empty_texts_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}])
    assert [d.dropped for d in read(path)] == [None, "empty", "empty"]


def test_undecodable_bytes(tmp_path):
    path, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines = b'\xef\xbb\xbf{"text": "good"}\r\n\n{"text": "b\xffd"}\n'
    path.write_bytes(lines)
    text.write_bytes(b"abc\xff")
    advice = r"try data.undecodable=drop or data.undecodable=replace"
    for file, place in ((path, lines.index(0xFF)), (text, 3)):
        message = rf"data.sources.mine.path={file}: byte {place} is not UTF-8; {advice}"
        with pytest.raises(ConfigError, match=message):
            read(file)
    dropped = read(path, data={"undecodable": Undecodable.drop})
    assert texts(dropped) == ["good"] and [d.dropped for d in dropped] == [None, "undecodable"]
    assert texts(read(path, data={"undecodable": Undecodable.replace})) == ["good", "b\ufffdd"]
    path.write_text('{"text": "x\\ud800y"}\n')  # half of a surrogate pair
    with pytest.raises(ConfigError, match=r"a.jsonl:1: byte 1 is not UTF-8"):
        read(path)
    assert len(texts(read(path, data={"undecodable": Undecodable.replace}))) == 1


BROKEN = {
    "colon": ("a.jsonl", b'{"text": "a"}\n{"text" "b"}\n', r"mine.path=.*a.jsonl:2: is not JSON \(Expecting ':'"),
    "list": ("a.jsonl", b'["a"]\n', r"a.jsonl:1: is not a JSON object"),
    "number": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1: is not JSON \(Exceeds the limit"),
    "depth": ("a.jsonl", b'{"n": ' + b"[" * 100_000 + b"\n", r"a.jsonl:1: is not JSON \("),
    "key": ("a.jsonl", b'{"body": "a", "id": 1}\n', r"text_key=text: .*a.jsonl:1 has no such column; try body or id"),
    "type": ("a.jsonl", b'{"text": 5}\n', r"text_key=text: .*a.jsonl:1 holds a int there, not text"),
    "no gzip": ("a.jsonl.gz", b"no gzip", r"mine.path=.*a.jsonl.gz: cannot be read: .*incorrect header check"),
    "truncated": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r"cannot be read: Truncated compressed"),
    "no zstd": ("a.jsonl.zst", b"no zstd", r"mine.path=.*a.jsonl.zst: cannot be read: ZSTD"),
    "parquet": ("a.parquet", b"PAR1 but no more", r"mine.path=.*a.parquet: cannot be read: .*[Pp]arquet"),
    "suffix": ("a.csv", b"a,b", r"mine.path=.*a.csv: unknown suffix; try .jsonl, .jsonl.gz, .jsonl.zst, .parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path, case):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path / name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.sources.mine.")


def test_categories_of_parquet_are_text(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array(TEXTS).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert texts(read(path)) == TEXTS


def test_broken_parquet_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"text_key=text: .*a.parquet has no such column; try body or id"):
        read(write_parquet(tmp_path / "a.parquet", "body"))
    with pytest.raises(ConfigError, match=r"text_key=text: .*a.parquet holds int64 there, not text"):
        read(write_parquet(tmp_path / "a.parquet", values=[1, 2]))


def test_parquet_checksums_are_verified(tmp_path):
    """Change a byte such that the file stays readable. Without a checksum the change is not found."""
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    for checksum in (True, False):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, write_page_checksum=checksum, **options)
        content = path.read_bytes()
        assert content.count(b"number 33") == 1
        path.write_bytes(content.replace(b"number 33", b"number 34"))
        if checksum:
            with pytest.raises(ConfigError, match=r"a.parquet: cannot be read"):
                read(path)
        else:
            assert any(text.startswith("Text number 34") and text != TEXTS[34] for text in texts(read(path)))


def test_every_type_of_text_in_parquet_is_read(tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
        column = pyarrow.array([text.encode() for text in TEXTS]).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert texts(read(tmp_path / "a.parquet")) == TEXTS


def test_fingerprints_follow_content_and_suffix(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    before, documents = source_of(tmp_path).fingerprint(), read(tmp_path)
    path.touch()
    assert source_of(tmp_path).fingerprint() == before
    path.rename(tmp_path / "a.txt")  # as text, the same bytes are a single document
    assert read(tmp_path) != documents and source_of(tmp_path).fingerprint() != before
    (tmp_path / "a.txt").unlink()
    write_jsonl(path, [{"text": text} for text in TEXTS[:-1]])
    assert source_of(tmp_path).fingerprint() != before


@pytest.mark.parametrize("read", ["fingerprint", "documents"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    (tmp_path / "a.txt").write_text("text")
    source = source_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"data.sources.mine.path=.*a.txt: cannot be read: .*No such file"):
        list(getattr(source, read)())


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_local_data_set_is_streamed(tmp_path, name):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / name)
    found = read(tmp_path / "set", SourceKind.huggingface)
    assert found == read(tmp_path / "set" / name)
    capped = read(tmp_path / "set", SourceKind.huggingface, max_bytes=500)
    assert 0 < len(capped) < len(found) and capped == [d for d in found if d in capped]


def test_wrong_data_sets_are_named(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", "body")
    for name, keys, message in (
        ("nowhere", {}, r"data.sources.mine.path=.*: cannot be read: "),
        ("set", {}, r"data.sources.mine.text_key=text: the data set has no such column; try body or id"),
        ("set", {"text_key": "id"}, r"data.sources.mine.text_key=id: the data set holds a int there, not text"),
        ("set", {"split": "validation"}, r"cannot be read: .*validation"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read(tmp_path / name, SourceKind.huggingface, **keys)
        assert "\n" not in str(caught.value)


def put(name: str, content: bytes) -> str:
    """Write a file to the in-memory file system of this process; return its URL."""
    place = locate(f"memory://{name}")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return str(place)


@pytest.fixture
def store() -> Iterator[str]:
    yield "memory://bucket"
    remove_tree(locate("memory://bucket"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_store_gives_the_same_documents_and_records(tmp_path, store, name):
    path = write(tmp_path / name)
    url = put(f"bucket/deep/{name}", path.read_bytes())
    places = (url, store, f"{store}/**/a.*")
    assert all(read(place) == read(path) for place in places)
    assert source_of(url).fingerprint() == source_of(path).fingerprint(), "the content decides, not its place"
    for place in places:
        (part,) = input_parts(InputConfig(input=place))
        assert [record.text for record in part.records() if isinstance(record, Record)] == TEXTS
        assert part.name.endswith(name) and len(part.fingerprint) == 64
    with pytest.raises(ConfigError, match=r"input=memory://none: no such file"):
        input_parts(InputConfig(input="memory://none"))


def test_a_folder_of_a_store_and_its_held_out_files(store):
    for number, text in enumerate(TEXTS[:9]):
        put(f"bucket/texts/{number}.md", text.encode())
    put("bucket/texts/kept/x.txt", b"kept back")
    put("bucket/texts/notes.pdf", b"%PDF")
    found = read(f"{store}/texts", held_out_path=f"{store}/texts/kept")
    assert texts(found) == [*TEXTS[:9], "kept back"] and [d.held_out for d in found] == [False] * 9 + [True]
    assert len(read(f"{store}/texts/[0-4].md")) == 5


@pytest.mark.parametrize(
    "path, message",
    [
        ("/nowhere/*", r"path=/nowhere/\*: no such file or folder"),
        ("/", r"held_out_path=/nowhere: no such file or folder"),
        ("empty", r"path=.*empty: the folder holds no jsonl, parquet or text file"),
        ("memory://nowhere/a.txt", r"path=memory://nowhere/a.txt: no such file or folder"),
        ("klingon://a", r"path=klingon://a: no filesystem is called 'klingon'"),
        ("memory://bucket/bad.parquet", r"path=memory://bucket/bad.parquet: cannot be read: .*[Pp]arquet"),
        ("memory://bucket/a.pdf", r"path=memory://bucket/a.pdf: unknown suffix"),
    ],
)
def test_wrong_places_are_named(tmp_path, store, path, message):
    for name in ("bad.parquet", "a.pdf"):
        put(f"bucket/{name}", b"nonsense")
    (tmp_path / "empty").mkdir()
    keys = {"held_out_path": "/nowhere"} if path == "/" else {}
    with pytest.raises(ConfigError, match=f"data.sources.mine.{message}"):
        read(str(tmp_path / path) if path == "empty" else path, **keys)
