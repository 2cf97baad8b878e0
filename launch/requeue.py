"""What a SLURM job does when its step is over: `python -m launch.requeue FOLDER CODE`, the batch script's last line.

A run that was warned (time limit, preemption) is queued again, and so is one that failed, a few times; nodes that the
doctor or a hang named are left out. A run that reaches no new checkpoint between tries ends instead: queued for ever,
it would only burn hours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.node import CANCELLED, FAILED_NODE, FINAL, WARNED

MOST_WARNED = 3  # a run that is warned before it has saved anything new, as often as this, never will


@dataclass(frozen=True)
class Decision:
    """`exit_code` None: queue again, without the nodes in `exclude`."""

    exit_code: int | None
    why: str
    exclude: tuple[str, ...] = ()


def decide(code: int, history: dict[str, Any], step: int, most: int, bad_nodes: tuple[str, ...]) -> Decision:
    """`history`: what the tries before left (`step`, `fruitless`). `step`: the newest checkpoint's. `most`: tries in a
    row that may fail without progress.
    """
    fruitless = 0 if step > history.get("step", -1) else history.get("fruitless", 0) + 1
    excluded = tuple(sorted({*history.get("excluded", ()), *bad_nodes}))
    if code == 0:
        return Decision(0, "done")
    if code == CANCELLED:
        return Decision(CANCELLED, "cancelled after saving")
    if code == FAILED_NODE and bad_nodes:
        return Decision(None, f"queued again without {', '.join(bad_nodes)}", excluded)
    if code in (WARNED, 128 + signal.SIGUSR1):
        if fruitless >= MOST_WARNED:
            return Decision(1, f"{fruitless} tries reached no new checkpoint: ask for more time (launch.slurm.time)")
        return Decision(None, f"queued again, to go on from step {step}", excluded)
    if FINAL < code < CANCELLED:
        return Decision(code - FINAL, "not queued again: the same error would come again")
    if fruitless > most:
        return Decision(1, f"not queued again: {fruitless} tries in a row reached no new checkpoint")
    return Decision(None, f"failed ({code}); queued again, to go on from step {step}", excluded)


def main(arguments: list[str]) -> int:
    """Queue this job again or end it; returns the job's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asking for another try ends this one; scontrol inherits this
    folder, code = Path(arguments[0]), int(arguments[1])
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    from core.config import build
    from core.files import write_json
    from launch.settings import LaunchConfig
    from train.run_directory import RunDirectory, committed, read_config

    config = read_config(folder / f"config-{task}.yaml")
    run = RunDirectory.of(config)
    step = max((step for step, _ in committed(run.checkpoints)), default=-1)
    path = folder / f"requeue-{task}.json"
    history = json.loads(path.read_text()) if path.exists() else {}
    most = build(LaunchConfig, config.launch, "launch").slurm.requeues
    decision = decide(code, history, step, most, _bad_nodes(folder, run.logs, history.get("time", 0.0)))
    print(f"leviathan: {decision.why}", flush=True)
    if decision.exit_code is not None:
        return decision.exit_code
    fruitless = 0 if step > history.get("step", -1) else history.get("fruitless", 0) + 1
    write_json(path, {"step": step, "fruitless": fruitless, "excluded": list(decision.exclude), "time": time.time()})
    return _queue_again(decision.exclude)


def _bad_nodes(folder: Path, logs: Path, since: float) -> tuple[str, ...]:
    """Nodes named by the doctor of this try, and by hangs since the last one."""
    found: set[str] = set()
    doctor = folder / "doctor" / "findings.json"
    if doctor.exists():
        findings = json.loads(doctor.read_text())
        found.update(findings["bad_nodes"] if findings["time"] > since else ())
    hangs = logs / "hangs.jsonl"
    for line in hangs.read_text().splitlines() if hangs.exists() else ():
        hang = json.loads(line)
        if hang["time"] > since:
            found.update(hang["hosts"])
    return tuple(sorted(found))


def _queue_again(exclude: tuple[str, ...]) -> int:
    """The same job, at once: SLURM would wait for two minutes, and takes other nodes only once the job pends."""
    job = os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"leviathan: error: SLURM does not queue it again: {done.stderr.strip()}", file=sys.stderr)
        return 1
    update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
    if exclude:
        update.append(f"ExcNodeList={','.join(exclude)}")
    done = subprocess.run(update, capture_output=True, text=True)
    if done.returncode:
        print(f"leviathan: {done.stderr.strip()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
