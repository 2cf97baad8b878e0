"""Digests of documents of parts, and the checks of their configuration."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from core.errors import ConfigError
from data.images.parts import BadRecord, ImagePart, PartsConfig, PartsDocument, VideoPart

PICTURE = ImagePart(b"picture", "a.png")


def document(*parts: Any, name: str = "a.jsonl:1") -> PartsDocument:
    return PartsDocument(name, parts)


def test_digest_is_of_contents_not_names():
    renamed = document(ImagePart(b"picture", "b.png"), "text", name="other:2")
    assert renamed.digest == document(PICTURE, "text").digest


@pytest.mark.parametrize(
    "other",
    [
        document("text", PICTURE),
        document(ImagePart(b"picturE", "a.png"), "text"),
        document(VideoPart(b"picture", "a.png"), "text"),
        document(PICTURE, "te", "xt"),
        document("picture", "text"),
        document(PICTURE, "text", PICTURE),
        document(ImagePart(b"picturetext", "a.png")),
        document(),
    ],
    ids=["order", "bytes", "kind", "cut", "text", "twice", "joined", "nothing"],
)
def test_digest_tells_documents_apart(other):
    assert other.digest != document(PICTURE, "text").digest


def test_image_digests_are_of_bytes_in_order():
    video = VideoPart(b"video", "v.mp4")
    expected = tuple(hashlib.sha256(data).hexdigest() for data in (b"video", b"picture", b"picture"))
    assert document(video, "text", PICTURE, PICTURE).image_digests == expected
    assert document("text").image_digests == ()


def test_text_has_no_placeholders():
    assert document("See", PICTURE, "this <image>").text == "See\nthis <image>"
    assert document(PICTURE).text == ""


def test_a_bad_record_is_one_printable_line():
    assert str(BadRecord("a.jsonl:3", "is\nbad \x1b[31m")) == r"a.jsonl:3: is bad \x1b[31m"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_key": ""}, "text_key=''?: must name a column"),
        ({"image_key": "text"}, "image_key=text: is the column of text_key too"),
        ({"texts_key": "images"}, "texts_key=images: is the column of images_key too"),
        ({"marker": ""}, "marker=(''|): must not be empty"),
        ({"largest_bytes": 0}, "largest_bytes=0: must be at least 1"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message.replace("''?", "(''|)")):
        PartsConfig(**keys)
