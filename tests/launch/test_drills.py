"""Kills at random moments, lost folders, full and read-only disks, a clock that jumps: the losses stay the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.drills import STEPS, TWO_RANKS, ended, figures, has_step, kill_started, ranks_of, start, wait_for

pytestmark = pytest.mark.slow
KILLS = 20


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    kill_started()


@pytest.fixture(scope="module")
def words(small_corpus) -> list[str]:
    return [*small_corpus, *TWO_RANKS, "run.name=x", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> dict[int, tuple[float, float]]:
    """Return the losses and gradient norms of a run that nothing disturbs, by step."""
    root = tmp_path_factory.mktemp("undisturbed")
    ended(start(words, root))
    return figures(root / "runs" / "x")


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a memory disk with the given options, or remounts it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", "remount"] if os.path.ismount(place) else []
        line = ["mount", "-t", "tmpfs", *again, "-o", options, "tmpfs", str(place)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_twenty_kills_at_random_moments_change_nothing(words, undisturbed, tmp_path):
    """The moments fall into steps and saves alike: a checkpoint is saved every third step."""
    draw, run = random.Random(0), tmp_path / "runs" / "x"
    process = start([*words, f"launch.restarts={KILLS}"], tmp_path)
    for number in range(KILLS):
        wait_for(has_step(run, 4 * number + 1), process)
        time.sleep(draw.uniform(0, 0.3))
        killed = ranks_of(process)
        os.kill(draw.choice(killed), signal.SIGKILL)
        wait_for(lambda killed=killed: len(new := ranks_of(process)) == 2 and not {*new} & {*killed}, process)
    errors = ended(process)
    assert errors.count("was ended by SIGKILL") >= KILLS
    assert figures(run) == undisturbed and len(undisturbed) == STEPS


def test_a_killed_launcher_is_started_again_and_nothing_changes(words, undisturbed, tmp_path):
    run = tmp_path / "runs" / "x"
    for step in (10, 40, 70):
        process = start([*words, "launch.restarts=1"], tmp_path)
        wait_for(has_step(run, step), process)
        process.kill()
        process.wait()
    ended(start([*words, "launch.restarts=1"], tmp_path))  # waits for the lock that the last ranks still hold
    assert figures(run) == undisturbed


@pytest.mark.parametrize("lost", ["checkpoints", "logs", "."])
def test_a_folder_removed_while_it_runs_is_one_line_at_most(words, undisturbed, tmp_path, lost):
    run = tmp_path / "runs" / "x"
    process = start(words, tmp_path)
    wait_for(has_step(run, 30), process)
    os.rename(run / lost, tmp_path / "gone")  # removing it file by file would race with the run
    output, errors = process.communicate(timeout=240)
    assert process.returncode in (0, 1) and "Traceback" not in output + errors
    assert sum(line.startswith("leviathan: error:") for line in errors.splitlines()) == process.returncode, errors
    if process.returncode == 0:
        assert [figure for step, figure in figures(run).items() if step > 31] == list(undisturbed.values())[31:]


def test_a_full_disk_is_told_and_nothing_is_lost(words, undisturbed, disk):
    """A checkpoint of this model has 1.4 MB. The disk fills up, and is then enlarged."""
    root = disk("size=12m")
    filler = root / "filler"
    process = start([*words, f"run.root={root}"], root.parent)
    wait_for(has_step(root / "x", 20), process)
    with suppress(OSError):
        filler.write_bytes(b"0" * 12_000_000)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and "no space" in (output + errors).lower() and "Traceback" not in output + errors
    filler.unlink(missing_ok=True)
    disk("size=100m")
    ended(start([*words, f"run.root={root}"], root.parent))
    kept = figures(root / "x")
    assert kept and {step: undisturbed[step] for step in kept} == kept and STEPS in kept
    assert json.loads((root / "x" / "summary.json").read_text())["steps"] == STEPS


def test_a_disk_that_turns_read_only_is_told_and_nothing_is_lost(words, undisturbed, disk):
    """Only checkpoints are on that disk: while a file on it is open for writing, it cannot be remounted."""
    root = disk("size=100m")
    run, elsewhere = root.parent / "runs" / "x", f"checkpoint.directory={root}"
    process = start([*words, elsewhere], root.parent)
    wait_for(has_step(run, 20), process)
    wait_for(
        lambda: not subprocess.run(["mount", "-o", "remount,ro", str(root)], capture_output=True).returncode, process
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and "read-only" in (output + errors).lower() and "Traceback" not in output + errors
    disk("rw,size=100m")
    ended(start([*words, elsewhere], root.parent))
    assert figures(run) == undisturbed


CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_JUMP"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}
time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}
"""


def test_a_clock_that_jumps_changes_nothing(words, undisturbed, tmp_path, monkeypatch):
    """The wall clock of the agent and its ranks jumps by days, forward and back, while the run trains and saves."""
    (tmp_path / "clock.c").write_text(CLOCK)
    jump, library = tmp_path / "jump", tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c")], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_JUMP", str(jump))
    process = start([*words, "parallel.timeout_s=20"], tmp_path)
    run = tmp_path / "runs" / "x"
    for step, days in ((10, 3), (35, -3), (60, 365), (80, 0)):
        wait_for(has_step(run, step), process)
        jump.write_text(str(days * 86400))
    assert "restarting" not in ended(process)
    assert figures(run) == undisturbed
    days = {line.split()[0] for line in (run / "log.txt").read_text().splitlines()}
    assert len(days) >= 3, "control: the processes have seen the jumps"
    rates = [
        json.loads(line).get("tokens_per_second", 1.0) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 < rate < 1e9 for rate in rates)
