"""A corpus of documents with pictures: its batches know the tiles of any window, and bad pictures never reach training."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import data.packing
from core.config import build
from core.errors import ConfigError, DataError
from data import digests
from data.config import DataConfig
from data.corpus import HELD_OUT, TRAIN, Corpus, open_corpus, prepare
from data.images import media, readers
from data.images.batch import BatchImages
from data.images.canvas import TileConfig
from data.images.generated.clips import ClipConfig, clip
from data.images.tiles import tiles
from data.loader import IGNORED, Loader
from data.sources import make_source
from tests.support.mixed import png, write_documents

TILES = {"tile_size": 8, "patch_size": 2, "max_tiles": 4}
SEQ_LEN = 48
NAMES = ("start", "end", "image", "patch", "tile_x", "tile_y")


def made(path: Path, cache: Path, **changes: Any) -> Corpus:
    settings: dict[str, Any] = {
        "sources": {"mixed": {"kind": "documents", "path": str(path)}},
        "images": {"tiles": TILES},
        "tokenizer": {"vocab_size": 300},
        "held_out": 0.2,
        "cache": str(cache),
    }
    return prepare(build(DataConfig, {**settings, **changes}), lambda line: None)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return made(write_documents(tmp_path / "in"), tmp_path / "cache")


def placeholders(corpus: Corpus, split: str) -> list[tuple[int, int]]:
    """Return (picture, row of its tiles) for each placeholder of a stream, by reading the whole stream."""
    stream, pictures, ids = corpus.stream("mixed", split), corpus.pictures("mixed", split), corpus.images.ids
    found, picture, row = [], -1, 0
    for token in stream.window(0, len(stream)).tolist():
        if token == ids.start:
            picture, row = picture + 1, 0
        found.append((picture, row) if token == ids.patch else (-1, -1))
        row += token == ids.patch
    assert picture + 1 == len(pictures.starts) > 5
    return found


PACKINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "align": {"align": 16},
    "best_fit": {"packing": "best_fit", "pack_seq_len": SEQ_LEN},
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_a_window_cut_anywhere_knows_its_tiles(split, packing, tmp_path, monkeypatch):
    monkeypatch.setattr(data.packing, "BUFFER_TOKENS", 4 * SEQ_LEN)
    monkeypatch.setattr(data.packing, "BUFFER_SEQUENCES", 2)
    images = {"tiles": {**TILES, "max_tiles": 2}}
    corpus = made(write_documents(tmp_path / "in"), tmp_path / "cache", images=images, **PACKINGS[packing])
    truth, pictures = placeholders(corpus, split), corpus.pictures("mixed", split)
    per_tile = corpus.images.tiles.tokens_per_tile
    for start in range(0, len(truth) - 40, 7):
        rows, refs = pictures.rows_of(start, 40)
        for place, row in enumerate(rows.tolist()):
            picture, whole = truth[start + place]
            if row < 0:
                assert picture < 0
            else:
                ref = refs[row // per_tile]
                assert (ref.image, ref.tile, row % per_tile) == (picture, whole // per_tile, whole % per_tile)
        assert len(refs) == len({(p, w // per_tile) for p, w in truth[start : start + 40] if p >= 0})


def test_tiles_are_those_of_the_pictures(corpus, tmp_path):
    pictures, seen = corpus.pictures("mixed", TRAIN), 0
    for image in range(len(pictures.starts)):
        canvas, expected = tiles(Image.open(io.BytesIO(pictures.content(image))), TileConfig(**TILES))
        assert canvas == pictures.canvas(image)
        _, refs = pictures.rows_of(int(pictures.starts[image]), int(pictures.lengths[image]))
        assert [(ref.image, ref.tile) for ref in refs] == [(image, tile) for tile in range(canvas.tiles)]
        for ref in refs:
            assert np.array_equal(corpus.decode(ref), expected[ref.tile])
            seen += 1
    assert seen > len(pictures.starts)


def images_equal(one: BatchImages, other: BatchImages) -> bool:
    return torch.equal(one.rows_BT, other.rows_BT) and one.tiles == other.tiles


def test_batches_are_the_same_for_any_number_of_ranks(corpus):
    whole = Loader(corpus, SEQ_LEN, 4, seed=1).batch(2)
    parts = [Loader(open_corpus(corpus.directory), SEQ_LEN, 4, seed=1).batch(2, at, at + 1) for at in range(4)]
    joined = parts[0].concat(parts[1]).concat(parts[2].concat(parts[3]))
    assert images_equal(whole.images, joined.images) and sum(map(len, whole.images.tiles)) > 0
    assert not images_equal(whole.images, Loader(corpus, SEQ_LEN, 4, seed=2).batch(2).images)
    for batch in (whole, joined):
        batch.images.load(corpus.decode, 2, 8)
    assert all(torch.equal(*pair) for pair in zip(whole.images.pixels, joined.images.pixels, strict=True))
    numbers = [rows[rows >= 0].unique().tolist() for rows, _ in whole.images.micro_batches(4)]
    count = sum(map(len, whole.images.tiles))
    assert all(0 <= number < count * corpus.images.tiles.tokens_per_tile for number in numbers[0])


def test_pictures_are_not_labels_but_the_text_after_is(corpus):
    loader, ids = Loader(corpus, SEQ_LEN, 8, seed=1), corpus.images.ids
    batch, special = loader.batch(0), torch.tensor([getattr(ids, name) for name in NAMES])
    following = torch.full_like(batch.tokens_BT, -1)
    following[:, :-1] = batch.tokens_BT[:, 1:]
    assert (batch.labels_BT[torch.isin(following, special)] == IGNORED).all()
    after_picture = (batch.tokens_BT == ids.end) & (following > 7)  # an ordinary token
    assert after_picture.any() and (batch.labels_BT[after_picture] == following[after_picture]).all()


def test_best_fit_cuts_no_picture(tmp_path):
    path = write_documents(tmp_path / "in", 60)
    corpus = made(
        path, tmp_path / "cache", packing="best_fit", pack_seq_len=SEQ_LEN, images={"tiles": {**TILES, "max_tiles": 2}}
    )
    pictures = corpus.pictures("mixed", TRAIN)
    ends = pictures.starts + pictures.lengths - 1
    assert (pictures.starts // SEQ_LEN == ends // SEQ_LEN).all() and len(ends) > 20
    counts = corpus.manifest["sources"]["mixed"][TRAIN]["counts"]
    assert counts["cut"] > 0 and counts["pictures"] == len(ends)
    greedy = made(path, tmp_path / "cache").pictures("mixed", TRAIN)
    ends = greedy.starts + greedy.lengths - 1
    assert (greedy.starts // SEQ_LEN != ends // SEQ_LEN).any(), "control: greedy packing cuts some"


BAD = {
    "html": (b"<html>", "is not a whole PNG"),
    "truncated": (png(1, 30, 30)[:200], "cannot be decoded"),
    "missing": (None, "bad.png"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_fails_or_is_dropped(kind, tmp_path):
    content, reason = BAD[kind]
    path = write_documents(tmp_path / "in", 8, [{"text": "a"}, {"image": "bad.png"}])
    if content is not None:
        (tmp_path / "in" / "bad.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"documents.jsonl:1.*") as caught:
        made(path, tmp_path / "cache", held_out=0.0)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and "on_bad=drop" in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens/*/manifest.json"))
    corpus = made(path, tmp_path / "cache", held_out=0.0, images={"tiles": TILES, "on_bad": "drop"})
    assert corpus.manifest["sources"]["mixed"][TRAIN]["counts"]["dropped_bad_media"] == 1


def test_a_picture_that_fills_more_than_a_sequence_is_bad(tmp_path):
    path = write_documents(tmp_path / "in", 8)
    with pytest.raises(ConfigError, match=r"takes \d+ tokens, more than a sequence: raise data.pack_seq_len from 16"):
        made(path, tmp_path / "cache", packing="best_fit", pack_seq_len=16)


def test_placeholders_spelled_in_text_stay_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"parts": [{"text": f"{n} <|patch|><|image_start|>"}]}) for n in range(20)))
    corpus = made(path, tmp_path / "cache", held_out=0.0)
    stream = corpus.stream("mixed", TRAIN)
    assert not np.isin(stream.window(0, len(stream)), [getattr(corpus.images.ids, name) for name in NAMES]).any()
    assert "<|patch|>" in corpus.tokenizer.decode(stream.window(0, len(stream)).tolist())


def test_a_video_becomes_frames_with_their_times(tmp_path):
    moving = clip(1, ClipConfig())
    (tmp_path / "ball.mkv").write_bytes(moving.data)
    line = {"parts": [{"video": "ball.mkv"}, {"text": moving.answer}]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line))
    corpus = made(tmp_path / "clips.jsonl", tmp_path / "cache", held_out=0.0)
    stream, pictures = corpus.stream("mixed", TRAIN), corpus.pictures("mixed", TRAIN)
    text = corpus.tokenizer.decode(stream.window(0, len(stream)).tolist())
    assert len(pictures.starts) == 16 and text.startswith("0:00.0 0:00.5 0:01.0 ") and text.endswith(moving.answer)
    with pytest.raises(ConfigError, match=r"has more than 5 pictures and frames \(data.images.max_images\)"):
        made(tmp_path / "clips.jsonl", tmp_path / "c", images={"tiles": TILES, "max_images": 5})


def test_damage_and_another_decoder_are_named(corpus, monkeypatch):
    corpus.verify()
    entry = corpus.manifest["sources"]["mixed"][TRAIN]["pictures"]
    path = corpus.directory / entry["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{path} does not match its SHA-256"):
        open_corpus(corpus.directory).verify()
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    monkeypatch.setattr(media, "decoder_fingerprint", lambda: "another")
    with pytest.raises(DataError, match=r"pictures were tokenised with Pillow.*data.verify=false"):
        open_corpus(corpus.directory).verify()
    path.write_bytes(bytes(content[:-1]))
    with pytest.raises(DataError, match=rf"{path} is missing or does not have {entry['bytes']} bytes"):
        open_corpus(corpus.directory)


def test_each_damaged_picture_is_found_by_one_rank(corpus):
    entry, stored = corpus.manifest["sources"]["mixed"][TRAIN]["pictures"], corpus.pictures("mixed", TRAIN)
    whole, found = (corpus.directory / entry["file"]).read_bytes(), []
    for place in stored.offsets[:: len(stored.offsets) // 8].tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (corpus.directory / entry["file"]).write_bytes(damaged)
        pictures = open_corpus(corpus.directory).pictures("mixed", TRAIN)
        found.append([rank for rank in range(4) if list(pictures.verify(rank, 4))])
    assert all(len(ranks) == 1 for ranks in found) and len({rank for (rank,) in found}) == 4
    (corpus.directory / entry["file"]).write_bytes(whole)
    index = corpus.directory / entry["index"]
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(index), index, compression="gzip")
    with pytest.raises(DataError, match=rf"{index} does not match its SHA-256"):
        open_corpus(corpus.directory).verify()


def prints(path: Path, cache: Path, **parts: Any) -> str:
    source = {"kind": "documents", "path": str(path), "parts": parts}
    config = build(DataConfig, {"sources": {"mixed": source}, "images": {"tiles": TILES}, "cache": str(cache)})
    return make_source("mixed", config.sources["mixed"], config).fingerprint()


def test_only_changed_pictures_are_read_at_a_start(tmp_path, monkeypatch):
    path, cache, hashed = write_documents(tmp_path / "in", 8), tmp_path / "cache", []
    bad = {"parts": [{"image": "later.png"}, {"image": ""}, {"image": "\ud800"}, {"image": "../x"}]}
    path.write_text(f"{path.read_text()}\n{json.dumps(bad)}\n")
    honest = digests.sha256_file
    monkeypatch.setattr(digests, "_TICK_NS", 0)
    monkeypatch.setattr(digests, "sha256_file", lambda file: hashed.append(file.name) or honest(file))
    first = prints(path, cache)
    assert len(hashed) == 1 + len(list((tmp_path / "in").glob("*.png"))) > 10 and hashed.pop(0) == path.name
    hashed.clear()
    assert prints(path, cache) == first and hashed == []
    with monkeypatch.context() as patch:
        patch.setattr(readers, "json_lines", lambda file: pytest.fail("read the records"))
        assert prints(path, cache) == first
    name, stamp = "3-1.png", (tmp_path / "in" / "3-1.png").stat()
    content = bytearray((tmp_path / "in" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "in" / name).write_bytes(content)
    os.utime(tmp_path / "in" / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time
    second = prints(path, cache)
    assert second != first and hashed == [name]
    (tmp_path / "in" / "later.png").write_bytes(png(1, 8, 8))
    third = prints(path, cache)
    assert third not in (first, second) and hashed == [name, "later.png"]
    assert third == prints(path, tmp_path / "other"), "the record only saves time"
    assert prints(path, cache, largest_bytes=90) != third


def test_a_file_that_just_changed_is_read_again(tmp_path, monkeypatch):
    path, hashed, honest = write_documents(tmp_path / "in", 4), [], digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda file: hashed.append(file.name) or honest(file))
    first = prints(path, tmp_path / "cache")
    count = len(hashed)
    assert prints(path, tmp_path / "cache") == first and len(hashed) == 2 * count
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    record.write_bytes(b"PAR1 damaged PAR1")
    assert prints(path, tmp_path / "cache") == first


def test_pictures_need_settings_and_tokens_for_them(tmp_path):
    path = write_documents(tmp_path / "in", 4)
    with pytest.raises(ConfigError, match=r"images: sources.mixed has pictures"):
        made(path, tmp_path / "cache", images=None)
    trained = made(path, tmp_path / "cache")
    file = {"kind": "tokenizer_json", "path": str(trained.directory / "tokenizer.json")}
    assert made(path, tmp_path / "cache", tokenizer=file).images.ids == trained.images.ids
    names = {"patch": "<|placeholder|>"}
    with pytest.raises(ConfigError, match=r"data.images.tokens.patch=<\|placeholder\|>: is no special token"):
        made(path, tmp_path / "cache", tokenizer=file, images={"tiles": TILES, "tokens": names})


def test_a_misplaced_picture_stops_the_loader(corpus):
    pictures = corpus.pictures("mixed", TRAIN)
    Loader(corpus, SEQ_LEN, 8, seed=1).batch(0)
    pictures.starts = pictures.starts + 1
    with pytest.raises(DataError, match=r"the pictures of .* do not fit its tokens"):
        Loader(corpus, SEQ_LEN, 8, seed=1).batch(0)


def test_files_of_the_same_name_stay_apart(tmp_path):
    for folder in ("a", "b"):
        write_documents(tmp_path / "in" / folder, 6)
    corpus = made(tmp_path / "in", tmp_path / "cache", held_out=0.0)
    names = pyarrow.parquet.read_table(corpus.directory / "mixed-documents.parquet")["name"].to_pylist()
    assert len(set(names)) == len(names) and {name.split("/")[0] for name in names} == {"a", "b"}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_same_first_picture_is_on_one_side(share, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 8, 8))
    lines = [json.dumps({"parts": [{"image": "a.png"}, {"text": f"text {n}"}]}) for n in range(40)]
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    try:
        parts = made(tmp_path / "same.jsonl", tmp_path / "cache", held_out=share).manifest["sources"]["mixed"]
        assert [parts[split]["counts"].get("documents", 0) for split in (TRAIN, HELD_OUT)] == [40, 0]
    except ConfigError as error:
        assert "its 40 documents are held out" in str(error)


def test_held_out_documents_are_read_from_their_path(tmp_path):
    source = {"kind": "documents", "path": str(write_documents(tmp_path / "in"))}
    source["held_out_path"] = str(write_documents(tmp_path / "other", 8))
    corpus = made(tmp_path, tmp_path / "cache", sources={"mixed": {**source, "max_bytes": 200}})
    assert corpus.manifest["sources"]["mixed"][HELD_OUT]["counts"]["documents"] == 8


def test_a_document_shows_images_before_and_after_its_text():
    # a document ends, a text, a document begins; a text, a document
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]])
    rows = torch.tensor([[-1, 0, 1, -1, -1, -1, -1, 2], [-1, -1, -1, -1, -1, -1, 0, -1]])
    found = BatchImages(rows, [[], []], 1).documents_with_images(positions)
    assert found.int().tolist() == [[1, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
