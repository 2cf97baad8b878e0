"""Read documents of parts from files that other libraries wrote. Each hostile record is one line with its id."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from core.files import locate, remove_tree
from data.files import UnreadableFile, find_files
from data.images import readers
from data.images.contents import read_inside
from data.images.parts import BadRecord, ImagePart, PartsConfig, PartsDocument, VideoPart
from data.images.readers import SUFFIXES, read_documents

STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def read(path: Path, **keys: Any) -> list[PartsDocument | BadRecord]:
    return list(read_documents(path, PartsConfig(**keys)))


def shown(path: Path, **keys: Any) -> list[Any]:
    """Return the parts of each document, a picture as its bytes, or the line of a bad record."""
    return [
        str(one) if isinstance(one, BadRecord) else [p if isinstance(p, str) else p.data for p in one.parts]
        for one in read(path, **keys)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source: three pictures, a video, and beside its folder a secret."""
    source = tmp_path / "source"
    (source / "pictures").mkdir(parents=True)
    for number in range(3):
        (source / "pictures" / f"{number}.png").write_bytes(b"png %d" % number)
    (source / "clip.mp4").write_bytes(b"mp4")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return source


def jsonl(folder: Path, *records: Any, name: str = "a.jsonl") -> Path:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    content = b"\n".join(lines) + b"\n"
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = pyarrow.compress(content, "zstd", asbytes=True)
    (folder / name).write_bytes(content)
    return folder / name


def parquet(folder: Path, columns: dict[str, Any], types: dict[str, Any] | None = None) -> Path:
    arrays = {name: pyarrow.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), folder / "a.parquet")
    return folder / "a.parquet"


PARTS = {"parts": [{"text": "See "}, {"image": "pictures/0.png"}, {"text": " move:"}, {"video": "clip.mp4"}]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_list_of_parts(folder, name):
    (document,) = read(jsonl(folder, PARTS, name=name))
    expected = ("See ", ImagePart(b"png 0", "pictures/0.png"), " move:", VideoPart(b"mp4", "clip.mp4"))
    assert document == PartsDocument(f"{name}:1", expected)


def test_markers_say_where_pictures_go(folder):
    record = {"text": "<image>A <image> and <image>.", "images": [f"pictures/{n}.png" for n in range(3)]}
    assert shown(jsonl(folder, record)) == [[b"png 0", "A ", b"png 1", " and ", b"png 2", "."]]


def test_pictures_without_markers_come_first(folder):
    record = {"text": "Both.", "images": ["pictures/1.png", "pictures/0.png"]}
    assert shown(jsonl(folder, record)) == [[b"png 1", b"png 0", "Both."]]


def test_a_marker_of_the_users_own_and_other_columns(folder):
    record = {"caption": "A [pic] <image>", "pics": ["pictures/0.png"]}
    path = jsonl(folder, record)
    assert shown(path, text_key="caption", images_key="pics", marker="[pic]") == [["A ", b"png 0", " <image>"]]


def test_a_marker_stays_text_without_a_list_of_pictures(folder):
    path = jsonl(folder, {"text": "x", "images": []}, {"text": "a <image>", "images": None}, {"text": "b <image>"})
    assert shown(path) == [["x"], ["a <image>"], ["b <image>"]]


def test_one_picture_with_its_caption(folder):
    path = jsonl(folder, {"image": "pictures/2.png", "text": "two"}, {"image": None, "text": "none"})
    assert shown(path) == [[b"png 2", "two"], ["none"]]


def test_an_empty_record_has_no_parts(folder):
    assert read(jsonl(folder, {"parts": []})) == [PartsDocument("a.jsonl:1", ())]


def test_ids_and_paths_start_at_the_source(folder):
    (folder / "deep").mkdir()
    path = jsonl(folder / "deep", PARTS)
    assert shown(path) == ["a.jsonl:1: pictures/0.png does not exist in the folder of the source"]
    (document,) = read_documents(path, PartsConfig(), folder)
    assert isinstance(document, PartsDocument) and document.id == "deep/a.jsonl:1"


def hostile(folder: Path) -> dict[str, tuple[str, str]]:
    """Return for each kind of path the path and the reason why it is refused."""
    outside = "is a link that leaves the folder of the source"
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "away").symlink_to(folder.parent)
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "dangling.png").symlink_to("nothing.png")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "large.png").write_bytes(bytes(101))
    os.mkfifo(folder / "pipe.png")
    inside, url, missing = (
        "not a path inside the folder",
        "is a URL: nothing is fetched",
        "does not exist in the folder",
    )
    return {
        "absolute": (str(folder.parent / "secret.png"), inside),
        "absolute inside": (str(folder / "pictures/0.png"), inside),
        "home": ("~/a.png", missing),
        "parent": ("../secret.png", inside),
        "parent within": ("pictures/../pictures/0.png", inside),
        "link": ("out.png", outside),
        "folder link": ("away/secret.png", outside),
        "device link": ("null.png", outside),
        "circle": ("circle.png", "cannot be read"),
        "dangling": ("dangling.png", missing),
        "missing": ("pictures/9.png", missing),
        "below a file": ("clip.mp4/a.png", "cannot be read: Not a directory"),
        "folder": ("folder.png", "is not a regular file"),
        "pipe": ("pipe.png", "is not a regular file"),
        "empty": ("empty.png", "is empty"),
        "large": ("large.png", "has 101 bytes, more than largest_bytes=100"),
        "http": ("http://host/a.png", url),
        "https": ("HTTPS://host/a.png", url),
        "s3": ("s3://bucket/a.png", url),
        "file": ("file:///etc/passwd", url),
        "data": ("data:image/png;base64,AAAA", url),
        "pipe command": ("pipe:cat secret", missing),
        "no name": ("", "'' is not the name of a file"),
        "zero": ("a\0.png", "is not the name of a file"),
        "long": ("a" * 300, "cannot be read: File name too long"),
        "surrogate": ("\ud800.png", "half of a surrogate pair"),
    }


