"""Documents of text, pictures and videos, damaged and hostile, through the whole preparation: a corpus or one line."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.config import build
from core.errors import ConfigError, DataError
from data import digests
from data.config import DataConfig
from data.corpus import MANIFEST, TRAIN, Corpus, open_corpus, prepare
from tests.data.images.encoded import animation, encoded, huge_png, png_of_greys, sample, text_bomb, tiff, turned
from tests.data.images.video.test_bad_videos import sound, without_frames
from tests.data.images.video.videos import pictures, written
from tests.fuzz.mutations import FEWER, assert_reads_or_refuses, damaged, files, json_bytes, json_files, spoiled
from tests.fuzz.test_corpora import parquet
from tests.support.mixed import write_documents

PICTURES = {
    **{kind: encoded(sample(12, 20), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")},
    **{f"turned {kind}": turned(sample(12, 20), 6, kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF")},
    **{f"animated {kind}": animation(kind) for kind in ("GIF", "WEBP", "PNG")},
    "cmyk": encoded(sample(12, 20).convert("CMYK"), "JPEG"),
    "16-bit grey": png_of_greys(np.arange(240).reshape(12, 20) * 257),
    "palette": encoded(sample(12, 20).convert("P"), "PNG", transparency=3),
    "grey and alpha": encoded(sample(12, 20).convert("LA"), "PNG"),
    "floats": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "empty": b"",
    "pixel bomb": huge_png(),
    "tall bomb": huge_png(1, 65_536),
    "text bomb": text_bomb(),
    "tiff bomb": tiff(30_000, 30_000, 8, zlib.compress(bytes(1000))),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94.",
}
VIDEOS = {
    "ffv1": written(pictures(3, 16, 12), [0, 400, 800]),
    "mp4": written(pictures(3, 16, 12), [0, 1, 2], "mpeg4", "mp4", "yuv420p"),
    "gif": animation("GIF"),
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "no frames": without_frames(),
    "sound": sound(),
    "times out of order": written(pictures(12, 16, 16), range(12), "libx264", "avi", "yuv420p", Fraction(1, 10), g="8"),
}
SECRET = encoded(sample(9, 9), "PNG")
PATHS = [
    *("../secret.png", "/etc/passwd", "link.png", "pipe.png", "folder.png", "circle.png", "missing.png", "", "a\0b"),
    *("https://example.com/a.png", "file:///etc/passwd", "data:image/png;base64,AA", "pictures/../0.png", "x" * 300),
]
TILES = {"tile_size": 8, "patch_size": 2, "max_tiles": 4}
PIXELS = {"largest_pixels": 200_000, "frames": {"largest_pixels": 200_000, "most_decoded_pixels": 10_000_000}}
TEXTS = st.sampled_from(
    ["", *("a b",) * 8, "<image>", "a <image> b", "<|patch|><|image_start|>", "\ud800", "\0", "é" * 50]
)
MEMBERS = st.sampled_from(
    [
        *("0.png", "0.jpg", "0.mp4", "0.txt", "0.json", "1.png", "1.txt", "a/1.png", "./1.jpg", "2.webp") * 4,
        *("0.pkl", "0.pth"),
        *(
            "/abs.png",
            "../up.png",
            "a/../b.png",
            ".png",
            "0",
            "0.",
            "0.a.png",
            "0.cls",
            "x" * 120 + ".png",
            "\udcff.png",
        ),
    ]
)


def media() -> st.SearchStrategy[bytes]:
    """Pictures and videos: whole, hostile, and damaged."""
    known = st.sampled_from([*PICTURES.values(), *VIDEOS.values()])
    whole = st.sampled_from([PICTURES["PNG"], PICTURES["JPEG"], VIDEOS["ffv1"]])
    return st.one_of(whole, known, known.flatmap(damaged))


@st.composite
def lines(draw: st.DrawFn) -> dict[str, bytes]:
    """A file of jsonl and the pictures that it names."""
    named = {f"{number}.png": draw(media()) for number in range(draw(st.integers(1, 2)))}
    paths = st.sampled_from([*named, *named]) | st.sampled_from([*named, *PATHS])
    part = st.one_of(
        TEXTS.map(lambda text: {"text": text}),
        paths.map(lambda path: {"image": path}),
        paths.map(lambda path: {"video": path}),
    )
    record = st.one_of(
        st.lists(part, max_size=4).map(lambda parts: {"parts": parts}),
        st.builds(lambda text, images: {"text": text, "images": images}, TEXTS, st.lists(paths, max_size=3)),
        st.builds(lambda text, image: {"text": text, "image": image}, TEXTS, paths),
        st.builds(
            lambda texts, images: {"texts": texts, "images": images},
            st.lists(st.none() | TEXTS, max_size=3),
            st.lists(st.none() | paths, max_size=3),
        ),
    )
    records = [draw(record) for _ in range(draw(st.integers(1, 3)))]
    content = b"\n".join(map(json_bytes, records))
    match draw(st.sampled_from(("whole", "whole", "spoiled", "damaged"))):
        case "spoiled":
            changed = draw(spoiled(records))
            content = b"\n".join(map(json_bytes, changed if isinstance(changed, list) else [changed]))
        case "damaged":
            content = draw(damaged(content))
    return {"a.jsonl": content, **named}


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@st.composite
def tables(draw: st.DrawFn) -> dict[str, bytes]:
    """A parquet file of pictures as structs of bytes and path, or as bytes."""
    picture = st.builds(
        lambda data, path: {"bytes": data, "path": path}, st.none() | media(), st.none() | st.sampled_from(PATHS)
    )
    text, listed = TEXTS.map(lambda text: text.replace("\ud800", "\\")), st.lists(st.none() | picture, max_size=3)
    count = draw(st.integers(1, 3))

    def column(values: st.SearchStrategy[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([draw(st.none() | values) for _ in range(count)], kind)

    match draw(st.sampled_from(("one", "bytes", "marked", "interleaved", "parts"))):
        case "one":
            columns = {"text": column(text, pa.string()), "photo": column(picture, STRUCT)}
        case "bytes":
            columns = {"text": column(text, pa.large_string()), "photo": column(media(), pa.large_binary())}
        case "marked":
            columns = {"text": column(text, pa.string()), "images": column(listed, pa.list_(STRUCT))}
        case "interleaved":
            texts = st.lists(st.none() | text, max_size=3)
            columns = {"texts": column(texts, pa.list_(pa.string())), "images": column(listed, pa.list_(STRUCT))}
        case _:
            fields = {"text": st.none() | text, "image": st.none() | picture, "video": st.none() | picture}
            kind = pa.struct({"text": pa.string(), "image": STRUCT, "video": STRUCT})
            columns = {"parts": column(st.lists(st.fixed_dictionaries(fields), max_size=3), pa.list_(kind))}
    content = parquet(pa.table(columns))
    return {"a.parquet": draw(st.just(content) | st.just(content) | damaged(content))}


@st.composite
def tars(draw: st.DrawFn) -> dict[str, bytes]:
    """A tar with members of all names and kinds."""
    file = io.BytesIO()
    form = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as made:
        for _ in range(draw(st.integers(1, 5))):
            member = tarfile.TarInfo(draw(MEMBERS))
            content = draw(
                media() | TEXTS.map(lambda text: text.encode(errors="surrogatepass")) | json_files({"text": "a"})
            )
            kinds = (tarfile.REGTYPE,) * 20 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            member.type, member.linkname = draw(st.sampled_from(kinds)), "/etc/passwd"
            member.size = len(content) if member.isreg() else 0
            try:
                made.addfile(member, io.BytesIO(content))
            except ValueError:  # a name that the format cannot hold
                continue
    content = file.getvalue()
    return {"a.tar": draw(st.just(content) | st.just(content) | damaged(content))}


def settings(place: Path, **images: Any) -> dict[str, Any]:
    source = {"kind": "documents", "path": str(place / "in"), "parts": {"largest_bytes": 2**20}}
    return {"sources": {"a": source}, "images": {"tiles": TILES, **PIXELS, **images}, "cache": str(place / "cache")}


@pytest.fixture(scope="module")
def corpus(place: Path) -> Corpus:
    """A corpus of whole documents, whose tokenizer the others take."""
    path = write_documents(place / "whole", 12)
    source = {"kind": "documents", "path": str(path)}
    keys = {**settings(place), "sources": {"a": source}, "tokenizer": {"vocab_size": 300}, "held_out": 0.2}
    return prepare(build(DataConfig, {**keys, "cache": str(place / "kept")}), lambda line: None)


def lay_out(place: Path, content: dict[str, bytes]) -> None:
    """Make the folder of a source with these files, and with links and pipes that lead out of it."""
    for name in ("in", "cache"):
        shutil.rmtree(place / name, ignore_errors=True)
    folder = place / "in"
    (folder / "folder.png").mkdir(parents=True)
    (place / "secret.png").write_bytes(SECRET)
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")
    for name, data in content.items():
        (folder / name).write_bytes(data)


def checked(found: Corpus) -> None:
    """Read all of a corpus: its hashes hold, and its placeholders and tiles fit each other."""
    found.verify()
    stream, stored = found.stream("a", TRAIN), found.pictures("a", TRAIN)
    tokens = stream.window(0, len(stream))
    rows, refs = (np.full(len(tokens), -1), []) if stored is None else stored.rows_of(0, len(tokens))
    assert np.array_equal(rows >= 0, tokens == found.images.ids.patch)
    assert all(found.decode(ref).shape == (3, 8, 8) for ref in refs)
    assert stored is None or all(stored.content(image) != SECRET for image in range(len(stored.starts)))


MAKERS = {"a.jsonl": lines, "a.parquet": tables, "a.tar": tars}


@pytest.mark.parametrize("name", MAKERS)
def test_any_documents_are_prepared_or_refused(place, corpus, name, monkeypatch):
    monkeypatch.setattr(digests, "_TICK_NS", 0)  # trust the digests of files that were just written
    keys = {"tokenizer": {"kind": "tokenizer_json", "path": str(corpus.directory / "tokenizer.json")}}
    policies, packings = (
        st.sampled_from(("fail", "drop")),
        st.sampled_from(({}, {"packing": "best_fit", "pack_seq_len": 40})),
    )

    @FEWER
    @given(MAKERS[name](), policies, packings, st.sampled_from((48, 2)))
    def check(content, policy, packing, most):
        lay_out(place, content)
        config = build(
            DataConfig, {**settings(place, on_bad=policy, max_images=most), **keys, **packing, "held_out": 0.0}
        )
        errors: list[str] = []

        def prepared() -> Corpus:
            try:
                return prepare(config, lambda line: None)
            except (ConfigError, DataError) as error:
                errors.append(str(error))
                raise

        found = assert_reads_or_refuses(prepared, ConfigError, DataError)
        left = [path.name for path in (place / "cache").glob("tokens/*")]
        if found is None:
            assert left == [], "something is left half-written"
            assert name in errors[0] or "has no text to train on" in errors[0], f"names no record: {errors[0]}"
        else:
            assert left == [found.directory.name]
            checked(open_corpus(found.directory))
            assert prepare(config, lambda line: None).directory == found.directory, "the digests were recorded wrongly"

    check()


def test_any_stored_pictures_are_opened_or_refused(place, corpus):
    folder, honest = place / "stored", json.loads((corpus.directory / MANIFEST).read_text())
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus.directory, folder)
    entry = honest["sources"]["a"][TRAIN]["pictures"]
    index = pq.read_table(folder / entry["index"])
    described = {"images": honest["images"], "pictures": entry}

    def used() -> None:
        found = open_corpus(folder)
        stored, stream = found.pictures("a", TRAIN), found.stream("a", TRAIN)
        if stored is not None:
            _, refs = stored.rows_of(0, len(stream))
            assert all(found.decode(ref).shape[0] == 3 for ref in refs)
        found.verify()

    @FEWER
    @given(
        st.none() | spoiled(described),
        st.none() | indexes(index),
        st.none() | files((folder / entry["file"]).read_bytes()),
    )
    def check(manifest, table, content):
        damaged_manifest = copy.deepcopy(honest)
        if isinstance(manifest, dict):
            damaged_manifest["images"] = manifest.get("images")
            damaged_manifest["sources"]["a"][TRAIN]["pictures"] = manifest.get("pictures")
        (folder / MANIFEST).write_bytes(json_bytes(damaged_manifest))
        for name, changed in ((entry["index"], table), (entry["file"], content)):
            (folder / name).write_bytes((corpus.directory / name).read_bytes() if changed is None else changed)
        assert_reads_or_refuses(used, DataError)

    check()


@st.composite
def indexes(draw: st.DrawFn, index: pa.Table) -> bytes:
    """An index of pictures with other values, other columns or other bytes."""
    columns = index.to_pydict()
    for _ in range(draw(st.integers(0, 2))):
        column = draw(st.sampled_from(sorted(columns)))
        if isinstance(columns[column][0], int):
            row = draw(st.integers(0, len(index) - 1))
            columns[column][row] = draw(st.sampled_from((0, 1, 2, 5, -1, 2**31, 2**62, -(2**63))))
        else:
            columns[column] = draw(st.sampled_from((list(range(len(index))), [None] * len(index))))
    content = parquet(pa.table(columns))
    return draw(damaged(content)) if draw(st.booleans()) else content
