"""Records from files or data sets: plain text, prompts with responses, or chats.

An input is cut into parts, each read by one process from its begin to its end: a file, or a data set as a whole.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from core.errors import ConfigError
from core.files import files_in, files_like, is_local, locate, opened, sha256_file, sha256_text, unzipped
from data.filter.input.records import Record
from data.sources import TEXT_SUFFIXES, data_set_fingerprint

ASSISTANT = "assistant"
KEYS = ("text_key", "prompt_key", "response_key", "messages_key", "id_key", "domain_key", "template")
"""Of an input's settings those that decide what a record is."""
_SAVED = ("state.json", "dataset_dict.json")
"""What the `save_to_disk` of the `datasets` library leaves in a folder."""
_SHOWN = 200
"""Characters of what is said about a broken record, which may hold anything."""


_SHOWN_KEYS = 10


@dataclass(frozen=True)
class InputConfig:
    """`input`: a file, a folder or a pattern of jsonl (also .gz), parquet or text files; or `dataset`, a name or folder
    for the `datasets` library, with `subset` and `split`.

    What a record is made of: `messages_key` (a list of {"role", "content"}; the last answer is the response), or
    `prompt_key` with `response_key`, put together by `template`, or else `text_key`. `id_key`: null: file and line.
    `domain_key`: null: all is one domain.
    """

    input: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    prompt_key: str | None = None
    response_key: str | None = None
    messages_key: str | None = None
    id_key: str | None = None
    domain_key: str | None = None
    template: str = "{prompt}\n\n{response}"

    def __post_init__(self) -> None:
        if (self.input is None) == (self.dataset is None):
            raise ConfigError("input", self.input, "name a file or folder (input=...), or a data set (dataset=...)")
        if (self.prompt_key is None) != (self.response_key is None):
            raise ConfigError("response_key", self.response_key, "prompt_key and response_key go together")
        if self.prompt_key and self.messages_key:
            raise ConfigError("messages_key", self.messages_key, "give it, or prompt_key and response_key")
        before, found, after = self.template.partition("{response}")
        if not found or "{prompt}" not in before or "{" in after:
            raise ConfigError("template", self.template, "needs {prompt} and, after it, {response}")


class Unreadable(Exception):
    """A record that is none; the message says why."""


@dataclass(frozen=True)
class Broken:
    """What stands where no record could be read. `raw`: what is there, for those who keep it."""

    id: str
    source: str
    reason: str
    raw: bytes | None = None


class InputPart(Protocol):
    """What one process reads. `fingerprint` or `keys` change whenever its records could."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of what is read."""
        ...

    @property
    def keys(self) -> dict[str, str | None]:
        """What decides, of what is read, what a record is: by name, so that a change can be told."""
        ...

    def records(self) -> Iterator[Record | Broken]: ...


def parts(config: InputConfig) -> list[InputPart]:
    """The parts of an input, in a fixed order. Raises `ConfigError` where there is nothing to read."""
    make = RecordMaker(config)
    if config.dataset is not None:
        return [DataSetPart(config, make)]
    assert config.input is not None
    try:
        place = locate(config.input)
    except ConfigError as error:
        raise error.under("input") from None
    if place.is_file():
        return [FilePart(place.name, _known(place), make)]
    if place.is_dir():
        found = [path for path in files_in(place) if _reader(path) is not None]
        names = [path.relative_to(place).as_posix() for path in found]
    else:
        found = files_like(place)
        names = [path.as_posix() if is_local(path) else str(path) for path in found]
    if not found:
        raise ConfigError("input", config.input, "no such file, and no folder with parquet, jsonl or text files")
    return [FilePart(name, _known(path), make) for name, path in zip(names, found, strict=True)]


def _known(path: Path) -> Path:
    if _reader(path) is None:
        raise ConfigError(
            "input", str(path), "unknown suffix", [".jsonl", ".jsonl.gz", ".parquet", *sorted(TEXT_SUFFIXES)]
        )
    return path


def clean_records(path: str, config: InputConfig) -> list[Record]:
    """Reference text in the form of the input, or plain text files. Raises `ConfigError` for what is not."""
    keys = replace(config, input=path, dataset=None, id_key=None, domain_key=None)
    plain_text = InputConfig(input=path)
    found: list[Record] = []
    try:
        for part in parts(keys):
            assert isinstance(part, FilePart)
            if part.path.suffix in TEXT_SUFFIXES:
                part = replace(part, make=RecordMaker(plain_text))
            for record in part.records():
                if isinstance(record, Broken):
                    raise ConfigError("input", record.source, f"cannot be read: {record.reason}")
                found.append(record)
        if not found:
            raise ConfigError("input", path, "holds no record")
    except ConfigError as error:
        raise ConfigError("select.clean", error.value, error.reason, error.legal) from None
    return found


@dataclass(frozen=True)
class RecordMaker:
    """One row of an input to a `Record`."""

    config: InputConfig

    @property
    def keys(self) -> dict[str, str | None]:
        return {key: getattr(self.config, key) for key in KEYS}

    def __call__(self, row: Any, place: str, raw: str | None = None) -> Record:
        """Raises `Unreadable` where the row has not what the configuration names."""
        if not isinstance(row, dict):
            raise Unreadable("no object with keys and values")
        text, answer_start = self._text(row)
        config = self.config
        name = place if config.id_key is None else str(_get(row, config.id_key, (str, int)))
        domain = "all" if config.domain_key is None else str(_get(row, config.domain_key, (str, int)))
        if any(map(_is_half, (name, domain, text))):
            raise Unreadable("holds half of a surrogate pair, which is no text")
        return Record(name, domain, place, text, answer_start, _line(row, place) if raw is None else raw)

    def _text(self, row: dict[str, Any]) -> tuple[str, int | None]:
        config = self.config
        if config.messages_key is not None:
            return _chat(_get(row, config.messages_key, (list,)))
        if config.prompt_key is None or config.response_key is None:
            return _get(row, config.text_key, (str,)), None
        prompt, response = (_get(row, key, (str,)) for key in (config.prompt_key, config.response_key))
        if not prompt.strip():  # what the template puts around it is no prompt
            return response, 0
        before, _, after = config.template.partition("{response}")
        before = before.replace("{prompt}", prompt)
        return before + response + after, len(before)


