"""Read documents of parts from jsonl, parquet, WebDataset tars and tables. Pictures and videos are not decoded.

The columns of a record decide how it is read; the first that fits of
- `parts`: a list of {"text": ...}, {"image": path} and {"video": path};
- `texts` + `images`: lists of equal length, one of them null at each place (OBELICS), or turns of a user and an
  assistant with their pictures (FineVision);
- `text` + `images`: a text with a marker for each picture;
- `text` + one column of a picture.

A picture is bytes, a struct of bytes and path as the `datasets` library stores it, or a path inside the folder of the
source. Columns of its feature `Video` hold videos instead. Nothing is fetched, and nothing outside the folder is
opened. `data/images/tar.py` reads tars.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.files import is_local, parse_json
from data.files import UnreadableFile, json_lines, open_parquet
from data.images.config import ImagesConfig
from data.images.contents import Reference, RefusedRecord, as_text, check_count, load
from data.images.parts import BadRecord, PartsConfig, PartsDocument
from data.images.tar import read_samples

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")
_BATCH_ROWS = 8
_BUFFER_BYTES = 2**20


class Columns(Enum):
    """Which columns of a record hold its parts."""

    parts = "parts"
    texts_and_images = "texts and images"
    text_and_images = "text and images"
    text_and_image = "text and image"


@dataclass(frozen=True)
class _Layout:
    """How the records of a file or data set are read. `folder`: where paths start, without the `prefix`. `most`: number
    of pictures and videos of a document. `videos`: the columns of videos.
    """

    config: PartsConfig
    folder: Path | None
    most: int
    image_key: str = "image"
    videos: frozenset[str] = frozenset()
    prefix: str = ""


def read_documents(
    path: Path,
    config: PartsConfig,
    folder: Path | None = None,
    name: str | None = None,
    most: int = ImagesConfig.max_images,
) -> Iterator[PartsDocument | BadRecord]:
    """Yield each record of a file as a document of at most `most` pictures and videos, or why it cannot be one.

    Paths of pictures start at `folder` (default: the folder of the file) and must stay inside. The id of a record is
    the file's `name` (default: that in the folder), and its line (from 1), row (from 0) or key.

    Raises `UnreadableFile` for a damaged file, after the records before the damage, and `ConfigError` for a file
    without the columns.
    """
    folder = path.parent if folder is None else folder
    if name is None:
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    _check_regular(path)
    if path.name.endswith(".tar"):
        yield from read_samples(path, name, config, most)
    else:
        yield from _loaded(_read(path, name, _Layout(config, folder, most)))


def named_files(path: Path, config: PartsConfig) -> Iterator[str]:
    """Yield the paths of pictures and videos in the records of a file. Raises as `read_documents` does."""
    _check_regular(path)
    if path.name.endswith(".tar"):
        return
    for record in _read(path, path.name, _Layout(config, path.parent, most=sys.maxsize)):
        parts = record.parts if isinstance(record, _Record) else []
        for one in parts:
            if isinstance(one, Reference) and one.path:
                try:
                    yield as_text(one.path, one.place)
                except RefusedRecord:  # as the record will be
                    continue


def _check_regular(path: Path) -> None:
    if is_local(path) and path.exists() and not path.is_file():
        raise UnreadableFile("is not a regular file")  # to open a named pipe would wait for its writer


@dataclass(frozen=True)
class _Record:
    """A record whose pictures are not yet loaded."""

    id: str
    parts: list[str | Reference]
    layout: _Layout


def _loaded(records: Iterable[_Record | BadRecord]) -> Iterator[PartsDocument | BadRecord]:
    for record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        layout = record.layout
        try:
            check_count(sum(isinstance(part, Reference) for part in record.parts), layout.most)
            parts = [
                load(part, layout.folder, layout.config, layout.prefix) if isinstance(part, Reference) else part
                for part in record.parts
            ]
        except RefusedRecord as problem:
            yield BadRecord(record.id, str(problem))
        else:
            yield PartsDocument(record.id, tuple(part for part in parts if part != ""))


def _read(path: Path, name: str, layout: _Layout) -> Iterator[_Record | BadRecord]:
    """Yield the records of a file, without reading what their paths name."""
    if path.name.endswith(".parquet"):
        with open_parquet(path, _BUFFER_BYTES) as table:
            schema = table.schema_arrow
            layout = _with_columns(layout, schema, name)
            wanted = _keys(_require(schema.names, layout, name), layout)
            yield from _from_batches(table.iter_batches(_BATCH_ROWS, columns=wanted), name, layout)
    elif path.name.endswith(SUFFIXES):
        yield from _from_jsonl(path, name, replace(layout, image_key=layout.config.image_key or "image"))
    else:
        raise UnreadableFile(f"has none of the suffixes {', '.join(SUFFIXES)}")


def _from_jsonl(path: Path, name: str, layout: _Layout) -> Iterator[_Record | BadRecord]:
    checked = False
    for number, _, line in json_lines(path):
        try:
            row = _object(line)
            if not checked:  # later records may lack pictures
                _require(list(row), layout, name)
                checked = True
            parts = _parts(row, layout)
        except RefusedRecord as problem:
            yield BadRecord(f"{name}:{number}", str(problem))
        else:
            yield _Record(f"{name}:{number}", parts, layout)


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise RefusedRecord(f"byte {error.start} of the line is not UTF-8") from None
    except ValueError as error:
        raise RefusedRecord(str(error)) from None
    if not isinstance(row, dict):
        raise RefusedRecord("is not a JSON object")
    return row


def holds_documents(schema: Any, config: PartsConfig) -> bool:
    """Return whether tables with this schema of Arrow hold documents of parts, not text alone."""
    layout = _with_columns(_Layout(config, None, 1), schema, "the data set")
    return _columns(schema.names, layout) is not None


def read_tables(
    tables: Iterable[Any], schema: Any, name: str, config: PartsConfig, folder: Path | None, most: int
) -> Iterator[PartsDocument | BadRecord]:
    """Yield each row of tables of Arrow with this `schema`, as `read_documents` does. Without a folder, pictures must
    be bytes. Raises `ConfigError` for tables without the columns.
    """
    prefix = "" if folder is None else f"{folder.absolute()}/"  # `datasets` stores whole paths
    layout = _with_columns(_Layout(config, folder, most, prefix=prefix), schema, name)
    wanted = _keys(_require(schema.names, layout, name), layout)
    batches = (batch for table in tables for batch in table.select(wanted).to_batches(_BATCH_ROWS))
    yield from _loaded(_from_batches(batches, name, layout))


def _from_batches(batches: Iterable[Any], name: str, layout: _Layout) -> Iterator[_Record | BadRecord]:
    for number, row in enumerate(row for batch in batches for row in _rows(batch)):
        try:
            if isinstance(row, str):
                raise RefusedRecord(row)
            parts = _parts(row, layout)
        except RefusedRecord as problem:
            yield BadRecord(f"{name}:{number}", str(problem))
        else:
            yield _Record(f"{name}:{number}", parts, layout)


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch, and for a row whose text is not UTF-8 the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"byte {error.start} of a text is not UTF-8"


def _with_columns(layout: _Layout, schema: Any, name: str) -> _Layout:
    """Return the layout with the column of one picture, and those of videos, that a schema of Arrow tells."""
    image_key = layout.config.image_key or _column_of_pictures(schema, layout, name)
    try:  # what the `datasets` library writes
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        videos = frozenset(name for name, kind in features.items() if '"_type": "Video"' in json.dumps(kind))
    except (KeyError, TypeError, AttributeError, ValueError):
        videos = frozenset()
    return replace(layout, image_key=image_key, videos=videos)


def _column_of_pictures(schema: Any, layout: _Layout, name: str) -> str:
    """Return the one column of structs of bytes and path, or if there is none, of bytes."""
    import pyarrow

    types = pyarrow.types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    def is_picture(kind: Any) -> bool:
        return types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0

    fields = [field for field in schema if field.name != layout.config.text_key]
    found = [field.name for field in fields if is_picture(field.type)]
    found = found or [field.name for field in fields if is_bytes(field.type)]
    if len(found) > 1 and not _columns(schema.names, replace(layout, image_key="")):
        raise ConfigError("image_key", None, f"{name} has several columns of pictures", found)
    return found[0] if found else "image"


def _columns(names: Collection[str], layout: _Layout) -> Columns | None:
    """Return how a record with these columns is read, or None if they do not fit."""
    config = layout.config
    if config.parts_key in names:
        return Columns.parts
    if config.images_key in names and config.texts_key in names:
        return Columns.texts_and_images
    if config.text_key in names and config.images_key in names:
        return Columns.text_and_images
    return Columns.text_and_image if config.text_key in names and layout.image_key in names else None


def _keys(columns: Columns, layout: _Layout) -> list[str]:
    config = layout.config
    match columns:
        case Columns.parts:
            return [config.parts_key]
        case Columns.texts_and_images:
            return [config.texts_key, config.images_key]
        case Columns.text_and_images:
            return [config.text_key, config.images_key]
        case Columns.text_and_image:
            return [config.text_key, layout.image_key]


def _require(names: Collection[str], layout: _Layout, file: str) -> Columns:
    config, found = layout.config, _columns(names, layout)
    if found:
        return found
    has = f"{file} has the columns {', '.join(names) or '(none)'}"
    if config.text_key in names:
        reason = f"{has}; name that of pictures here, or by images_key or parts_key"
        raise ConfigError("image_key", config.image_key, reason)
    reason = f"{has}; name that of text here, or by texts_key beside images_key, or by parts_key"
    raise ConfigError("text_key", config.text_key, reason)


def _parts(row: dict[str, Any], layout: _Layout) -> list[str | Reference]:
    """Return the texts of a record, and where its pictures are. Raises `RefusedRecord`."""
    config, image_key = layout.config, layout.image_key
    match _columns(row, layout):
        case Columns.parts:
            found = _listed(_list(row[config.parts_key], config.parts_key), config.parts_key)
        case Columns.texts_and_images:
            texts, images = _list(row[config.texts_key], config.texts_key), _pictures(row, layout)
            if any(isinstance(text, dict) for text in texts):
                found = _marked(_conversation(texts, config.texts_key), images, config)
            else:
                found = _interleaved(texts, images, config)
        case Columns.text_and_images:
            found = _marked(as_text(row[config.text_key], config.text_key), _pictures(row, layout), config)
        case Columns.text_and_image:
            picture = Reference(row[image_key], image_key, image_key in layout.videos)
            text = as_text(row[config.text_key], config.text_key)
            found = [text] if picture.value is None else _marked(text, [picture], config)
        case None:
            if config.text_key not in row:
                raise RefusedRecord(f"has only the columns {', '.join(row) or '(none)'}")
            found = [as_text(row[config.text_key], config.text_key)]
    return found


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise RefusedRecord(f"{key} is not a list")
    return value or []


def _pictures(row: dict[str, Any], layout: _Layout) -> list[Reference] | None:
    """Return the references of a column of pictures, or None where it is null: a record of text alone."""
    key = layout.config.images_key
    value, is_video = row[key], key in layout.videos
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    return [Reference(one, f"{key}.{place}", is_video) for place, one in enumerate(listed)]


def _listed(items: list[Any], key: str) -> list[str | Reference]:
    """Read a list of parts, each an object with one key. In parquet the other keys are null."""
    found: list[str | Reference] = []
    for number, item in enumerate(items):
        place = f"{key}.{number}"
        given = {name: one for name, one in item.items() if one is not None} if isinstance(item, dict) else {}
        match list(given):
            case ["text"]:
                found.append(as_text(given["text"], place))
            case ["image"]:
                found.append(Reference(given["image"], place))
            case ["video"]:
                found.append(Reference(given["video"], place, is_video=True))
            case _:
                raise RefusedRecord(f"{place} is not an object with one of text, image and video")
    return found


def _interleaved(texts: list[Any], images: list[Reference] | None, config: PartsConfig) -> list[str | Reference]:
    images = images or []
    if len(texts) != len(images):
        raise RefusedRecord(f"{config.texts_key} has {len(texts)} places and {config.images_key} {len(images)}")
    found: list[str | Reference] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image.value is not None:
            raise RefusedRecord(f"place {place} has a text and a picture: their order is unknown")
        if text is not None:
            found.append(as_text(text, f"{config.texts_key}.{place}"))
        elif image.value is not None:
            found.append(image)
    return found


def _marked(text: str, images: list[Reference] | None, config: PartsConfig) -> list[str | Reference]:
    """Put each picture where the text has a marker, or all first if it has none. Without a list of pictures the text is
    plain, whatever it spells.
    """
    if images is None:
        return [text]
    first, *others = text.split(config.marker)
    if images and not others:
        return [*images, text]
    if len(images) != len(others):
        raise RefusedRecord(f"has {len(images)} pictures but {len(others)} times the marker {config.marker}")
    found: list[str | Reference] = [first]
    for image, piece in zip(images, others, strict=True):
        found += [image, piece]
    return found


def _conversation(turns: list[Any], key: str) -> str:
    """Return turns as a text: what the user says, from a new line what the assistant says, and a blank line between."""
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"user", "assistant"} <= set(turn):
            raise RefusedRecord(f"{key}.{place} is not a turn with user and assistant")
    return "\n\n".join(
        "\n".join(filter(None, (as_text(turn[who], f"{key}.{place}.{who}") for who in ("user", "assistant"))))
        for place, turn in enumerate(turns)
    )