def test_paths_that_leave_the_source_are_refused(folder):
    cases = hostile(folder)
    path = jsonl(folder, *({"text": "<image>", "images": [name]} for name, _ in cases.values()))
    found = shown(path, largest_bytes=100)
    for line, (kind, (_, reason)) in enumerate(cases.items(), start=1):
        message = found[line - 1]
        assert isinstance(message, str) and message.startswith(f"a.jsonl:{line}: ") and reason in message, kind
        assert "\n" not in message
    assert len(found) == len(cases)


def test_a_link_inside_the_source_is_followed(folder):
    (folder / "pictures/link.png").symlink_to("1.png")
    (folder / "again").symlink_to("pictures")
    path = jsonl(folder, {"text": "", "images": ["pictures/link.png", "again/2.png"]})
    assert shown(path) == [[b"png 1", b"png 2"]]


def test_the_check_of_links_is_needed(folder, monkeypatch):
    (folder / "out.png").symlink_to("../secret.png")
    monkeypatch.setattr(Path, "is_relative_to", lambda *_: True)
    assert read_inside(folder, "out.png", 100) == b"secret"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[1]", "is not a JSON object"),
        (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
        (b'{"parts": [{"text": "\\ud800"}]}', "parts.0 holds half of a surrogate pair"),
        ({"parts": "x"}, "parts is not a list"),
        ({"parts": ["x"]}, "parts.0 is not an object with one of text, image and video"),
        ({"parts": [{"text": "x", "image": "a"}]}, "parts.0 is not an object with one of"),
        ({"parts": [{"audio": "x"}]}, "parts.0 is not an object with one of"),
        ({"parts": [{"text": 1}]}, "parts.0 is a int, not text"),
        ({"parts": [{"image": 1}]}, "parts.0 is neither bytes nor a path, but of type int"),
        ({"parts": [{"image": {}}]}, "parts.0 has neither bytes nor a path"),
        ({"parts": [{"image": {"bytes": "AAAA"}}]}, "parts.0 is neither bytes nor a path, but of type str"),
        ({"text": "<image>", "images": []}, "has 0 pictures but 1 times the marker <image>"),
        ({"text": "<image>", "images": ["a", "b"]}, "has 2 pictures but 1 times the marker <image>"),
        ({"text": "x", "images": [None]}, "images.0 has neither bytes nor a path"),
        ({"text": "x", "images": ["a"] * 49}, "has 49 pictures and videos, more than data.images.max_images=48"),
        ({"parts": [{"image": "a"}] * 40 + [{"video": "b"}] * 9}, "has 49 pictures and videos"),
        ({"texts": ["a", None], "images": [None]}, "texts has 2 places and images 1"),
        ({"texts": ["a"], "images": ["b"]}, "place 0 has a text and a picture"),
        ({"texts": [{"user": "a"}], "images": []}, "texts.0 is not a turn with user and assistant"),
        ({"id": 1}, "has only the columns id"),
        ({}, r"has only the columns (none)"),
    ],
)
def test_a_bad_line_does_not_stop_the_others(folder, record, reason):
    first, bad, last = shown(jsonl(folder, PARTS, record, PARTS))
    assert bad.startswith("a.jsonl:2: ") and reason in bad
    assert first == last and len(first) == 4


