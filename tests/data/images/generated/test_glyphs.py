"""Pictures of characters: pure functions of a number, visible, whole and rightly named."""

from __future__ import annotations

import io
import unicodedata

import numpy as np
import pytest
from PIL import Image

from core.config import build
from core.errors import ConfigError
from data.config import DataConfig
from data.corpus import prepare
from data.images.generated import glyphs, sources
from data.images.generated.glyphs import GlyphConfig, glyph
from data.images.generated.sources import Glyphs
from data.images.parts import ImagePart


def drawn(png: bytes) -> np.ndarray:
    """Return which pixels differ from the background, the most frequent colour."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    background = max(picture.getcolors(1 << 20))[1]
    return (np.asarray(picture) != background).any(axis=2)


def test_a_glyph_is_a_function_of_seed_and_number():
    config = GlyphConfig()
    many = [glyph(number, config) for number in range(-20, 40)]
    assert many == [glyph(number, config) for number in range(-20, 40)]
    assert len({png for png, _ in many}) == len(many)
    assert glyph(3, config) != glyph(3, GlyphConfig(seed=1))


def test_glyphs_are_seen_and_named():
    for number in range(60):
        png, name = glyph(number, GlyphConfig(size=56))
        assert Image.open(io.BytesIO(png)).size == (56, 56)
        assert unicodedata.lookup(name) and drawn(png).sum() > 4, name
    blank = io.BytesIO()
    Image.new("RGB", (56, 56)).save(blank, "PNG")
    assert not drawn(blank.getvalue()).any()  # control


def test_the_name_is_that_of_the_picture(monkeypatch):
    """A square fills its bounding box and a disc pi / 4 of it. Control: the two differ, so exchanged names would fail."""
    face = next(path for path, _ in glyphs._characters() if path.name == "DejaVuSans.ttf")
    monkeypatch.setattr(
        glyphs, "_characters", lambda: [(face, ord("\N{BLACK SQUARE}")), (face, ord("\N{BLACK CIRCLE}"))]
    )
    for number in range(40):
        png, name = glyph(number, GlyphConfig())
        seen = drawn(png)
        box = seen[seen.any(axis=1)][:, seen.any(axis=0)]
        assert abs(box.mean() - {"BLACK SQUARE": 1, "BLACK CIRCLE": np.pi / 4}[name]) < 0.08


def test_fonts_without_shapes_of_their_own_are_left_out():
    faces = {path.name for path, _ in glyphs._characters()}
    assert "DejaVuSans.ttf" in faces and not any("LastResort" in name for name in faces)
    codes = {code for _, code in glyphs._characters()}
    assert ord("\N{SNOWMAN}") in codes and not codes & {ord(" "), ord("\N{COMBINING GRAVE ACCENT}"), 0}
    assert ord("\N{BRAILLE PATTERN BLANK}") not in codes


def test_glyphs_are_a_source_of_documents(tmp_path, monkeypatch):
    source = Glyphs(12, size=32)
    for number, document in enumerate(source.documents()):
        png, name = glyph(number, GlyphConfig(size=32))
        assert document.parts == (ImagePart(png, f"glyph {number}"), name)
    kind = {"kind": "data.images.generated.sources:Glyphs", "options": {"number": 12, "size": 32}}
    settings = {"images": {"tiles": {"tile_size": 32, "patch_size": 4}}, "tokenizer": {"vocab_size": 300}}
    config = build(DataConfig, {**settings, "sources": {"glyphs": kind}, "cache": str(tmp_path), "held_out": 0.3})
    corpus = prepare(config, lambda line: None)
    counts = [split["counts"].get("pictures", 0) for split in corpus.manifest["sources"]["glyphs"].values()]
    assert sum(counts) == 12 and min(counts) > 0
    prints = {Glyphs(12, size=32).fingerprint(), Glyphs(13, size=32).fingerprint(), Glyphs(12, size=33).fingerprint()}
    assert source.fingerprint() in prints and len(prints) == 3
    monkeypatch.setattr(sources, "version", lambda package: "0")
    assert source.fingerprint() not in prints


def test_a_size_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r"^size=2: must be from 16 to 1024 pixels$"):
        GlyphConfig(size=2)
