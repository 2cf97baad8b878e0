"""Read the members of a tar from first to last, without extracting any.

Python's `tarfile` keeps every header, reads an extended header of any size, and in some versions of Python does not end
on a header with a negative size (CVE-2025-8194). Here each header is read once, and its size has a limit.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.files import UnreadableFile

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


_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}


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
