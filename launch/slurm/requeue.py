"""Decide whether a SLURM job runs again: `python -m launch.slurm.requeue FOLDER CODE`, near the batch script's end.

A run that was warned (time limit, preemption) is queued again, and so is one that failed, a few times; nodes that the
doctor or a hang named, or that were steadily slow to the end of the try, are left out where SLURM says that the job can
run on the others. A run that reaches no new checkpoint between tries ends instead: queued for ever, it would only burn
hours. SLURM is asked by the batch script itself, which runs what this program writes down: in a container there is no
SLURM to ask.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm.job_step import CANCELLED, FAILED_NODE, FINAL, WARNED

AGAIN = 75
"""Exit code: the batch script shall run again-TASK.sh."""
MOST_WARNED = 3  # a run that is warned before it has saved anything new, as often as this, never will
CANCEL = "cancelled"
"""A file of this name in a job's folder: `leviathan jobs cancel` was here."""


@dataclass(frozen=True)
class RequeueState:
    """What is kept from try to try: the newest checkpoint's step, how many tries in a row have not got beyond it, and
    the nodes that are to be left out: wrong ones, and slow ones, which are better than none.
    """

    step: int = -1
    fruitless: int = 0
    excluded: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    def after(self, step: int, bad_nodes: tuple[str, ...], slow_nodes: tuple[str, ...] = ()) -> RequeueState:
        fruitless = 0 if step > self.step else self.fruitless + 1
        excluded, slow = {*self.excluded, *bad_nodes}, {*self.slow, *slow_nodes}
        return RequeueState(step, fruitless, tuple(sorted(excluded)), tuple(sorted(slow - excluded)))

    def wishes(self, configured: list[str]) -> list[list[str]]:
        """Lists of nodes to leave out, the best first; `configured` are left out anyway."""
        wrong = sorted({*configured, *self.excluded})
        lists = [sorted({*wrong, *self.slow}), wrong]
        return [
            nodes for place, nodes in enumerate(lists) if set(nodes) > set(configured) and nodes not in lists[:place]
        ]


@dataclass(frozen=True)
class RequeueDecision:
    """`exit_code` AGAIN: queue again, `if_running` only where SLURM is not ending the job itself; with `cancel`, have
    SLURM call it cancelled instead.
    """

    exit_code: int
    why: str
    if_running: bool = False
    cancel: bool = False


def decide(
    code: int, now: RequeueState, most: int, bad_nodes: tuple[str, ...], nodes: int, cancelled: bool
) -> RequeueDecision:
    """`code`: srun's. `now`: with this try in it. `most`: tries in a row that may fail without progress. `nodes`: how
    many the job has.
    """
    on = "to go on from its newest checkpoint" if now.step < 0 else f"to go on from step {now.step}"
    if code == 0:
        return RequeueDecision(0, "done")
    if cancelled:
        return RequeueDecision(AGAIN, "cancelled after saving", cancel=True)
    if code in (WARNED, 128 + signal.SIGUSR1):
        if now.fruitless >= MOST_WARNED:
            return RequeueDecision(
                1, f"{now.fruitless} tries reached no new checkpoint: ask for more (launch.slurm.time)"
            )
        return RequeueDecision(AGAIN, f"queued again, {on}")
    if FINAL < code < CANCELLED:
        return RequeueDecision(code - FINAL, "not queued again: the same error would come again")
    if code in (CANCELLED, 128 + signal.SIGTERM):
        return RequeueDecision(
            AGAIN, f"stopped from outside; queued again, {on}, unless SLURM ends the job", if_running=True
        )
    if code == FAILED_NODE and len(bad_nodes) >= nodes:
        return RequeueDecision(1, "not queued again: the doctor finds all nodes wrong, so it is not the nodes")
    if now.fruitless > most:
        return RequeueDecision(1, f"not queued again: {now.fruitless} tries in a row reached no new checkpoint")
    if code == FAILED_NODE:
        return RequeueDecision(AGAIN, f"queued again: the doctor finds {', '.join(bad_nodes)} wrong")
    return RequeueDecision(AGAIN, f"failed ({code}); queued again, {on}")


