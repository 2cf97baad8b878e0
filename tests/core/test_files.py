from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.files import (
    append_text,
    check_target,
    misfit,
    new_directory,
    sha256_file,
    sha256_text,
    write_bytes,
    write_text,
)

SHAPE = {"step": int, "loss?": (float, None), "hosts": [str], "sizes": {"all": int, str: float}, "any": object}
FITS = {"step": 1, "loss": None, "hosts": ["a"], "sizes": {"all": 1, "b": 0.5}, "any": [{}]}
MISFITS = {
    "it is not an object with keys and values": [],
    "it has no 'step'": {key: value for key, value in FITS.items() if key != "step"},
    "step is not a whole number": {**FITS, "step": True},
    "loss is not a number": {**FITS, "loss": 1 << 63},
    "hosts is not a list": {**FITS, "hosts": "a"},
    "hosts.1 is not text": {**FITS, "hosts": ["a", "\ud800"]},
    "sizes.all is not a whole number": {**FITS, "sizes": {"all": 0.5}},
    "sizes.b is not a number": {**FITS, "sizes": {"all": 1, "b": None}},
    "a key is not text": {**FITS, "sizes": {"all": 1, "\udfff": 1}},
}


@pytest.mark.parametrize("problem", MISFITS)
def test_a_value_of_another_shape_is_described(problem):
    assert misfit(MISFITS[problem], SHAPE) == problem
    assert misfit(FITS, SHAPE) == "" == misfit({**FITS, "more": 1}, SHAPE)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "d") as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "d") as scratch:
        (scratch / "whole").write_text("x")
        assert not (tmp_path / "d").exists()
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["whole"]


def test_a_race_for_the_same_directory_keeps_the_first(tmp_path):
    with new_directory(tmp_path / "d") as scratch:
        (scratch / "x").write_text("second")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "x").write_text("first")
    assert (tmp_path / "d" / "x").read_text() == "first"


@pytest.mark.parametrize("appears", ["directory", "file"])
def test_exclusive_work_is_kept_where_the_name_is_taken(tmp_path, appears):
    path, refused = tmp_path / "d", pytest.raises(ConfigError, match=r"appeared while it was being made.*work is in")
    with refused as caught, new_directory(path, exclusive=True) as scratch:
        (scratch / "x").write_text("second")
        if appears == "directory":
            path.mkdir()
        (path / "x" if appears == "directory" else path).write_text("first")
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (path / "x" if appears == "directory" else path).read_text() == "first"
    assert (kept / "x").read_text() == "second"
    assert sorted(tmp_path.iterdir()) == sorted([path, kept])


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 500_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 500_000).hexdigest()
    assert sha256_text("ab", "c") != sha256_text("a", "bc")


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_bytes(pipe, b"nobody reads"), lambda: append_text(pipe, "nobody reads")):
        signal.alarm(5)  # to wait for a reader would be for ever
        with pytest.raises(OSError, match="No such device"):
            write()
        signal.alarm(0)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"text")
    assert os.read(reader, 10) == b"text" and not pipe.is_file()
    os.close(reader)
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "link", b"text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path / "folder", b"text")


def test_a_place_for_results_is_checked_before_the_work(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for name, reason in {
        "config.yaml": "must end in .json",
        "x": "must end in .json",
        "folder.json": "is a folder",
        "none/x.json": "does not exist; make it",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            check_target("out", str(tmp_path / name), ".json")
    check_target("out", str(tmp_path / "x.json"), ".json")
    check_target("out", "/dev/null", ".json")
