"""Read WebDataset tars that `tarfile` wrote, and hostile ones. No member is extracted."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.files import UnreadableFile
from data.images import tar
from data.images.parts import BadRecord, ImagePart, PartsConfig, PartsDocument, VideoPart
from data.images.readers import read_documents

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
GOOD = [("good.jpg", b"jpg"), ("good.txt", b"A good one.")]
"""A sample that must be read whatever stands before it."""


def write(path: Path, *members: Any, kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write members, each a name and its content, or a `TarInfo`, or a `TarInfo` and its content."""
    with tarfile.open(path, "w", format=kind) as file:
        for member in members:
            header, content = (member, b"") if isinstance(member, tarfile.TarInfo) else member
            if isinstance(header, str):
                header = tarfile.TarInfo(header)
                header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


def shown(path: Path, most: int = 48, **keys: Any) -> list[Any]:
    return [
        str(one) if isinstance(one, BadRecord) else [p if isinstance(p, str) else p.data for p in one.parts]
        for one in read_documents(path, PartsConfig(**keys), most=most)
    ]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_samples_as_tarfile_writes_them(tmp_path, kind):
    long = "folder.v1/" + "n" * 90
    path = write(
        tmp_path / "a.tar",
        special("./folder.v1", tarfile.DIRTYPE),
        ("./0.txt", "Zwei Bälle <image>".encode()),
        ("./0.JPG", b"jpg" * 1000),
        ("./0.left.png", b"png"),
        ("./0.json", b"{not read, since there is a text"),
        ("./0.cls", b"7"),
        ("1.json", b'{"caption": "One.", "width": 3}'),
        ("1.webm", b"webm"),
        (f"{long}.webp", b"webp"),
        (f"{long}.json", b'{"width": 3}'),
        ("README", b"belongs to no sample"),
        ("._2.jpg", b"hidden"),
        ("3.txt", b"text alone"),
        kind=kind,
    )
    assert list(read_documents(path, PartsConfig())) == [
        PartsDocument(
            "a.tar:0",
            (ImagePart(b"jpg" * 1000, "./0.JPG"), ImagePart(b"png", "./0.left.png"), "Zwei Bälle <image>"),
        ),
        PartsDocument("a.tar:1", (VideoPart(b"webm", "1.webm"), "One.")),
        PartsDocument(f"a.tar:{long}", (ImagePart(b"webp", f"{long}.webp"),)),
        PartsDocument("a.tar:3", ("text alone",)),
    ]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_names_longer_than_a_header(tmp_path, kind):
    name = "/".join(["ü" * 60] * 8)
    path = write(tmp_path / "a.tar", (f"{name}.png", b"png"), *GOOD, kind=kind)
    first, good = read_documents(path, PartsConfig())
    assert first == PartsDocument(f"a.tar:{name}", (ImagePart(b"png", f"{name}.png"),))
    assert isinstance(good, PartsDocument)


def test_hundreds_of_samples_against_tarfile(tmp_path):
    chance = random.Random(1)
    members = []
    for number in range(300):
        members.append((f"{number:06d}.png", chance.randbytes(chance.randint(1, 3000))))
        members.append((f"{number:06d}.txt", f"Caption {number}.".encode()))
    path = write(tmp_path / "a.tar", *members)
    with tarfile.open(path) as file:
        expected = [file.extractfile(member).read() for member in file]  # type: ignore[union-attr]
    found = [part if isinstance(part, bytes) else part.encode() for parts in shown(path) for part in parts]
    assert found == expected


