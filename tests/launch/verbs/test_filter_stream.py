"""`leviathan filter stream`: lines of standard input, decided as they come."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from core.errors import ConfigError
from launch.cli import main
from tests.support.filtering import prose


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """`stream(lines, *words)`: exit code, and the lines that stay."""

    def run(lines, *words: str) -> tuple[int, list[bytes]]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
        code = main(["filter", "stream", f"out={tmp_path / 'out'}", *words])
        return code, (tmp_path / "out" / "kept.jsonl").read_bytes().splitlines()

    return run


def counts(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "stream.json").read_text())


def lines_of(rows) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def test_the_rate_is_held_and_what_stays_is_the_longer(stream, tmp_path, capsys):
    rows = prose(1000)
    code, kept = stream(io.BytesIO(b"".join(lines_of(rows))), "keep=0.3", "unit=documents", "scorer.kind=length")
    assert code == 0 and abs(len(kept) - 300) <= 5
    given = [line.rstrip() for line in lines_of(rows)]
    assert kept == [line for line in given if line in set(kept)], "the input's own lines in its order"
    sizes = [sum(map(len, part)) / len(part) for part in (kept, set(given) - set(kept))]
    assert sizes[0] > sizes[1] * 1.2
    told = counts(tmp_path)
    assert told["lines"] == 1000 == sum(told["reasons"].values()) and told["kept"] == len(kept)
    rate = len(kept) / (told["reasons"]["hard"] + told["reasons"]["easy"])
    assert told["rate"] == rate and told["reasons"]["hard"] == len(kept)
    assert f"kept {len(kept)} of 1,000 lines ({rate:.2%} of the documents scored" in capsys.readouterr().out


def test_malformed_records_are_counted_and_domains_have_rates(stream, tmp_path):
    rows = [{**row, "kind": "ab"[n % 2]} for n, row in enumerate(prose(400))]
    bad = [b"{broken\n", b"\n", b'{"text": "short", "kind": "a"}\n', b'{"kind": "a"}\n']
    words = ["domain_key=kind", "unit=documents", "scorer.kind=random", "+select.domains.b=0.9", "keep=0.2"]
    code, kept = stream(io.BytesIO(b"".join([*bad, *lines_of(rows)])), *words)
    by = [sum(json.loads(line)["kind"] == kind for line in kept) for kind in "ab"]
    assert code == 0 and abs(by[0] - 40) <= 2 and abs(by[1] - 180) <= 2
    told = counts(tmp_path)
    assert told["lines"] == 403 and told["reasons"]["malformed"] == 2 and told["reasons"]["too_short"] == 1


def test_lines_are_decided_before_the_stream_ends(stream, tmp_path):
    """And where it is interrupted, what was decided is told."""
    rows, seen = lines_of(prose(200)), []

    def endless():
        for number, row in enumerate(rows):
            if number in (100, 150):
                seen.append((tmp_path / "out" / "kept.jsonl").read_bytes().count(b"\n"))
            yield row
        raise KeyboardInterrupt

    code, kept = stream(endless(), "keep=0.5", "unit=documents", "scorer.kind=random")
    assert code == 130 and seen[0] > 20 and seen[1] > seen[0]
    assert counts(tmp_path)["lines"] == 192 and len(kept) == counts(tmp_path)["kept"]


def test_noise_and_evaluation_sets_are_left_out_of_a_stream(stream, tmp_path):
    """By length: what is longer than clean text ever is."""
    rows, clean = prose(300), tmp_path / "clean.jsonl"
    clean.write_bytes(b"".join(lines_of(prose(50, seed=1, words=10))))
    (tmp_path / "known.jsonl").write_bytes(lines_of(rows)[7])
    words = ["scorer.kind=length", f"select.clean={clean}", f"+contamination.sets.mine={tmp_path / 'known.jsonl'}"]
    code, kept = stream(io.BytesIO(b"".join(lines_of(rows))), *words)
    longest = max(len(row["text"]) for row in prose(50, seed=1, words=10))
    told = counts(tmp_path)["reasons"]
    assert code == 0 and told["contaminated"] == 1 and told["noise"] > 20
    assert kept and all(len(json.loads(line)["text"]) <= longest for line in kept)


def test_a_model_that_has_learnt_the_stream_is_refused(stream, tmp_path, capsys, monkeypatch):
    def check_unseen(name, records):
        raise ConfigError("", name, f"was trained on these {len(records)}")

    scorer = SimpleNamespace(score=lambda records: np.zeros(len(records)))
    monkeypatch.setattr("launch.verbs.filter._scorer", lambda config, out: scorer)
    monkeypatch.setattr("launch.verbs.filter.MODELS", SimpleNamespace(check_unseen=check_unseen))
    lines = io.BytesIO(b"".join(lines_of(prose(70))))
    assert stream(lines, "scorer.kind=loss", "scorer.model=a-run") == (2, [])
    assert "scorer.model=a-run: was trained on these 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "scorer.kind=ngram: needs all records before it scores one, and a stream has no end; try loss, judge,"),
        (["scorer.kind=random", "input=a.jsonl"], "input=a.jsonl: does not apply to filter stream, which reads lines"),
        (["scorer.kind=random", "processes=2"], "processes=2: does not apply to filter stream, which reads lines"),
        (["scorer.kind=random", "select.floor=2"], "select.floor=2: a stream has no number of records to fill up"),
        (["scorer.kind=random", "prompt_key=q"], "response_key: prompt_key and response_key go together"),
    ],
)
def test_what_a_stream_cannot_follow_is_refused(words, message, tmp_path, capsys):
    assert main(["filter", "stream", *words, f"out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"leviathan: error: {message}") and not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_overwritten(stream, tmp_path, capsys):
    lines = lines_of(prose(70))
    assert stream(io.BytesIO(b"".join(lines)), "scorer.kind=random")[0] == 0
    before = (tmp_path / "out" / "kept.jsonl").read_bytes()
    assert stream(io.BytesIO(b""), "scorer.kind=random")[0] == 2
    assert "holds kept.jsonl already: choose another out=" in capsys.readouterr().err
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == before
    broken = ["scorer.kind=random", "on_error=fail", f"out={tmp_path / 'other'}"]
    assert stream(io.BytesIO(b"{\n"), *broken)[0] == 2
    assert "input=-:1: cannot be read: " in capsys.readouterr().err
