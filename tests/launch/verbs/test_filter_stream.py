"""`leviathan filter stream`: lines of standard input, decided as they arrive."""

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
from tests.support.filtering import FixedScorer, prose


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """Return `stream(lines, *words)`, which returns the exit code and the kept lines."""

    def run(lines, *words: str) -> tuple[int, list[bytes]]:
        lines = io.BytesIO(b"".join(lines)) if isinstance(lines, list) else lines
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
        code = main(["filter", "stream", f"out={tmp_path / 'out'}", *words])
        return code, (tmp_path / "out" / "kept.jsonl").read_bytes().splitlines()

    return run


def counts(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "stream.json").read_text())


def lines_of(rows) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def test_rates_hold_longer_lines_are_kept_and_bad_ones_counted(stream, tmp_path, capsys):
    rows = [{**row, "kind": "ab"[n % 2]} for n, row in enumerate(prose(1000))]
    bad = [b"{broken\n", b"\n", b'{"text": "short", "kind": "a"}\n', b'{"kind": "a"}\n']
    words = ["domain_key=kind", "unit=documents", "scorer.kind=length", "+select.domains.b=0.6", "keep=0.2"]
    code, kept = stream([*bad, *lines_of(rows)], *words)
    by = [sum(json.loads(line)["kind"] == kind for line in kept) for kind in "ab"]
    assert code == 0 and abs(by[0] - 100) <= 5 and abs(by[1] - 300) <= 5
    given = [line.rstrip() for line in lines_of(rows)]
    assert kept == [line for line in given if line in set(kept)], "the input's own lines in its order"
    sizes = [sum(map(len, part)) / len(part) for part in (kept, set(given) - set(kept))]
    assert sizes[0] > sizes[1] * 1.1
    found = counts(tmp_path)
    reasons = found["reasons"]
    assert found["lines"] == 1003 == sum(reasons.values()) and reasons["malformed"] == 2 and reasons["too_short"] == 1
    rate = len(kept) / (reasons["hard"] + reasons["easy"])
    assert found["rate"] == rate and found["kept"] == reasons["hard"] == len(kept)
    assert f"kept {len(kept)} of 1,003 lines ({rate:.2%} of the documents scored" in capsys.readouterr().out


def test_lines_are_decided_before_the_stream_ends(stream, tmp_path):
    """After an interrupt, the counts so far are written."""
    seen = []

    def interrupted():
        for number, row in enumerate(lines_of(prose(200))):
            if number in (100, 150):
                seen.append((tmp_path / "out" / "kept.jsonl").read_bytes().count(b"\n"))
            yield row
        raise KeyboardInterrupt

    code, kept = stream(interrupted(), "keep=0.5", "unit=documents", "scorer.kind=random")
    assert code == 130 and seen[0] > 20 and seen[1] > seen[0]
    assert counts(tmp_path)["lines"] == 192 and len(kept) == counts(tmp_path)["kept"]


def test_a_stream_drops_noise_and_evaluation_sets(stream, tmp_path):
    """The scorer is length, so noise is every line longer than all clean text."""
    rows, clean = prose(300), tmp_path / "clean.jsonl"
    clean.write_bytes(b"".join(lines_of(prose(50, seed=1, words=10))))
    (tmp_path / "known.jsonl").write_bytes(lines_of(rows)[7])
    words = ["scorer.kind=length", f"select.clean={clean}", f"+contamination.sets.mine={tmp_path / 'known.jsonl'}"]
    code, kept = stream(lines_of(rows), *words)
    longest = max(len(row["text"]) for row in prose(50, seed=1, words=10))
    found = counts(tmp_path)["reasons"]
    assert code == 0 and found["contaminated"] == 1 and found["noise"] > 20
    assert kept and all(len(json.loads(line)["text"]) <= longest for line in kept)


def test_a_model_trained_on_the_stream_is_rejected(stream, tmp_path, capsys, monkeypatch):
    def check_unseen(name, records):
        raise ConfigError("", name, f"was trained on these {len(records)}")

    scorer = SimpleNamespace(score=lambda records: np.zeros(len(records)))
    monkeypatch.setattr("launch.filter.run._scorer", lambda config, out: scorer)
    monkeypatch.setattr("launch.filter.run.MODELS", SimpleNamespace(check_unseen=check_unseen))
    assert stream(lines_of(prose(70)), "scorer.kind=loss", "scorer.model=a-run") == (2, [])
    assert "scorer.model=a-run: was trained on these 64" in capsys.readouterr().err


def test_an_empty_stream_has_a_whole_last_line(stream, tmp_path, capsys):
    assert stream([], "scorer.kind=random") == (0, [])
    assert "kept 0 of 0 lines (nothing was scored; keep=0.5)\n" in capsys.readouterr().out


def test_the_cost_of_the_first_lines_is_said(stream, tmp_path, capsys, monkeypatch):
    class Costly(FixedScorer):
        def cost(self, records) -> str:
            return f"{len(records())} requests"

    monkeypatch.setattr("launch.filter.run.make_scorer", lambda *given: Costly(lambda record: 1.0))
    assert stream(lines_of(prose(70)), "scorer.kind=random")[0] == 0
    assert capsys.readouterr().out.splitlines()[0] == "the first 64 records: 64 requests"


def test_an_existing_output_is_not_overwritten(stream, tmp_path, capsys):
    code, kept = stream(lines_of(prose(70)), "scorer.kind=random")
    assert code == 0 and stream([], "scorer.kind=random") == (2, kept)
    assert "already holds kept.jsonl: choose another out=" in capsys.readouterr().err
    broken = ["scorer.kind=random", "on_error=fail", f"out={tmp_path / 'other'}"]
    assert stream([b"{\n"], *broken)[0] == 2
    assert "input=-:1: cannot be read: " in capsys.readouterr().err
