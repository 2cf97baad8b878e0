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
    "sweep": ["metap", "sweep", *tiny.TINY, *LONG[:1], "hparam=none", "sweep.processes=2", "sweep.seeds=1"],
}


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


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_launcher_leaves_no_process(small_corpus, tmp_path, verb):
    if verb == "evaluate":
        assert (
            main(["train", *tiny.TINY, *small_corpus, *LONG, "training.steps=1", f"run.root={tmp_path / 'runs'}"]) == 0
        )
    if verb in ("filter", "evaluate"):
        line = json.dumps({"text": "a line of text that is long enough to be kept by the gates " * 40})
        (tmp_path / "records.jsonl").write_text((line + "\n") * 60_000)
    words = [*VERBS[verb], *(small_corpus if verb in ("train", "sweep") else [])]
    mark = uuid.uuid4().hex
    command = [str(Path(sys.executable).parent / "leviathan"), *words]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    try:
        assert until(lambda: len(marked(mark)) >= 3, 90), (tmp_path / "log").read_text()
        time.sleep(5)
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        launcher.kill()
        launcher.wait()
        assert until(lambda: not marked(mark), 10), [process.cmdline() for process in marked(mark)]
    finally:
        for process in [launcher, *marked(mark)]:
            process.kill()