def test_as_many_pictures_as_allowed(folder):
    record = {"text": "x", "images": ["pictures/0.png"] * 48}
    assert len(shown(jsonl(folder, record))[0]) == 49


def test_jsonl_without_columns_of_pictures(folder):
    path = jsonl(folder, {"text": "x", "img": "pictures/0.png"}, PARTS)
    message = "image_key: a.jsonl has the columns text, img; name that of pictures here"
    with pytest.raises(ConfigError, match=message):
        read(path)
    assert shown(path, image_key="img")[0] == [b"png 0", "x"]
    with pytest.raises(
        ConfigError, match=r"text_key=text: a\.jsonl has the columns image, caption; name that of text here"
    ):
        read(jsonl(folder, {"image": "pictures/0.png", "caption": "x"}))


# --- parquet


def saved(folder: Path, columns: dict[str, list[Any]], features: dict[str, Any]) -> Path:
    """Write a parquet file by the `datasets` library."""
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


TEXT, IMAGE = datasets.Value("string"), datasets.Image(decode=False)


def stored(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def test_interleaved_lists_of_the_datasets_library(folder):
    columns = {
        "texts": [["Title", None, "Words", None], [None], []],
        "images": [[None, stored(b"one"), None, stored(b"two", "b.png")], [stored(b"three")], []],
        "metadata": ["x", "y", "z"],
    }
    path = saved(folder, columns, {"texts": [TEXT], "images": [IMAGE], "metadata": TEXT})
    first, second, third = read(path)
    parts = ("Title", ImagePart(b"one", "images.1"), "Words", ImagePart(b"two", "b.png"))
    assert first == PartsDocument("a.parquet:0", parts)
    assert second == PartsDocument("a.parquet:1", (ImagePart(b"three", "images.0"),))
    assert third == PartsDocument("a.parquet:2", ())


def test_a_picture_of_the_datasets_library(folder):
    columns = {
        "picture": [stored(b"one", "x/1.png"), None, stored(b"three")],
        "caption": ["1", "2", None],
    }
    path = saved(folder, columns, {"picture": IMAGE, "caption": TEXT})
    assert shown(path, text_key="caption") == [[b"one", "1"], ["2"], [b"three"]]
    with pytest.raises(
        ConfigError, match=r"text_key=text: a\.parquet has the columns picture, caption; name that of text here"
    ):
        read(path)


def test_conversations_with_a_list_of_pictures(folder):
    turns = [{"user": "<image>What?", "assistant": "A cat."}, {"user": "And <image>?", "assistant": "A dog."}]
    columns = {
        "images": [[stored(b"cat"), stored(b"dog")], [stored(b"cow")]],
        "texts": [turns, [{"user": "Which?", "assistant": "Moo."}]],
    }
    path = saved(folder, columns, {"images": [IMAGE], "texts": [{"user": TEXT, "assistant": TEXT}]})
    assert shown(path) == [
        [b"cat", "What?\nA cat.\n\nAnd ", b"dog", "?\nA dog."],
        [b"cow", "Which?\nMoo."],
    ]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), STRUCT])
