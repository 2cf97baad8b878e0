"""Data sets with pictures that the `datasets` library wrote: read undecoded, streamed, and without a fetch."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from core.config import build
from core.errors import ConfigError
from data.config import DataConfig
from data.corpus import HELD_OUT, TRAIN, Corpus, prepare
from data.images.generated.clips import ClipConfig, clip
from data.images.parts import ImagePart, VideoPart
from data.sources import Document, make_source
from tests.support.mixed import png

TILES = {"tile_size": 8, "patch_size": 2, "max_tiles": 4}
PICTURES = [png(number, 8 + number, 9) for number in range(6)]
IMAGE, VIDEO = datasets.Image(), datasets.Video()


@pytest.fixture(autouse=True)
def undecoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nothing decode or connect: a picture that is decoded, or fetched, fails the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    for feature in (datasets.Image, datasets.Video):
        monkeypatch.setattr(feature, "decode_example", lambda *_, **__: pytest.fail("decoded"))


def config(path: Path, source: dict[str, Any], **changes: Any) -> DataConfig:
    given = {"kind": "huggingface", "path": str(path), **source}
    images = {"tiles": TILES, **changes.pop("images", {})}
    settings = {"sources": {"set": given}, "images": images, "tokenizer": {"vocab_size": 300}, "held_out": 0.0}
    return build(DataConfig, {**settings, "cache": str(path.parent / "cache"), **changes})


def documents(path: Path, images: dict[str, Any] | None = None, **source: Any) -> list[Document]:
    data = config(path, source, images=images or {})
    return list(make_source("set", data.sources["set"], data).documents())


def shown(path: Path, **source: Any) -> list[list[Any]]:
    return [
        [part if isinstance(part, str) else part.data for part in one.parts or ()] for one in documents(path, **source)
    ]


def stored(number: int, name: str | None = None) -> dict[str, Any]:
    return {"bytes": PICTURES[number], "path": name}


CAPTIONS = datasets.Dataset.from_dict(
    {"text": ["one", "two <image> three", "four"], "photo": [stored(0, "0.png"), stored(1), None], "id": [1, 2, 3]},
    datasets.Features({"text": datasets.Value("string"), "photo": IMAGE, "id": datasets.Value("int64")}),
)
CAPTIONED = [[PICTURES[0], "one"], ["two ", PICTURES[1], " three"], ["four"]]
LISTS = datasets.Dataset.from_dict(
    {"texts": [["a", None, "b"], [None]], "images": [[None, stored(2), None], [stored(3)]]},
    datasets.Features({"texts": datasets.List(datasets.Value("string")), "images": datasets.List(IMAGE)}),
)
LISTED = [["a", PICTURES[2], "b"], [PICTURES[3]]]


def write(made: datasets.Dataset, folder: Path, form: str) -> Path:
    match form:
        case "saved":
            made.save_to_disk(str(folder))
        case "saved splits":
            datasets.DatasetDict({"train": made}).save_to_disk(str(folder))
        case "parquet":
            folder.mkdir()
            made.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("form", ["saved", "saved splits", "parquet"])
def test_pictures_stay_as_they_are_stored(form, tmp_path):
    assert shown(write(CAPTIONS, tmp_path / "captions", form)) == CAPTIONED
    path = write(LISTS, tmp_path / "lists", form)
    assert shown(path) == LISTED
    first, second = documents(path)
    assert first.parts is not None and first.parts[1] == ImagePart(PICTURES[2], "images.1")
    assert [one.name for one in (first, second)] == ["train:0", "train:1"]


def test_the_library_alone_would_decode(tmp_path):
    path = write(CAPTIONS, tmp_path / "set", "saved")
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        list(datasets.load_from_disk(str(path)))


def test_a_video_feature_holds_videos(tmp_path):
    moving = clip(1, ClipConfig())
    features = datasets.Features({"text": datasets.Value("string"), "clip": VIDEO})
    rows = {"text": [moving.answer], "clip": [{"bytes": moving.data, "path": None}]}
    path = write(datasets.Dataset.from_dict(rows, features), tmp_path / "set", "parquet")
    (document,) = documents(path)
    assert document.parts == (VideoPart(moving.data, "clip"), moving.answer)
    corpus = prepare(config(path, {}), lambda line: None)
    assert corpus.manifest["sources"]["set"][TRAIN]["counts"]["pictures"] == 16


def test_a_folder_of_pictures_with_their_texts(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = []
    for number in range(3):
        (folder / f"{number}.png").write_bytes(PICTURES[number])
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert shown(folder) == [[PICTURES[number], f"number {number}"] for number in range(3)]
    (tmp_path / "secret.png").write_bytes(PICTURES[4])
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to("../secret.png")
    with pytest.raises(ConfigError, match=r"0.png is a link that leaves the folder of the source"):
        documents(folder)


def test_streaming_begins_before_the_end_is_read(tmp_path):
    """A damaged second file is met only after most documents of the first."""
    folder = write(datasets.concatenate_datasets([CAPTIONS] * 11), tmp_path / "set", "parquet")
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1 nonsense PAR1")
    data = config(folder, {})
    found = make_source("set", data.sources["set"], data).documents()
    assert [next(found).text for _ in range(30)] == ["one", "two \n three", "four"] * 10
    with pytest.raises(ConfigError, match=r"data.sources.set.path=.*: cannot be read: ") as caught:
        list(found)
    assert "\n" not in str(caught.value)


PLACES = {
    "https://host/a.png": "is a URL: nothing is fetched",
    "hf://datasets/a/b/c.png": "is a URL: nothing is fetched",
    "/etc/passwd": "is not a path inside the folder of the source",
    "../secret.png": "is not a path inside the folder of the source",
    "missing.png": "does not exist in the folder of the source",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_nothing_is_fetched_or_read_outside(form, place, tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    features = datasets.Features({"text": datasets.Value("string"), "image": IMAGE})
    rows = {"text": ["a", "b"], "image": [stored(0), stored(1)]}
    path = write(datasets.Dataset.from_dict(rows, features), tmp_path / "set", form)
    (file,) = [one for one in path.iterdir() if one.suffix in (".arrow", ".parquet")]
    rows["image"][1] = {"bytes": None, "path": place}  # the library's writers look the path up
    hostile = pyarrow.table(rows, features.arrow_schema)
    if form == "parquet":
        pyarrow.parquet.write_table(hostile, file)
    else:
        with pyarrow.ipc.new_stream(str(file), hostile.schema) as stream:
            stream.write_table(hostile)
    with pytest.raises(ConfigError, match=r"data.sources.set.path=train:1: ") as caught:
        documents(path)
    assert PLACES[place] in str(caught.value) and "on_bad=drop" in str(caught.value)
    kept, dropped = documents(path, images={"on_bad": "drop"})
    assert kept.text == "a" and dropped.dropped == "bad_media"


def test_a_corpus_of_a_data_set(tmp_path):
    path = write(LISTS, tmp_path / "set", "saved")

    def made(**parts: Any) -> Corpus:
        return prepare(config(path, {"parts": parts} if parts else {}), lambda line: None)

    corpus = made()
    pictures = corpus.pictures("set", TRAIN)
    assert pictures is not None and [pictures.content(n) for n in range(2)] == PICTURES[2:4]
    corpus.verify()
    assert not corpus.manifest["sources"]["set"][HELD_OUT]["counts"]["tokens"]
    assert made(largest_bytes=10**6).directory != corpus.directory, "the columns and limits count"


def test_a_filter_compares_the_pictures_of_a_data_set(tmp_path):
    """Three short captions are equal; only the second picture is there twice."""
    rows = {"text": ["a cat", "a cat", "a cat", "a cat"], "photo": [stored(0), stored(1), stored(2), stored(1)]}
    features = datasets.Features({"text": datasets.Value("string"), "photo": IMAGE})
    path = write(datasets.Dataset.from_dict(rows, features), tmp_path / "in", "saved")
    rules = {"keep": 1.0, "unit": "documents", "scorer": {"kind": "length"}, "duplicates": {"pictures": 0}}
    corpus = prepare(config(path, {}, filter=rules), lambda line: None)
    counts = corpus.manifest["sources"]["set"][TRAIN]["counts"]
    assert counts["documents"] == 3 and counts["dropped_by_filter_duplicate_pictures"] == 1


def test_a_data_set_of_text_is_read_as_before(tmp_path):
    texts = [f"text {number}" for number in range(20)]
    path = write(datasets.Dataset.from_dict({"text": texts, "id": list(range(20))}), tmp_path / "set", "parquet")
    settings = {"held_out": 0.3}
    data = config(path, {}, **settings)
    alone = build(DataConfig, {"sources": {"set": {"kind": "huggingface", "path": str(path)}}, **settings})
    found = list(make_source("set", data.sources["set"], data).documents())
    assert found == list(make_source("set", alone.sources["set"], alone).documents())
    assert {one.held_out for one in found} == {True, False} and all(one.parts is None for one in found)


def test_wrong_columns_are_named(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "left": IMAGE, "right": IMAGE})
    rows = {"text": ["a"], "left": [stored(0)], "right": [stored(1)]}
    path = write(datasets.Dataset.from_dict(rows, features), tmp_path / "set", "parquet")
    message = r"data.sources.set.parts.image_key: .* has several columns of pictures; try left or right"
    with pytest.raises(ConfigError, match=message):
        documents(path)
    assert shown(path, parts={"image_key": "right"}) == [[PICTURES[1], "a"]]
    with pytest.raises(ConfigError, match=r"parts.text_key=caption: names the text of kind=documents; use text_key"):
        documents(path, parts={"text_key": "caption"})
