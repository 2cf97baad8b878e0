"""The verb `curate`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    lines = [json.dumps({"caption": text, "image": "a.png"}) for text in ("a cat", "a dog, asleep", "")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n{")
    (tmp_path / "metadata.txt").write_text("cat\ndog\nU.S.\n")
    return tmp_path


WORDS = ["curate", "input=pairs.jsonl", "metadata=metadata.txt", "parts.text_key=caption"]


def test_it_writes_kept_pairs_and_prints_the_balance(pairs, capsys):
    assert main(WORDS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kept 2 of 4 records: balanced 0, unmatched 0, empty 1,") and "malformed 1" in lines[0]
    assert lines[2:4] == [
        "warning: entries that no caption can match: 1; captions have spaces around , . ; : ? ! `, so entries need them too",
        "warning: pairs.jsonl:4: is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ]
    assert sorted(path.name for path in (pairs / "curated").iterdir()) == [
        "audit.json",
        "balance.png",
        "entries.parquet",
        "kept",
    ]


@pytest.mark.parametrize(
    "word, message",
    [
        ("out=.", "out=.: exists already"),
        ("input=none", "input=none: no such file or folder"),
        ("metadata=none.txt", "metadata=none.txt: cannot be read: No such file"),
        ("parts.text_key=text", "parts.text_key=text: pairs.jsonl has the columns caption, image"),
        ("t=0", "t=0: must be positive"),
        ("launch=slurm", "launch.kind=slurm"),
    ],
)
def test_useless_settings_are_one_line(pairs, capsys, word, message):
    assert main([*WORDS, word]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert not list(pairs.glob("*curated*"))