def test_a_column_of_bytes_is_found_by_its_type(folder, kind):
    value = stored(b"one") if kind == STRUCT else b"one"
    path = parquet(folder, {"n": [1], "text": ["t"], "whatever": [value]}, {"whatever": kind})
    assert shown(path) == [[b"one", "t"]]


def test_several_columns_of_pictures_need_a_name(folder):
    path = parquet(folder, {"text": ["t"], "left": [b"l"], "right": [b"r"]})
    with pytest.raises(ConfigError, match=r"image_key: a\.parquet has several columns of pictures; try left or right"):
        read(path)
    assert shown(path, image_key="right") == [[b"r", "t"]]


def test_parts_in_parquet(folder):
    kind = pyarrow.list_(pyarrow.struct({"text": pyarrow.string(), "image": STRUCT, "video": pyarrow.string()}))
    rows = [[{"text": "a"}, {"image": stored(b"one")}, {"video": "clip.mp4"}], [{"text": "a", "video": "b"}]]
    good, bad = shown(parquet(folder, {"parts": rows}, {"parts": kind}))
    assert good == ["a", b"one", b"mp4"]
    assert bad == "a.parquet:1: parts.0 is not an object with one of text, image and video"


def test_paths_in_parquet_follow_the_same_rule(folder):
    cases = hostile(folder)
    del cases["surrogate"]  # arrow does not store it
    values = [stored(None, name) for name, _ in cases.values()]
    path = parquet(folder, {"image": values, "text": ["x"] * len(values)}, {"image": STRUCT})
    found = shown(path, largest_bytes=100)
    for row, (kind, (_, reason)) in enumerate(cases.items()):
        assert str(found[row]).startswith(f"a.parquet:{row}: ") and reason in found[row], kind


def test_a_path_beside_bytes_is_only_a_name(folder):
    path = parquet(folder, {"image": [stored(b"one", "/etc/passwd")], "text": ["x"]}, {"image": STRUCT})
    assert read(path) == [PartsDocument("a.parquet:0", (ImagePart(b"one", "/etc/passwd"), "x"))]


def test_urls_in_interleaved_lists_are_not_fetched(folder):
    path = parquet(folder, {"texts": [["a", None]], "images": [[None, "https://host/b.jpg"]]})
    assert "https://host/b.jpg is a URL: nothing is fetched" in shown(path)[0]


def test_a_row_with_text_that_is_not_utf8(folder):
    texts = pyarrow.array([b"a", b"b\xff", b"c"]).view(pyarrow.string())
    path = parquet(folder, {"image": [b"1", b"2", b"3"], "text": texts})
    assert shown(path) == [[b"1", "a"], "a.parquet:1: byte 1 of a text is not UTF-8", [b"3", "c"]]
    path = parquet(folder, {"image": [b"1"], "text": [b"b\xff"]})
    assert shown(path, image_key="image") == ["a.parquet:0: text is not UTF-8 text (byte 1)"]


def test_large_pictures_in_parquet_are_refused(folder):
    path = parquet(folder, {"image": [bytes(101), bytes(100), b""], "text": ["x"] * 3})
    large, good, empty = shown(path, largest_bytes=100)
    assert large == "a.parquet:0: image has 101 bytes, more than largest_bytes=100"
    assert good == [bytes(100), "x"] and empty == "a.parquet:2: image is empty"


