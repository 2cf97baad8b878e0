"""A launcher that is killed by SIGKILL leaves no process of ours behind, whichever verb it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from launch.cli import main
from tests.support import tiny

MARK = "LEVIATHAN_TEST_MARK"
LONG = ["training.steps=100000", "run.name=x", "evaluation.sequences=1"]
VERBS = {
    "train": ["train", *tiny.TINY, *LONG, "launch=torchrun", "launch.processes=2"],
    "filter": ["filter", "input=records.jsonl", "processes=2", "out=filtered"],
    "evaluate": ["evaluate", "runs/x", "text=records.jsonl", "launch=torchrun", "launch.processes=2"],
    "certify": ["certify", "ranks=2", "parallel.dp_shard=2", "steps=20"],
    "doctor": ["doctor", "ranks=2"],
    "sweep": ["metap", "sweep", *tiny.TINY, *LONG[:1], "hparam=none", "sweep.processes=2", "sweep.seeds=1"],
}

STARTING = [("doctor", 1), ("train", 0), ("evaluate", 0), ("doctor", 0)]
"""Verbs that are killed while their ranks are still starting, and the seconds before that."""

PROCESSES = {"certify": 5, "sweep": 4}
"""Verbs whose two ranks come with processes of `multiprocessing`: how many there are with the launcher."""


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def assert_a_kill_leaves_nothing(command: list[str], cwd: Path, pause_s: float = 5, processes: int = 3) -> None:
    """Kill the first process of a command some seconds after it has two others, and check that all end within 10 s."""
    mark, log = uuid.uuid4().hex, cwd / "log"
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        launcher = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file)
    try:
        assert until(lambda: len(marked(mark)) >= processes, 90), log.read_text()
        time.sleep(pause_s)
        assert launcher.poll() is None, log.read_text()
        launcher.kill()
        launcher.wait()
        assert until(lambda: not marked(mark), 10), [process.cmdline() for process in marked(mark)]
    finally:
        for process in [launcher, *marked(mark)]:
            process.kill()


POOL = """
import time
from launch.rank_pool import Pool

if __name__ == "__main__":
    Pool()(2, time.sleep, 60)
"""


@pytest.mark.slow
def test_a_killed_pool_leaves_no_process(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    assert_a_kill_leaves_nothing([sys.executable, "pool.py"], tmp_path, processes=5)


@pytest.mark.slow
def test_the_check_notices_a_process_that_lives_on(tmp_path):
    sleeper = "import subprocess, time; [subprocess.Popen(['sleep', '60']) for _ in range(2)]; time.sleep(60)"
    with pytest.raises(AssertionError, match="sleep"):
        assert_a_kill_leaves_nothing([sys.executable, "-c", sleeper], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("verb, pause_s", [*((verb, 5) for verb in VERBS if verb != "doctor"), *STARTING])
def test_a_killed_launcher_leaves_no_process(small_corpus, tmp_path, verb, pause_s):
    if verb == "evaluate":
        assert (
            main(["train", *tiny.TINY, *small_corpus, *LONG, "training.steps=1", f"run.root={tmp_path / 'runs'}"]) == 0
        )
    if verb in ("filter", "evaluate"):
        line = json.dumps({"text": "a line of text that is long enough to be kept by the gates " * 40})
        (tmp_path / "records.jsonl").write_text((line + "\n") * 60_000)
    words = [*VERBS[verb], *(small_corpus if verb in ("train", "sweep") else [])]
    assert_a_kill_leaves_nothing(
        [str(Path(sys.executable).parent / "leviathan"), *words], tmp_path, pause_s, PROCESSES.get(verb, 3)
    )
