"""Read the samples of a WebDataset tar. A sample is the members that follow each other and have the same key: their
name up to the first dot of its last part.

Pictures and videos come first, in the order of the tar, then the texts: each `.txt`, or if there is none, the caption
of a `.json`. Members with other suffixes, and with names that start with a dot, are ignored. A pickle is never opened:
it makes the sample bad, as does what is not a regular file. Markers in the text stay text.

No member is extracted. Python's `tarfile` reads an extended header of any size, keeps every header, and in some
versions does not end on a negative size (CVE-2025-8194). Here each header is read once, and its size has a limit.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.files import parse_json
from data.files import MOST_BYTES, UnreadableFile, reading
from data.images.contents import RefusedRecord, as_text, check_count, check_size
from data.images.parts import BadRecord, ImagePart, PartsConfig, PartsDocument, VideoPart

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
PICKLES = (".joblib", ".pickle", ".pkl", ".pt", ".pth", ".pyd")
_KEY = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<rest>[^/]+)", re.DOTALL)
_BLOCK = tarfile.BLOCKSIZE
_LARGEST_HEADER = 2**20
"""Most bytes of an extended header: a long name, or the attributes of the pax format."""
_LARGEST_MEMBER = 2**40
"""Sizes above are nonsense, and file systems refuse to seek there."""
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.DIRTYPE: "a folder",
}
"""What members without content are."""
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}


def read_samples(path: Path, name: str, config: PartsConfig, most: int) -> Iterator[PartsDocument | BadRecord]:
    """Yield each sample as a document, or why it cannot be one. `name`: of the file, in ids. `most`: pictures and
    videos of a sample.

    Raises `UnreadableFile` for what is not a tar, and for a truncated one, after the samples before.
    """
    sample, keys = None, set()
    with reading(), path.open("rb") as file:
        for member in tar_members(file):
            key, suffix = _key_and_suffix(member)
            if key is None:
                continue
            if sample is None or key != sample.key:
                if sample:
                    yield sample.record(name)
                sample = _TarSample(key, config, most)
                if key in keys:
                    sample.problem = "its members are not together in the tar: sort them by name"
                keys.add(key)
            sample.add(member, suffix)
    if sample:
        yield sample.record(name)


def _key_and_suffix(member: TarMember) -> tuple[str | None, str]:
    """Return the key of a member and its name after the key; None for a member that belongs to no sample."""
    name = member.name.removeprefix("./")
    if member.kind == "a folder":
        return None, ""
    match = _KEY.fullmatch(name)
    if match:
        return match["key"], match["rest"]
    return (None if member.kind is None else name), ""


class _TarSample:
    """Collects the members of a key. After the first problem nothing is read."""

    def __init__(self, key: str, config: PartsConfig, most: int) -> None:
        self.key, self.config, self.most, self.problem = key, config, most, ""
        self._names: set[str] = set()
        self._media: list[ImagePart | VideoPart] = []
        self._texts: list[str] = []
        self._captions: list[bytes] = []

    def add(self, member: TarMember, rest: str) -> None:
        if not self.problem:
            try:
                self._add(member, rest)
            except RefusedRecord as problem:
                self.problem = str(problem)

    def _add(self, member: TarMember, rest: str) -> None:
        name, suffix = member.name, f".{rest.rpartition('.')[2].lower()}"
        as_text(name, "the name of a member")
        if name.startswith("/") or ".." in name.split("/"):
            raise RefusedRecord(f"{name} is not a name inside the tar")
        if member.kind:
            raise RefusedRecord(f"{name} is {member.kind}, not a file")
        if rest in self._names:
            raise RefusedRecord(f"{name} is in the tar twice")
        self._names.add(rest)
        if suffix in PICKLES:
            raise RefusedRecord(f"{name} is a pickle, which can run code when it is opened")
        if suffix in IMAGES or suffix in VIDEOS:
            check_count(len(self._media) + 1, self.most)
            check_size(member.size, name, self.config.largest_bytes)
            self._media.append((ImagePart if suffix in IMAGES else VideoPart)(member.read(), name))
        elif suffix in (".txt", ".json"):
            if member.size > MOST_BYTES:
                raise RefusedRecord(f"{name} has more than {MOST_BYTES >> 20} MiB")
            if suffix == ".txt":
                self._texts.append(as_text(member.read(), name))
            else:
                self._captions.append(member.read())

    def record(self, file: str) -> PartsDocument | BadRecord:
        name = f"{file}:{self.key.encode(errors='backslashreplace').decode()}"
        try:
            if self.problem:
                raise RefusedRecord(self.problem)
            texts = self._texts or [self._caption(content) for content in self._captions]
        except RefusedRecord as problem:
            return BadRecord(name, str(problem))
        if not self._media and not self._texts and not any(texts):
            return BadRecord(name, f"holds no picture, video or text, but {', '.join(sorted(self._names))}")
        return PartsDocument(name, (*self._media, *filter(None, texts)))

    def _caption(self, content: bytes) -> str:
        try:
            value = parse_json(as_text(content, "the .json"))
        except ValueError as error:
            raise RefusedRecord(f"the .json {error}") from None
        if not isinstance(value, dict):
            raise RefusedRecord("the .json is not an object")
        keys = [key for key in (self.config.text_key, "caption", "text") if value.get(key) is not None]
        return as_text(value[keys[0]], f"{keys[0]} of the .json") if keys else ""


@dataclass(frozen=True)
class TarMember:
    """A member of a tar. `kind`: what it is if not a regular file, else None. `size`: bytes of its content in the tar.

    `read` returns the whole content. It works until the next member is asked for.
    """

    name: str
    kind: str | None
    size: int
    read: Callable[[], bytes]


def tar_members(file: Any) -> Iterator[TarMember]:
    """Yield the members of an uncompressed tar, open for reading and seekable. No name is opened, and no link followed.

    Raises `UnreadableFile` for what is not a tar, and for a truncated one.
    """
    offset = 0

    def content(size: int) -> bytes:
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise UnreadableFile(f"is truncated: it ends at byte {offset + len(data)}, before the end of the tar")
        return data

    extended: dict[str, str] = {}
    while True:
        at = offset
        block = content(_BLOCK)
        offset += _BLOCK
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(extended.get("size", header.size))
        except (tarfile.TarError, ValueError):
            raise UnreadableFile(f"has no header of a tar member at byte {at}") from None
        if not 0 <= size < _LARGEST_MEMBER:
            raise UnreadableFile(f"has a member of {size} bytes at byte {at}")
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, *_LONG):
            if size > _LARGEST_HEADER:
                raise UnreadableFile(f"has an extended header of {size} bytes at byte {at}")
            extended |= _attributes(header.type, content(size), at)
        else:
            kind = _KINDS.get(header.type)
            if kind:
                size = 0
            elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
                kind = "a sparse file"
                is_extended = header.type == tarfile.GNUTYPE_SPARSE and block[482]
                while is_extended:  # more blocks of the map of a sparse file
                    is_extended = content(_BLOCK)[504]
                    offset += _BLOCK
            elif header.type not in tarfile.REGULAR_TYPES:
                kind = "of an unknown type"
            name = extended.get("GNU.sparse.name", extended.get("path", header.name))
            yield TarMember(name, kind, size, partial(content, size))
            extended = {}
        offset += -(-size // _BLOCK) * _BLOCK


def _attributes(kind: bytes, content: bytes, at: int) -> dict[str, str]:
    """Return the attributes that an extended header gives to the next member."""
    if kind in _LONG:
        return {_LONG[kind]: content.split(b"\0", 1)[0].decode(errors="surrogateescape")}
    found, position = {}, 0
    while position < len(content) and content[position]:
        digits, space, _ = content[position : position + 20].partition(b" ")
        end = position + int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[position + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(content) or not value.endswith(b"\n"):
            raise UnreadableFile(f"has a damaged extended header at byte {at}")
        found[key.decode(errors="surrogateescape")] = value[:-1].decode(errors="surrogateescape")
        position = end
    return {} if kind == tarfile.XGLTYPE else found