class Opened:
    """Shows whether it was unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was opened')",))


def bad_samples() -> dict[str, tuple[list[Any], str]]:
    sparse = special("a.jpg", tarfile.GNUTYPE_SPARSE)
    hole = tarfile.TarInfo("a.jpg")
    hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
    hole.size = 512
    text = ("a.txt", b"text")
    return {
        "absolute": ([("/a.jpg", b"x")], "/a: /a.jpg is not a name inside the tar"),
        "parent": ([("../a.jpg", b"x")], "../a: ../a.jpg is not a name inside the tar"),
        "parent within": ([("b/../a.jpg", b"x")], "b/../a: b/../a.jpg is not a name inside the tar"),
        "symbolic link": ([special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), text], "a: a.jpg is a symbolic link"),
        "hard link": ([text, special("a.jpg", tarfile.LNKTYPE, "a.txt")], "a: a.jpg is a hard link"),
        "link without suffix": ([special("a", tarfile.SYMTYPE, "/etc")], "a: a is a symbolic link"),
        "device": ([special("a.jpg", tarfile.CHRTYPE), text], "a: a.jpg is a device"),
        "pipe": ([special("a.jpg", tarfile.FIFOTYPE), text], "a: a.jpg is a named pipe"),
        "unknown type": ([special("a.jpg", b"Z"), text], "a: a.jpg is of an unknown type"),
        "sparse": ([sparse, text], "a: a.jpg is a sparse file"),
        "sparse in pax": ([(hole, bytes(512)), text], "a: a.jpg is a sparse file"),
        "pickle": ([text, ("a.pkl", pickle.dumps(Opened()))], "a: a.pkl is a pickle, which can run code"),
        "pickle of torch": ([("a.PTH", pickle.dumps(Opened())), text], "a: a.PTH is a pickle"),
        "pickle of webdataset": ([("a.left.pyd", b"x"), text], "a: a.left.pyd is a pickle"),
        "large": ([text, ("a.jpg", bytes(1001))], "a: a.jpg has 1001 bytes, more than largest_bytes=1000"),
        "empty": ([text, ("a.jpg", b"")], "a: a.jpg is empty"),
        "many": (
            [(f"a.{n}.jpg", b"x") for n in range(5)],
            "a: has 5 pictures and videos, more than data.images.max_images=4",
        ),
        "twice": ([("a.jpg", b"x"), ("a.jpg", b"y")], "a: a.jpg is in the tar twice"),
        "not UTF-8": ([("a.jpg", b"x"), ("a.txt", b"\xff")], "a: a.txt is not UTF-8 text (byte 0)"),
        "name not UTF-8": ([("a\udcff.jpg", b"x")], r"a\udcff: the name of a member holds half of a surrogate"),
        "json": ([("a.jpg", b"x"), ("a.json", b"{")], "a: the .json is not JSON"),
        "json list": ([("a.jpg", b"x"), ("a.json", b"[]")], "a: the .json is not an object"),
        "deep json": ([("a.jpg", b"x"), ("a.json", b"[" * 10**5)], "a: the .json is nested too deeply"),
        "json number": ([("a.jpg", b"x"), ("a.json", b'{"text": 1}')], "a: text of the .json is a int, not text"),
        "nothing known": ([("a.cls", b"x"), ("a.npy", b"x")], "a: holds no picture, video or text, but cls, npy"),
    }


@pytest.mark.parametrize("case", bad_samples())
def test_a_bad_sample_does_not_stop_the_others(tmp_path, case):
    members, reason = bad_samples()[case]
    kind = tarfile.PAX_FORMAT if "pax" in case else tarfile.GNU_FORMAT
    bad, good = shown(write(tmp_path / "a.tar", *members, *GOOD, kind=kind), most=4, largest_bytes=1000)
    assert bad.startswith(f"a.tar:{reason}") and "\n" not in bad
    assert good == [b"jpg", "A good one."]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_sparse_file_with_a_long_map(tmp_path):
    """The blocks of the map that follow the header are skipped too."""
    path = write(tmp_path / "a.tar", special("a.jpg", tarfile.GNUTYPE_SPARSE), *GOOD, kind=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[482] = 1  # a block of the map follows
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path.write_bytes(bytes(content[:512]) + b"\1" * 504 + bytes(8) + bytes(content[512:]))
    assert shown(path) == ["a.tar:a: a.jpg is a sparse file, not a file", [b"jpg", "A good one."]]


def test_members_of_a_key_must_be_together(tmp_path):
    path = write(tmp_path / "a.tar", ("a.jpg", b"x"), *GOOD, ("a.txt", b"late"))
    assert shown(path)[2] == "a.tar:a: its members are not together in the tar: sort them by name"


def test_the_suffixes_of_pickles_are_needed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", *GOOD, ("good.pkl", b"x"))
    monkeypatch.setattr(tar, "PICKLES", ())
    assert shown(path) == [[b"jpg", "A good one."]]  # ignored, like any other suffix


def test_truncated_tars_are_one_line(tmp_path):
    whole = write(tmp_path / "whole.tar", ("0.jpg", b"x" * 600), ("0.txt", b"zero"), *GOOD).read_bytes()
    path, needed = tmp_path / "a.tar", 512 * (1 + 2 + 1 + 1 + 2 + 2)
    for length in (0, 1, 511, 512, 1000, 1536, 2048, 2560, needed, needed + 511):
        path.write_bytes(whole[:length])
        found = []
        with pytest.raises(UnreadableFile, match=r"is truncated: it ends at byte \d+, before the end of the tar"):
            for one in read_documents(path, PartsConfig()):
                found.append(one)
        assert len(found) == (length > 2560)  # a sample is whole when the next one begins
    path.write_bytes(whole[: needed + 512])
    assert len(shown(path)) == 2


def with_header(content: bytes, change: dict[int, bytes]) -> bytes:
    """Change bytes of the first header, and correct its sum."""
    block = bytearray(content[:512])
    for place, new in change.items():
        block[place : place + len(new)] = new
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block) + content[512:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({124: b"\xff" * 12}, "has a member of -1 bytes at byte 0"),
        ({124: b"\x80" + b"\x7f" * 11}, "has a member of"),
        ({124: b"\x80\0\0\0\0\0\0\x7f" + bytes(4)}, "is truncated"),
        ({124: b"zzz"}, "has no header of a tar member at byte 0"),
        ({156: b"L", 124: b"00007777777\0"}, "has an extended header of 2097151 bytes at byte 0"),
        ({156: b"x"}, "has a damaged extended header at byte 0"),
    ],
)
def test_hostile_headers_end_at_once(tmp_path, change, reason):
    path = write(tmp_path / "a.tar", *GOOD, kind=tarfile.GNU_FORMAT)
    path.write_bytes(with_header(path.read_bytes(), change))
    with pytest.raises(UnreadableFile, match=reason):
        shown(path)


def test_a_size_is_refused_before_it_is_read(tmp_path, monkeypatch):
    content = write(tmp_path / "a.tar", *GOOD, kind=tarfile.GNU_FORMAT).read_bytes()
    file = CountingFile(with_header(content, {124: b"77777777777\0"}))
    monkeypatch.setattr(Path, "open", lambda *_: file)
    with pytest.raises(UnreadableFile, match="is truncated"):
        shown(tmp_path / "a.tar")
    assert file.most == 512
    file = CountingFile(content)
    shown(tmp_path / "a.tar", largest_bytes=2**40)
    assert file.most == 512
    file = CountingFile(with_header(content, {124: b"77777777777\0"}))
    with pytest.raises(UnreadableFile, match="is truncated"):
        shown(tmp_path / "a.tar", largest_bytes=2**40)
    assert file.most == 2**33 - 1  # the control: without the limit it would be read


class CountingFile(io.BytesIO):
    """Keeps the most bytes that were asked for."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        self.most = max(self.most, size or 0)
        return super().read(size)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    members = [
        ("0.jpg", b"x" * 700),
        ("n" * 150 + ".txt", b"zero"),
        *GOOD,
        ("1.json", json.dumps({"text": "a"}).encode()),
    ]
    path, chance = tmp_path / "a.tar", random.Random(0)
    for kind in FORMATS.values():
        whole = write(path, *(members if kind != tarfile.USTAR_FORMAT else GOOD), kind=kind).read_bytes()
        for _ in range(100):
            content = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content) - 8192)] = chance.randrange(256)
            if chance.random() < 0.5:
                content = bytearray(with_header(bytes(content), {}))
            path.write_bytes(content)
            try:
                shown(path)
            except UnreadableFile as error:
                assert "\n" not in str(error)
