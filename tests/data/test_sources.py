"""Files and Hugging Face data sets, and every way in which they can be wrong: one message, with the key and the fix."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from core.files import locate, remove_tree
from data import sources
from data.config import DataConfig, SourceConfig, SourceKind, Undecodable
from data.filter.input.readers import InputConfig, input_parts
from data.filter.input.records import Record
from data.sources import Document, make_source

TEXTS = [f"Text number {number}, long enough to be told from others: {number * 7919}." for number in range(60)]


def read(
    path: Path | str, kind: SourceKind = SourceKind.files, data: dict[str, Any] | None = None, **keys: Any
) -> list[Document]:
    source = SourceConfig(kind=kind, path=str(path), **keys)
    config = DataConfig(sources={"mine": source}, **{"held_out": 0.2, **(data or {})})
    return list(make_source("mine", source, config).documents())


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents if not document.dropped]


def write_parquet(path: Path, column: str = "text", values: list[Any] | None = None) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({column: values or TEXTS, "id": list(range(len(values or TEXTS)))})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    return path


def write_jsonl(path: Path, records: list[Any] | None = None) -> Path:
    content = "".join(json.dumps(r) + "\n" for r in records or [{"text": text} for text in TEXTS]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_formats_give_the_same_documents(tmp_path: Path, name: str) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name)
    found = read(path)
    assert texts(found) == TEXTS
    assert 4 < sum(d.held_out for d in found) < 22
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number:02d}.md").write_text(text)
    assert read(tmp_path / "text") == found  # the same split, for it goes by the text


def test_a_folder_a_pattern_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(read(tmp_path)) == ["a", "b"]
    assert texts(read(tmp_path / "**" / "*.txt")) == ["a", "b"]
    assert texts(read(tmp_path / "a.txt")) == ["a"]


def test_copies_are_on_one_side(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3]))
    sides = {text: {d.held_out for d in found if d.text == text} for text in TEXTS}
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values()


def test_held_out_path_is_taken_whole_and_never_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:50]])
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS[50:]])
    found = read(tmp_path, held_out_path=str(held_out))
    assert [d.text for d in found if not d.held_out] == TEXTS[:50]
    assert [d.text for d in found if d.held_out] == TEXTS[50:]
    capped = read(tmp_path, held_out_path=str(held_out), max_bytes=100)
    assert [d.held_out for d in capped] == [False] * 2 + [True] * 10


def test_a_cap_ends_the_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    found = read(path, max_bytes=1000)
    size = sum(len(d.text) for d in found if not d.held_out)
    assert 1000 <= size < 1100 and found == [d for d in read(path) if d in found]
    path.write_bytes(path.read_bytes() + b"not json\n")
    assert read(path, max_bytes=1000) == found  # what comes after is not looked at


def test_texts_that_are_empty_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}])
    assert [d.dropped for d in read(path)] == [None, "empty", "empty"]


UNDECODABLE = b'{"text": "good"}\n{"text": "b\xffd"}\n'


def test_undecodable_bytes_fail_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(UNDECODABLE)
    advice = r"try data.undecodable=drop or data.undecodable=replace"
    with pytest.raises(ConfigError, match=rf"data.sources.mine.path={path}: byte 28 is not UTF-8; {advice}"):
        read(path)
    assert UNDECODABLE[28] == 0xFF
    text = tmp_path / "b.txt"
    text.write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=rf"{text}: byte 3 is not UTF-8"):
        read(text)


def test_undecodable_bytes_can_be_dropped_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(UNDECODABLE)
    dropped = read(path, data={"undecodable": Undecodable.drop})
    assert texts(dropped) == ["good"] and [d.dropped for d in dropped] == [None, "undecodable"]
    assert texts(read(path, data={"undecodable": Undecodable.replace})) == ["good", "b\ufffdd"]


def test_half_a_surrogate_pair_is_undecodable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x\\ud800y"}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl:1: byte 1 is not UTF-8"):
        read(path)
    assert len(texts(read(path, data={"undecodable": Undecodable.replace}))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text" "b"}\n',
            r"data.sources.mine.path=.*a.jsonl:2: is not JSON \(Expecting ':'",
        ),
        ("a.jsonl", b'["a"]\n', r"a.jsonl:1: is no JSON object"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1: is not JSON \(Exceeds the limit"),
        ("a.jsonl", b'{"n": ' + b"[" * 100_000 + b"\n", r"a.jsonl:1: is not JSON \("),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            r"data.sources.mine.text_key=text: .*a.jsonl:1 has no such column; try body or id",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"data.sources.mine.text_key=text: .*a.jsonl:1 holds a int there, not text"),
        ("a.jsonl.gz", b"no gzip", r"data.sources.mine.path=.*a.jsonl.gz: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
            r"a.jsonl.gz: cannot be read: Compressed file ended",
        ),
        ("a.parquet", b"PAR1 but no more", r"data.sources.mine.path=.*a.parquet: is no readable parquet file: "),
        ("a.csv", b"a,b", r"data.sources.mine.path=.*a.csv: unknown suffix; try .parquet, .jsonl, .jsonl.gz"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path / name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text_key=text: .*a.parquet has no such column; try body or id"):
        read(write_parquet(tmp_path / "a.parquet", "body"))
    with pytest.raises(ConfigError, match=r"text_key=text: .*a.parquet holds int64 there, not text"):
        read(write_parquet(tmp_path / "a.parquet", values=[1, 2]))
    path = write_parquet(tmp_path / "a.parquet", values=["abc" * 10_000])
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)
    path.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"a.parquet: (is no readable parquet file|cannot be read)"):
        read(path)


def test_parquet_that_is_wrong_but_readable_is_found_by_its_checksum(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    for checksum in (True, False):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, write_page_checksum=checksum, **options)
        content = path.read_bytes()
        assert content.count(b"number 33") == 1
        path.write_bytes(content.replace(b"number 33", b"number 34"))
        if checksum:
            with pytest.raises(ConfigError, match=r"a.parquet: (is no readable parquet file|cannot be read)"):
                read(path)
        else:
            assert any(text.startswith("Text number 34") and text != TEXTS[34] for text in texts(read(path)))


def test_every_type_of_text_in_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
        column = pyarrow.array([text.encode() for text in TEXTS]).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert texts(read(tmp_path / "a.parquet")) == TEXTS


def test_paths_without_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.sources.mine.path=/nowhere/\*: no such file or folder"):
        read("/nowhere/*")
    with pytest.raises(ConfigError, match=r"holds no parquet, jsonl or text file"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"data.sources.mine.held_out_path=/nowhere: no such file or folder"):
        read(tmp_path, held_out_path="/nowhere")


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    source = SourceConfig(path=str(path))
    config = DataConfig(sources={"mine": source})
    before = make_source("mine", source, config).fingerprint()
    path.touch()
    assert make_source("mine", source, config).fingerprint() == before
    write_jsonl(path, [{"text": text} for text in TEXTS[:-1]])
    assert make_source("mine", source, config).fingerprint() != before


def test_fingerprints_follow_the_suffix(tmp_path: Path) -> None:
    """The same bytes are one document as text and many as lines of JSON."""
    path = write_jsonl(tmp_path / "a.jsonl")
    source = SourceConfig(path=str(tmp_path))
    config = DataConfig(sources={"mine": source})
    before, documents = make_source("mine", source, config).fingerprint(), read(tmp_path)
    path.rename(tmp_path / "a.txt")
    assert read(tmp_path) != documents and make_source("mine", source, config).fingerprint() != before


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint is what reads it first."""
    path = write_jsonl(tmp_path / "a.jsonl")

    def forbidden(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "sha256_file", forbidden)
    source = SourceConfig(path=str(path))
    with pytest.raises(ConfigError, match=r"data.sources.mine.path=.*a.jsonl: cannot be read: .*Permission denied"):
        make_source("mine", source, DataConfig(sources={"mine": source})).fingerprint()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks the hub; `datasets` keeps its files in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_local_data_set_is_streamed(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / "set" / name)
    found = read(tmp_path / "set", SourceKind.huggingface)
    assert found == read(tmp_path / "set" / name)
    capped = read(tmp_path / "set", SourceKind.huggingface, max_bytes=500)
    assert 0 < len(capped) < len(found) and capped == [d for d in found if d in capped]