def test_parquet_without_columns_of_pictures(folder):
    with pytest.raises(ConfigError, match=r"image_key: a\.parquet has the columns text, n; name that of pictures here"):
        read(parquet(folder, {"text": ["x"], "n": [1]}))


def test_row_groups_are_read_in_pieces(folder, monkeypatch):
    """One row group of 96 MiB is read in pieces: much less than the file is held at once."""
    size, rows = 2**20, 96
    schema = pyarrow.schema({"image": pyarrow.binary(), "text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(
        folder / "a.parquet", schema, compression="none", use_dictionary=False, write_batch_size=1
    ) as writer:
        writer.write_table(pyarrow.table({"image": [os.urandom(size)] * rows, "text": ["x"] * rows}, schema))
    assert pyarrow.parquet.ParquetFile(folder / "a.parquet").num_row_groups == 1
    assert most_memory(folder) < 24 * size
    monkeypatch.setattr(readers, "_BUFFER_BYTES", 0)
    assert most_memory(folder) > 90 * size  # the control: a whole column of the row group at once


def most_memory(folder: Path) -> int:
    """Return the most bytes that arrow held while the file was read."""
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_documents(folder / "a.parquet", PartsConfig()):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    return most


# --- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.tar"])
def test_missing_and_damaged_files_are_one_line(folder, name):
    path = folder / name
    with pytest.raises(UnreadableFile):
        read(path)
    path.mkdir()
    with pytest.raises(UnreadableFile, match="is not a regular file"):
        read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UnreadableFile, match="is not a regular file"):
        read(path)
    path.unlink()
    if name != "a.jsonl":  # there, each line is refused alone
        path.write_bytes(b"<!DOCTYPE html>" * 100)
        with pytest.raises(UnreadableFile) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_truncated_file_gives_the_records_before(folder):
    path = jsonl(folder, *[PARTS] * 500, name="a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UnreadableFile):
        read(path)
    path = parquet(folder, {"image": [b"1"] * 100, "text": ["x"] * 100})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UnreadableFile):
        read(path)


def test_other_suffixes_are_refused(folder):
    with pytest.raises(UnreadableFile, match=r"has none of the suffixes \.jsonl"):
        read(folder / "pictures/0.png")


def test_files_are_found_by_their_suffixes(folder):
    jsonl(folder, PARTS)
    (folder / "b.tar").touch()
    assert [name for name, _ in find_files(str(folder), SUFFIXES)] == ["a.jsonl", "b.tar"]
    assert [name for name, _ in find_files(str(folder))] == ["a.jsonl"]
    with pytest.raises(ConfigError, match="the folder holds no jsonl, parquet or tar file"):
        find_files(str(folder / "pictures"), SUFFIXES)
    with pytest.raises(ConfigError, match="unknown suffix"):
        find_files(str(folder / "clip.mp4"), SUFFIXES)


def test_a_source_in_a_store(tmp_path):
    place = locate("memory://parts")
    place.mkdir(parents=True, exist_ok=True)
    try:
        (place / "0.png").write_bytes(b"png 0")
        records = [{"text": "x", "images": [name]} for name in ("0.png", "1.png", "../0.png", "memory://parts/0.png")]
        (place / "a.jsonl").write_bytes(b"\n".join(json.dumps(one).encode() for one in records))
        (path,) = (path for _, path in find_files("memory://parts", SUFFIXES))
        good, missing, parent, url = shown(path)
        assert good == [b"png 0", "x"] and "1.png does not exist" in missing
        assert "not a path inside" in parent and "is a URL" in url
        local = parquet(tmp_path, {"image": [b"1"], "text": ["x"]})
        (place / "a.parquet").write_bytes(local.read_bytes())
        assert shown(place / "a.parquet") == [[b"1", "x"]]
    finally:
        remove_tree(place)
