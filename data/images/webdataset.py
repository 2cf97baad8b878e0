"""Read the samples of a WebDataset tar. A sample is the members that follow each other and have the same key: their
name up to the first dot of its last part.

Pictures and videos come first, in the order of the tar, then the texts: each `.txt`, or if there is none, the caption
of a `.json`. Members with other suffixes, and with names that start with a dot, are ignored. A pickle is never opened:
it makes the sample bad, as does what is not a regular file. Markers in the text stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from core.files import parse_json
from data.files import MOST_BYTES, reading
from data.images.contents import RefusedRecord, as_text, check_count, check_size
from data.images.parts import BadRecord, ImagePart, PartsConfig, PartsDocument, VideoPart
from data.images.tar import TarMember, tar_members

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
PICKLES = (".joblib", ".pickle", ".pkl", ".pt", ".pth", ".pyd")
_KEY = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<rest>[^/]+)", re.DOTALL)


def read_samples(path: Path, name: str, config: PartsConfig) -> Iterator[PartsDocument | BadRecord]:
    """Yield each sample as a document, or why it cannot be one. `name`: of the file, in ids.

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
                sample = _Sample(key, config)
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


class _Sample:
    """Collects the members of a key. After the first problem nothing is read."""

    def __init__(self, key: str, config: PartsConfig) -> None:
        self.key, self.config, self.problem = key, config, ""
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
            check_count(len(self._media) + 1, self.config)
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