def test_wrong_data_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.sources.mine.path=.*: datasets cannot stream it: ") as caught:
        read(tmp_path / "nowhere", SourceKind.huggingface)
    assert "\n" not in str(caught.value)
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", "body")
    with pytest.raises(ConfigError, match=r"text_key=text: the data set has no such column; try body or id"):
        read(tmp_path / "set", SourceKind.huggingface)
    with pytest.raises(ConfigError, match=r"text_key=id: the data set has int there, not text"):
        read(tmp_path / "set", SourceKind.huggingface, text_key="id")
    with pytest.raises(ConfigError, match=r"datasets cannot stream it: .*validation"):
        read(tmp_path / "set", SourceKind.huggingface, split="validation")


def test_the_split_has_about_the_share_asked_for() -> None:
    held_out = sum(sources.is_held_out(str(number), 0.05) for number in range(10_000))
    assert 420 < held_out < 580
    assert not any(sources.is_held_out(str(number), 0.0) for number in range(1000))


def put(name: str, content: bytes) -> str:
    """A file in the store of this process; returns its URL."""
    place = locate(f"memory://{name}")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return str(place)


@pytest.fixture
def store() -> Iterator[str]:
    yield "memory://bucket"
    remove_tree(locate("memory://bucket"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_files_of_a_store_give_the_same_documents(tmp_path: Path, store: str, name: str) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name)
    url = put(f"bucket/deep/{name}", path.read_bytes())
    assert read(url) == read(store) == read(f"{store}/**/a.*") == read(path)
    config = {name: SourceConfig(path=name) for name in (url, str(path))}
    data = DataConfig(sources={"mine": config[url]})
    prints = {make_source("mine", one, data).fingerprint() for one in config.values()}
    assert len(prints) == 1, "the content decides, not where it lies"


def test_a_folder_of_a_store_and_its_held_out_files(store: str) -> None:
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
        ("memory://nowhere/a.txt", r"data.sources.mine.path=memory://nowhere/a.txt: no such file or folder"),
        ("klingon://a", r"data.sources.mine.path=klingon://a: no filesystem is called 'klingon'"),
        ("memory://bucket/bad.parquet", r"data.sources.mine.path=memory://bucket/bad.parquet: is no readable parquet"),
        ("memory://bucket/bad.jsonl.gz", r"data.sources.mine.path=memory://bucket/bad.jsonl.gz: cannot be read"),
        ("memory://bucket/a.pdf", r"data.sources.mine.path=memory://bucket/a.pdf: unknown suffix"),
    ],
)
def test_wrong_places_in_a_store_are_named(store: str, path: str, message: str) -> None:
    for name in ("bad.parquet", "bad.jsonl.gz", "a.pdf"):
        put(f"bucket/{name}", b"nonsense")
    with pytest.raises(ConfigError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_the_filter_reads_from_a_store(tmp_path: Path, store: str, name: str) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name)
    put(f"bucket/deep/{name}", path.read_bytes())
    for place in (f"{store}/deep/{name}", store, f"{store}/*/a.*"):
        (part,) = input_parts(InputConfig(input=place))
        records = list(part.records())
        assert [record.text for record in records if isinstance(record, Record)] == TEXTS
        assert part.name.endswith(name) and len(part.fingerprint) == 64
    with pytest.raises(ConfigError, match=r"input=memory://none: no such file"):
        input_parts(InputConfig(input="memory://none"))
