"""The verb `filter` on documents with pictures: its page, its lines and its refusals."""

from __future__ import annotations

import base64
import io
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core.config import load
from core.errors import ConfigError
from data.filter.audit import outputs, statistics
from data.filter.config import InputConfig
from data.filter.input.pictures import THUMBNAILS
from data.images.config import ImagesConfig
from launch.cli import main
from launch.filter.config import FilterConfig, command_of
from tests.data.filter.test_documents import smooth
from tests.support.filtering import rows_in

TILES = "images={tiles: {tile_size: 8, patch_size: 2, max_tiles: 4}}"


class Sources(HTMLParser):
    """Collects what a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]


def hostile(folder: Path, count: int = 14) -> Path:
    """Write documents whose texts and names of pictures are mark-up; the last repeats the first's picture."""
    folder.mkdir()
    lines = []
    for number in range(count):
        name = f"<img src=x onerror=alert(1)>{number % (count - 1)}.png"
        (folder / name).write_bytes(smooth(number % (count - 1)))
        text = f"<img src='http://elsewhere.example/{number}.png'> number {number}"
        lines.append(json.dumps({"parts": [{"image": name}] * (1 + 4 * (number == 3)) + [{"text": text}]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def test_the_page_shows_small_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "_THUMBNAILS", 12)
    monkeypatch.setattr(outputs, "draw", lambda audit, dark=False: {})  # takes seconds
    source, out = hostile(tmp_path / "in"), tmp_path / "out"
    assert main(["filter", f"input={source}", "unit=documents", TILES, f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "1 duplicate pictures" in said
    assert "Scorers see the text alone: 14 records with 18 pictures, " in said
    page, audit = (out / "audit.html").read_text(), json.loads((out / "audit.json").read_text())
    sources = Sources()
    sources.feed(page)
    assert all(one.startswith("data:image/") for one in sources.found) and "<img src=x" not in page
    jpegs = [one.partition(",")[2] for one in sources.found if one.startswith("data:image/jpeg")]
    records = [row for rows in audit["examples"].values() for row in rows]
    records += [row for sides in audit["samples"].values() for rows in sides.values() for row in rows]
    shown = {row["id"]: row["thumbnails"] for row in records if row["thumbnails"]}
    assert 4 <= sum(map(len, shown.values())) <= 12, "bounded in number"
    assert set(jpegs) == {jpeg for jpegs in shown.values() for jpeg in jpegs}
    assert max(map(len, shown.values())) <= THUMBNAILS and len(page) < 2**20
    assert {row["kept"] for row in rows_in(out) if row["id"] in shown} == {True, False}
    for jpeg in jpegs:
        with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
            assert max(picture.size) <= 96


@pytest.mark.slow  # 3 s
def test_impossible_settings_are_refused(tmp_path, refused):
    source = f"input={hostile(tmp_path / 'in', 2)}"
    cases = {
        (source, TILES, "prompt_key=a", "response_key=b"): "prompt_key=a: has no effect on documents with pictures",
        (source, TILES, "text_key=caption"): "text_key=caption: has no effect on documents with pictures",
        (source, TILES, "on_error=keep"): "on_error=keep: would keep documents whose pictures cannot be used; try drop",
        (source, TILES, "duplicates.pictures=12"): "duplicates.pictures=12: must be from 0 to 11; try 8",
        (source, "parts.text_key=caption"): "parts: has no effect without pictures; try +images={}",
        (source, TILES, "parts.parts_key=other"): "parts.text_key=text: documents.jsonl has the columns parts; name",
        (source, TILES, "action=stream"): "input=",
        (TILES, "action=stream"): "images=",
        ("step=3",): "step=3: lists the pictures of a step of a run: name the run",
        (source, "images={tiles: {tile_size: 9}}"): "images.tiles.tile_size=9: must be a multiple of 28",
    }
    for words, message in cases.items():
        assert message in refused("filter", *words, f"out={tmp_path / 'out'}"), words


def test_a_tar_that_ends_early_is_one_line(tmp_path, refused):
    (tmp_path / "photos.tar").write_bytes(b"photos/a.png".ljust(512, b"\0"))
    line = refused("filter", f"input={tmp_path / 'photos.tar'}", TILES, f"out={tmp_path / 'out'}")
    assert line.startswith(f"input={tmp_path / 'photos.tar'}: cannot be read: has no header of a tar member")


def test_the_command_repeats_the_filter():
    words = ["input=a", "+images={on_bad: drop, tiles: {max_tiles: 4}}", "parts.text_key=caption"]
    config = load("filter", FilterConfig, words)
    _, _, *again = shlex.split(command_of(config))
    assert load("filter", FilterConfig, again) == config != load("filter", FilterConfig, words[:1])


@pytest.mark.parametrize("key", ["dataset", "id_key", "domain_key", "messages_key"])
def test_keys_of_text_records_are_refused(key):
    given: dict[str, Any] = {"input": "a", "images": ImagesConfig(), key: "b"}
    if key == "dataset":
        del given["input"]
    with pytest.raises(ConfigError, match=rf"^{key}=b: has no effect on documents with pictures"):
        InputConfig(**given)