def _line(row: dict[str, Any], place: str) -> str:
    """A row of columns as a line of JSON. Raises `ConfigError` with the column that JSON has no form for."""
    try:
        found = {}
        for column, value in row.items():
            found[column] = _for_json(value)
        return json.dumps(found, ensure_ascii=False)
    except TypeError as error:
        reason = f"the column {column!r} holds {error}, which no line of JSON can: leave that column out"
        raise ConfigError("input", place, reason) from None


def _for_json(value: Any) -> Any:
    """Bytes as {"base64": text}, what is no number as null, dates in ISO form. Raises `TypeError` for the unknown."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _for_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(inner) for inner in value]
    raise TypeError(f"a {type(value).__name__}")


def _is_half(text: str) -> bool:
    """JSON may escape one half of a surrogate pair: no encoding has bytes for it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _chat(messages: list[Any]) -> tuple[str, int]:
    """All messages, each under its role; the response is the last of the assistant. Roles alone are no prompt."""
    text, answer_start, end, said, has_prompt = "", None, 0, False, False
    for message in messages:
        if not isinstance(message, dict):
            raise Unreadable("a message is no object with role and content")
        role, content = (_get(message, key, (str,)) for key in ("role", "content"))
        text += f"{role}:\n"
        if role == ASSISTANT:
            answer_start, end, has_prompt = len(text), len(text) + len(content), said
        text += f"{content}\n\n"
        said = said or bool(content.strip())
    if answer_start is None:
        raise Unreadable("no message of the assistant")
    return (text[:end], answer_start) if has_prompt else (text[answer_start:end], 0)


def keys_of(raw: bytes | None) -> list[str]:
    """Of a record that may be none; as many as are worth showing."""
    try:
        row = json.loads(raw or b"")
    except (ValueError, RecursionError):
        return []
    return list(row)[:_SHOWN_KEYS] if isinstance(row, dict) else []


def _get(row: dict[str, Any], key: str, kinds: tuple[type, ...]) -> Any:
    if key not in row:
        raise Unreadable(f"no {key!r}; it has {', '.join(map(repr, row))}")
    value = row[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "null" if value is None else type(value).__name__
        raise Unreadable(f"{key!r} is {kind}, not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


@dataclass(frozen=True)
class FilePart:
    name: str
    path: Path
    make: RecordMaker

    @property
    def fingerprint(self) -> str:
        return sha256_text(self.name, sha256_file(self.path))

    @property
    def keys(self) -> dict[str, str | None]:
        return self.make.keys

    def records(self) -> Iterator[Record | Broken]:
        reader = _reader(_known(self.path))
        assert reader is not None
        try:
            for number, content in reader(self.path):
                place = f"{self.name}:{number}"
                try:
                    if isinstance(content, bytes):
                        line = content.decode()
                        yield self.make(json.loads(line), place, line)
                    else:
                        yield self.make(content, place)
                except (Unreadable, ValueError, RecursionError) as error:
                    raw = content if isinstance(content, bytes) else _line(content, place).encode()
                    yield Broken(place, place, str(error)[:_SHOWN], raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError("input", str(self.path), f"cannot be read: {error}") from None


@dataclass(frozen=True)
class DataSetPart:
    """A data set streamed by the `datasets` library, in its own order."""

    config: InputConfig
    make: RecordMaker

    @property
    def name(self) -> str:
        return str(self.config.dataset)

    @property
    def fingerprint(self) -> str:
        """By name, or by the files of a data set on disk; a hub's may change under its name."""
        folder = Path(self.name).expanduser()
        return data_set_fingerprint(folder, self.name, str(self.config.subset), self.config.split)

    @property
    def keys(self) -> dict[str, str | None]:
        return self.make.keys

    def records(self) -> Iterator[Record | Broken]:
        import datasets

        try:
            for number, row in enumerate(self._rows()):
                place = f"{self.name}:{number}"
                try:
                    yield self.make(row, place)
                except Unreadable as error:
                    yield Broken(place, place, str(error)[:_SHOWN], _line(row, place).encode())
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"datasets cannot read it: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise ConfigError("dataset", self.config.dataset, reason) from None

    def _rows(self) -> Any:
        import datasets

        folder, split = Path(self.name).expanduser(), self.config.split
        if not folder.is_dir():
            return datasets.load_dataset(self.name, self.config.subset, split=split, streaming=True)
        if not any((folder / name).is_file() for name in _SAVED):
            return datasets.load_dataset(str(folder), self.config.subset, split=split, streaming=True)
        saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
        if split not in splits:
            raise ConfigError("split", split, f"{self.name} was saved without it", sorted(splits))
        return splits[split]


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, and the file without its byte order mark."""
    with unzipped(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with opened(path) as source:
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(1024):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: a time that Python has no form for
        raise OSError(f"no readable parquet file ({str(error).splitlines()[0]})") from None


def _text_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    yield 0, {"text": path.read_bytes().decode(errors="replace")}


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]] | None:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines
    return {".parquet": _parquet}.get(path.suffix, _text_file if path.suffix in TEXT_SUFFIXES else None)
