"""One file that several ranks read in ranges, killed twice by SIGKILL: the bytes are those of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from data.filter import pipeline, runs
from data.filter.input import readers
from data.filter.pipeline import Filter
from tests.data.filter.threads import ThreadWorker, on_threads
from tests.support.filtering import job, outputs, prose, write_outputs

RECORDS = 500


def write_repeated(path: Path) -> Path:
    """Write records of which some repeat earlier ones exactly or nearly."""
    chance, rows = random.Random(5), prose(RECORDS, words=40)
    for row in range(10, RECORDS, 5):
        words = rows[chance.randrange(row)]["text"].split()
        rows[row]["text"] = " ".join(words[: len(words) - row % 3])
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def filter_in_ranges(count: int, source: Path, out: Path) -> None:
    """Filter on `count` threads, with small shards, ranges, blocks and ranges of keys."""

    def work(worker: ThreadWorker) -> Filter:
        done = Filter(job(source, out, worker))
        done.run()
        return done

    with (
        patch.object(pipeline, "SHARD_RECORDS", 40),
        patch.object(readers, "_RANGE_BYTES", 10_000),
        patch.object(runs, "BLOCK_RECORDS", 100),
        patch.object(runs, "RANGE_ENTRIES", 3000),
    ):
        write_outputs(on_threads(count, work)[0], out)


def stored(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in (out / "stages").rglob("[!.]*.*")}
    return files | outputs(out)


def killed(command: list[str], stages: Path, files: int) -> int:
    """Run a command and kill it once the folder has `files` files. Return their number afterwards."""
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if len(list(stages.rglob("[!.]*.*"))) >= files:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
    return len(list(stages.rglob("[!.]*.*")))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Return an input and what one process that is not killed makes of it."""
    root = tmp_path_factory.mktemp("given")
    source = write_repeated(root / "in.jsonl")
    filter_in_ranges(1, source, root / "whole")
    return source, stored(root / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_two_kills_change_no_byte(tmp_path, given, count):
    (source, whole), chance = given, random.Random()
    reasons = json.loads(whole["audit.json"])["reasons"]
    assert reasons["duplicate"]["documents"] > 10 and reasons["near_duplicate"]["documents"] > 10
    out, kills = tmp_path / "out", sorted(chance.sample(range(5, 70), 2))
    command = [sys.executable, "-m", "tests.data.filter.test_kills", f"{count}", str(source), str(out)]
    for files in kills:
        assert files <= killed(command, out / "stages", files)
        assert not (out / "audit.json").exists(), "it was killed before it was done"
    subprocess.run(command, check=True)
    assert stored(out) == whole, f"killed at {kills} files"


if __name__ == "__main__":
    filter_in_ranges(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