def commands(job: str, decision: RequeueDecision, wishes: list[list[str]], script: Path) -> str:
    """Shell lines that queue the job again, at once: SLURM would wait for two minutes, and takes other nodes only once
    the job pends. The first list of `wishes` without which SLURM could run `script` is left out. Asking for another try
    ends this one, so SIGTERM is ignored from here on.
    """
    lines = ["trap '' TERM"]
    if decision.cancel:
        return "\n".join([*lines, f"scancel {job}", f"exit {CANCELLED}", ""])
    if decision.if_running:
        lines.append(f"scontrol show job -o {job} | grep -q JobState=RUNNING || exit {CANCELLED}")
    if wishes:
        best, *others = (shlex.quote(",".join(nodes)) for nodes in wishes)
        test = f'sbatch --test-only --exclude="$1" {shlex.quote(str(script))}'
        lines += [
            f"fits() {{ answer=$({test} 2>&1) || ! said=$answer; }}",
            f'for nodes in {" ".join([best, *others])} \'\'; do [ -z "$nodes" ] || fits "$nodes" && break; done',
            f'[ "$nodes" = {best} ] || echo "leviathan: not all left out of "{best}": SLURM says, $said"',
            '[ -z "$nodes" ] || echo "leviathan: left out from now on: $nodes"',
        ]
    lines += [f"scontrol requeue {job} || exit 1", f"scontrol update JobId={job} StartTime=now"]
    if wishes:
        lines.append(f'[ -z "$nodes" ] || scontrol update JobId={job} ExcNodeList="$nodes"')
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> int:
    """Decide, say so, and leave the commands; returns the job's exit code or AGAIN."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder, code = Path(arguments[0]), int(arguments[1])
    environment = os.environ
    task = int(environment.get("SLURM_ARRAY_TASK_ID", 0))
    from core.config import build
    from core.files import write_json, write_text
    from launch.config import LaunchConfig
    from train.run_directory import RunDirectory, committed, read_config
    from train.stragglers import SLOW_HOSTS

    config = read_config(folder / f"config-{task}.yaml")
    launch = build(LaunchConfig, config.launch, "launch")
    run = RunDirectory.of(config)
    step = max((step for step, _ in committed(run.checkpoints)), default=-1)
    path = folder / f"requeue-{task}.json"
    history = json.loads(path.read_text()) if path.exists() else {"time": _submitted(folder)}
    since = history.pop("time")
    bad = () if code in (0, WARNED) else bad_nodes(folder / f"doctor-{task}", run.logs, since)
    slow = slow_nodes(run.logs / SLOW_HOSTS, since) if code else ()
    now = RequeueState(**history).after(step, bad, slow)
    decision = decide(code, now, launch.slurm.requeues, bad, launch.nodes, (folder / CANCEL).exists())
    if slow:
        print(f"leviathan: steadily slow in this try: {', '.join(slow)}")
    print(f"leviathan: {decision.why}", flush=True)
    if decision.exit_code == AGAIN:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{task}" if array else environment["SLURM_JOB_ID"]
        write_json(path, {**vars(now), "time": time.time()})
        asked = commands(job, decision, now.wishes(launch.slurm.exclude), folder / "job.sh")
        write_text(folder / f"again-{task}.sh", asked)
    return decision.exit_code


def bad_nodes(doctor: Path, logs: Path, since: float) -> tuple[str, ...]:
    """Nodes named by the doctor of this try, and by hangs since the last one."""
    found: set[str] = set()
    findings = doctor / "findings.json"
    if findings.exists():
        content = json.loads(findings.read_text())
        found.update(content["bad_nodes"] if content["time"] > since else ())
    for hang in _lines(logs / "hangs.jsonl"):
        if hang["time"] > since:
            found.update(hang["hosts"])
    return tuple(sorted(found))


def slow_nodes(path: Path, since: float) -> tuple[str, ...]:
    """Nodes that were steadily slow when the try ended: what train/stragglers.py noted last, if in this try."""
    lines = _lines(path)
    return tuple(lines[-1]["hosts"]) if lines and lines[-1]["time"] > since else ()


def _lines(path: Path) -> list[dict[str, Any]]:
    """What ranks have noted, some of them just before they were ended."""
    from train.run_directory import read_lines

    return list(read_lines(path)) if path.exists() else []


def _submitted(folder: Path) -> float:
    """Hangs and findings of earlier jobs of the same name do not count."""
    path = folder / "job.json"
    return float(json.loads(path.read_text())["submitted"]) if path.exists() else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
