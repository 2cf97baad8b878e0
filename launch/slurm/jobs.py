"""List and cancel submitted SLURM jobs."""

from __future__ import annotations

from pathlib import Path

from launch.slurm.requeue import CANCEL
from launch.slurm.submit import UNKNOWN, SlurmJob, ask, command
from train.run_directory import read_lines


def cancel(job: SlurmJob) -> int:
    """Ask the active runs to save and end. When called again, or with no active run, let SLURM end the job at once."""
    again = (job.folder / CANCEL).exists()
    running = [job.id_of(task) for task, status in enumerate(ask(job)) if status.state == "RUNNING"]
    (job.folder / CANCEL).touch()
    if again or not running:
        command("scancel", job.number)
        print(f"job {job.number} ({job.name}) is ended")
        return 0
    for number in running:
        command("scancel", "--signal=USR1", number)
    if len(running) < len(job.runs):
        command("scancel", "--state=PENDING", job.number)
    print(f"job {job.number} ({job.name}) saves and then ends; cancel again to end it at once")
    return 0


def table(known: list[SlurmJob]) -> str:
    """Return a line per run: its number, name, SLURM state, and the step and loss of its last log line."""
    lines = [("job", "run", "state", "step", "loss")]
    for job in known:
        for task, (path, status) in enumerate(zip(job.runs, ask(job), strict=True)):
            state = "ended, SLURM no longer knows how" if status.state == UNKNOWN else status.state
            lines.append((job.id_of(task), path.name, state, *_progress(path)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ((f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _progress(run: Path) -> tuple[str, str]:
    path = run / "metrics.jsonl"
    lines = [line for line in read_lines(path) if "loss" in line] if path.exists() else []
    return (str(lines[-1]["step"]), f"{lines[-1]['loss']:.4f}") if lines else ("-", "-")
