"""Commands that cannot be meant: each ends with one line and a documented exit code, or does what it says.

commands.txt has a command a line. RUN, EXPORTED, FOLDER, OUT and IN stand for places. The quick test takes a part.
"""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.hostile.damage import fault, wrong
from tests.support.tiny import TINY

COMMANDS = (Path(__file__).parent / "commands.txt").read_text().splitlines()
SURROGATE = "\udcff"
MORE = [
    ["generate", "RUN", "prompt=" + "x " * 20_000, "tokens=2"],
    ["generate", "RUN", f"prompt={SURROGATE}", "tokens=2"],
    ["train", f"run.name={SURROGATE}"],
    ["train", "x" * 5_000],
    ["train", "run.name=" + "x" * 5_000],
    ["train", "run.name=x\ny"],
    ["train", "run.name=\x01"],
    ["train", "training=" + "[" * 3_000],
    ["train", "training=" + "{a:" * 500],
    ["report", "RUN", "out=/dev/full/x"],
    [SURROGATE],
]
PLACES = re.compile(r"\b(RUN|EXPORTED|FOLDER|OUT|IN)\b")


@pytest.fixture
def ended(command, finished, exported, small_corpus, tmp_path) -> Callable[[list[str]], str]:
    """Return a function that runs a command in a new folder and returns what is wrong with its end."""
    number = iter(range(10_000))

    def run(words: list[str]) -> str:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        (folder / "in.jsonl").write_text((json.dumps({"text": "a text of a document that is fine " * 10}) + "\n") * 60)
        places = {
            "RUN": finished,
            "EXPORTED": exported,
            "FOLDER": folder,
            "OUT": folder / "o",
            "IN": folder / "in.jsonl",
        }
        line = [PLACES.sub(lambda found: str(places[found[0]]), word) for word in words]
        if words[:1] == ["train"] and not any(word.startswith(("experiment=", "--")) for word in words):
            line[1:1] = [*TINY, *small_corpus, "training.steps=2", "evaluation.sequences=2"]
        wrong = fault(command(*line, cwd=folder, timeout_s=60))
        strange = {path.name for path in folder.iterdir()} - {"in.jsonl", "o", "runs", "report.html", "jobs"}
        return wrong or (f"leaves {sorted(strange)}" if strange else "")

    return run


def test_some_hostile_commands_end_in_one_line(ended):
    cases = [shlex.split(line) for line in COMMANDS if zlib.crc32(line.encode()) % 40 == 0]
    assert len(cases) > 8
    assert wrong((shlex.join(words)[:300], ended(words)) for words in cases) == []


@pytest.mark.slow
def test_every_hostile_command_ends_in_one_line(ended):
    cases = [*map(shlex.split, COMMANDS), *MORE]
    assert len(cases) > 500
    assert wrong((shlex.join(words)[:300], ended(words)) for words in cases) == []
