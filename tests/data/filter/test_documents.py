"""Filter documents with pictures: what is dropped and named, what is written, and what a kill or more workers change."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from core.errors import ConfigError, DataError
from core.files import write_json
from data.filter import pipeline, store
from data.filter.audit.outputs import AUDIT_JSON, KEPT_DOCUMENTS, SCORES, audit_of, write_kept_documents, write_scores
from data.filter.config import DuplicateConfig, FilterRules, InputConfig, KeepUnit, OnError
from data.filter.explain import explain
from data.filter.input.documents import document_parts
from data.filter.pipeline import Filter, FilterJob
from data.filter.store import OneWorker, Workers
from data.images.config import BadMedia, ImagesConfig, TileConfig
from data.images.generated.clips import ClipConfig, clip
from data.images.parts import PartsConfig, PartsDocument
from data.images.readers import read_documents
from tests.data.filter.threads import on_threads
from tests.support.filtering import FixedScorer
from tests.support.mixed import png, write_documents

TILES = TileConfig(8, 2, 4)


def job(source: Path, out: Path, workers: Workers | None = None, images: Any = None, **rules: Any) -> FilterJob:
    images = images or ImagesConfig(tiles=TILES)
    return FilterJob(
        parts=document_parts(InputConfig(input=str(source), images=images)),
        rules=FilterRules(**{"unit": KeepUnit.documents, "keep": 1.0, **rules}),
        scorer=FixedScorer(lambda record: len(record.text)),
        directory=out / "stages",
        workers=workers or OneWorker(),
        report=lambda line: None,
    )


def write_outputs(done: Filter, out: Path) -> None:
    write_scores(done, out / SCORES)
    write_kept_documents(done, out / KEPT_DOCUMENTS)
    write_json(out / AUDIT_JSON, audit_of(done, "in"))


def filtered(source: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    done = Filter(job(source, out, **settings))
    done.run()
    write_outputs(done, out)
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(out / SCORES).to_pylist()
    return rows


def outputs(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in (SCORES, KEPT_DOCUMENTS, AUDIT_JSON)}


def documents_in(path: Path) -> list[PartsDocument]:
    found = list(read_documents(path, PartsConfig()))
    assert all(isinstance(one, PartsDocument) for one in found)
    return found


def as_jpeg(data: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((96, 80)).save(file, "JPEG", quality=95)
    return file.getvalue()


def smooth(number: int) -> bytes:
    """Return a picture that survives another size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png(number, 6, 5))).resize((64, 64), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write jsonl with paths, a tar and parquet with structs and interleaved lists. Some pictures repeat others."""
    folder = tmp_path_factory.mktemp("in")
    write_documents(folder, 12)
    with open(folder / "documents.jsonl", "a") as file:
        for text, picture in (("another text", "1-0.png"), ("text alone is a document as well", None), ("", "2-0.png")):
            parts = [{"text": text}, *([{"image": picture}] if picture else [])]
            file.write("\n" + json.dumps({"parts": parts}))
    members = {"a.png": smooth(1), "a.txt": b"a red box", "b.jpg": as_jpeg(smooth(1)), "b.txt": b"nearly the same"}
    write_tar(folder / "photos.tar", members)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    picture = {"bytes": smooth(2), "path": "made/two.png"}
    lists = {"texts": [["one", None, "two"]], "images": [[None, picture, None]]}
    schema = pyarrow.schema([("texts", pyarrow.list_(pyarrow.string())), ("images", pyarrow.list_(struct))])
    pyarrow.parquet.write_table(pyarrow.table(lists, schema), folder / "web.parquet")
    return folder


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD_RECORDS", 4)
        rows = filtered(source, out)
    return out, rows


def test_repeated_pictures_are_dropped_by_name(alone):
    out, rows = alone
    dropped = {row["id"]: (row["reason"], row["detail"]) for row in rows if not row["kept"]}
    assert dropped == {
        "documents.jsonl:13": ("duplicate_pictures", "documents.jsonl:2"),
        "documents.jsonl:15": ("empty", None),
        "photos.tar:b": ("near_duplicate_pictures", "photos.tar:a"),
    }
    audit = json.loads((out / AUDIT_JSON).read_text())
    count = sum(len(row["pictures"]) for row in rows)
    assert audit["pictures"] == {"records": 14, "in": count, "kept": count - 3}
    assert explain(out, "photos.tar:b").startswith(
        "photos.tar:b (photos.tar:b, domain all): dropped, near_duplicate_pictures of photos.tar:a"
    )


def test_kept_documents_keep_their_parts(source, alone):
    """The kept file is read as documents, and gives those that were kept, with the same parts."""
    out, rows = alone
    originals = {}
    for name in ("documents.jsonl", "photos.tar", "web.parquet"):
        originals |= {document.id: document for document in documents_in(source / name)}
    kept = documents_in(out / KEPT_DOCUMENTS)
    ids = pyarrow.parquet.read_table(out / KEPT_DOCUMENTS)["id"].to_pylist()
    assert ids == [row["id"] for row in rows if row["kept"]] and 0 < len(ids) < len(rows)
    for name, document in zip(ids, kept, strict=True):
        assert document.parts == originals[name].parts


def test_explain_names_the_pictures(alone):
    out, rows = alone
    [row] = [row for row in rows if row["id"] == "web.parquet:0"]
    *_, line = explain(out, "web.parquet:0").splitlines()
    digest = row["pictures"][0]["sha256"]
    wanted = f"picture 0: made/two.png, 64 x 64 pixels, {len(smooth(2)):,} bytes, 5 tiles (27 tokens), SHA-256 {digest}"
    assert line == wanted
    assert row["tokens"] == len("one\ntwo") + 27


def test_equal_captions_of_other_pictures_are_kept(tmp_path):
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= {f"{number}.png": smooth(number % 3), f"{number}.txt": b"What is this? A photo of some thing."}
    write_tar(tmp_path / "photos.tar", members)
    rows = filtered(tmp_path / "photos.tar", tmp_path / "out")
    assert [row["reason"] for row in rows] == ["hard", "hard", "hard", "duplicate_pictures"]
    rows = filtered(tmp_path / "photos.tar", tmp_path / "exact", duplicates=DuplicateConfig(pictures=None))
    assert [row["detail"] for row in rows if not row["kept"]] == ["photos.tar:0"], "the same text and picture"
    rows = filtered(tmp_path / "photos.tar", tmp_path / "off", duplicates=DuplicateConfig(False, None, None))
    assert all(row["kept"] for row in rows)


def test_pictures_of_a_dropped_document_may_come_again(tmp_path):
    texts = (b"", b"A photo of one thing.", b"The same photo again.")
    pairs = (
        (f"{n}.{kind}", content)
        for n, text in enumerate(texts)
        for kind, content in (("png", smooth(1)), ("txt", text))
    )
    write_tar(tmp_path / "photos.tar", dict(pairs))
    rows = filtered(tmp_path / "photos.tar", tmp_path / "out")
    assert [(row["reason"], row["detail"]) for row in rows] == [
        ("empty", None),
        ("hard", None),
        ("duplicate_pictures", "photos.tar:1"),
    ]


def broken(folder: Path) -> Path:
    """Write documents of which the third has half a picture, and the fifth a path that leaves the folder."""
    folder.mkdir()
    lines = []
    for number in range(6):
        content = smooth(number)
        (folder / f"{number}.png").write_bytes(content[: len(content) // 2] if number == 2 else content)
        name = f"../{number}.png" if number == 4 else f"{number}.png"
        lines.append(json.dumps({"parts": [{"image": name}, {"text": f"number {number}"}]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def test_bad_pictures_are_dropped_and_counted(tmp_path):
    images = ImagesConfig(tiles=TILES, on_bad=BadMedia.drop)
    rows = filtered(broken(tmp_path / "in"), tmp_path / "out", images=images)
    bad = {row["id"]: row["detail"] for row in rows if row["reason"] == "malformed"}
    assert list(bad) == ["documents.jsonl:3", "documents.jsonl:5"] and len(rows) == 6
    assert bad["documents.jsonl:3"].startswith("2.png: cannot be decoded (")
    assert bad["documents.jsonl:5"] == "../4.png is not a path inside the folder of the source"
    assert len(documents_in(tmp_path / "out" / KEPT_DOCUMENTS)) == 4


@pytest.mark.parametrize(
    "settings, advice",
    [({}, "images.on_bad=drop"), ({"images": BadMedia.drop, "on_error": OnError.fail}, "on_error=drop")],
)
def test_a_bad_picture_ends_the_filter(tmp_path, settings, advice):
    settings = {**settings, "images": ImagesConfig(tiles=TILES, on_bad=settings.get("images", BadMedia.fail))}
    with pytest.raises(ConfigError, match=rf"^input=documents\.jsonl:3: .*2\.png: cannot be decoded.*; try {advice}"):
        filtered(broken(tmp_path / "in"), tmp_path / "out", **settings)
    assert not (tmp_path / "out" / KEPT_DOCUMENTS).exists() and not (tmp_path / "out" / "stages" / "records").exists()


def test_any_number_of_workers_makes_the_same_bytes(source, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 4)

    def work(worker: Any) -> Filter:
        done = Filter(job(source, tmp_path, worker))
        done.run()
        return done

    write_outputs(on_threads(3, work)[0], tmp_path)
    assert outputs(tmp_path) == outputs(alone[0])


def test_a_killed_filter_resumes_to_the_same_bytes(source, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 4)
    for deadly in (1, 7):
        written: list[Path] = []

        def dying(write: Any, path: Path, content: Any) -> None:
            if len(written) == deadly:  # noqa: B023 - called in this round
                raise KeyboardInterrupt
            written.append(path)  # noqa: B023
            write(path, content)

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            for name in ("write_bytes", "write_json"):
                patch.setattr(store, name, partial(dying, getattr(store, name)))
            filtered(source, tmp_path / "out")
        assert not (tmp_path / "out" / KEPT_DOCUMENTS).exists()
    filtered(source, tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(alone[0])


def test_pictures_that_change_meanwhile_are_an_error(tmp_path):
    folder = write_documents(tmp_path / "in", 8).parent
    done = Filter(job(folder, tmp_path / "out"))
    done.run()
    (folder / "3-1.png").write_bytes(smooth(9))
    with pytest.raises(DataError, match=r"the documents of documents\.jsonl changed while they were filtered"):
        write_kept_documents(done, tmp_path / KEPT_DOCUMENTS)
    assert not list(tmp_path.glob("*kept*"))
    with pytest.raises(ConfigError, match="records: the input changed since it was made; remove"):
        filtered(folder, tmp_path / "out")
    smaller = ImagesConfig(tiles=TILES, max_images=2)
    with pytest.raises(ConfigError, match=r"images\.max_images=48 \(now 2\)"):
        filtered(folder, tmp_path / "out", images=smaller)


def test_frames_of_a_video_are_pictures(tmp_path):
    pytest.importorskip("av")
    first, second = (clip(number, ClipConfig()) for number in range(2))
    members = {"a.mkv": first.data, "a.txt": b"one", "b.mkv": second.data, "b.txt": b"two", "c.mkv": first.data}
    write_tar(tmp_path / "clips.tar", {**members, "c.txt": b"three"})
    rows = filtered(tmp_path, tmp_path / "out")
    assert [row["detail"] for row in rows] == [None, None, "clips.tar:a"]
    assert rows[0]["pictures"][1]["name"].startswith("a.mkv at 0:0") and len(rows[0]["pictures"]) > 2
    assert [part.data for one in documents_in(tmp_path / "out" / KEPT_DOCUMENTS) for part in one.parts[:1]] == [
        first.data,
        second.data,
    ]
