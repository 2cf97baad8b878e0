"""TensorBoard's event files: what is written, by which rank, and from which step after a resume.

The package is optional. Without it a stand-in records the calls; with it the last test reads the files back.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from core.config import load
from launch.cli import main
from tests.support.tiny import trainer
from train.config import LoggingConfig, TrainConfig
from train.metrics import Log, MetricsWriter, scalars

INSTALLED = importlib.util.find_spec("tensorboard") is not None
LINE = {"step": 3, "loss": 2.5, "mfu": None, "router_z": [0.5, 0.25], "expert_load": [{"dead": 0}], "slow_ranks": []}


class Recorder:
    """Stands in for torch.utils.tensorboard.SummaryWriter."""

    made: list[Recorder]
    full = False

    def __init__(self, log_dir: str, purge_step: int) -> None:
        Path(log_dir).mkdir(exist_ok=True)
        self.directory, self.purge_step, self.rows, self.flushed, self.closed = Path(log_dir), purge_step, [], 0, False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        self.rows.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.rows)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch) -> list[Recorder]:
    """Install the stand-in. Return the list of writers that are made."""
    module, Recorder.made = ModuleType("torch.utils.tensorboard"), []
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "tensorboard" else found(name, *rest)
    )
    return Recorder.made


def test_numbers_have_the_path_of_their_keys():
    assert list(scalars({**LINE, "on": True, "name": "x", "heldout": {"code": {"loss": 4.0}}})) == [
        ("step", 3),
        ("loss", 2.5),
        ("router_z/0", 0.5),
        ("router_z/1", 0.25),
        ("expert_load/0/dead", 0),
        ("heldout/code/loss", 4.0),
    ]


def test_a_line_is_written_and_flushed(tmp_path, made):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", LoggingConfig(tensorboard=True), {}, Log(None), 2)
    writer.write(LINE)
    (one,) = made
    assert one.directory == tmp_path / "tensorboard" and one.purge_step == 3
    assert one.rows == [("loss", 2.5, 3), ("router_z/0", 0.5, 3), ("router_z/1", 0.25, 3), ("expert_load/0/dead", 0, 3)]
    assert one.flushed == 4 and not one.closed
    writer.close()
    assert one.closed
    MetricsWriter(tmp_path / "metrics.jsonl", LoggingConfig(), {}, Log(None), 2).write(LINE)
    assert len(made) == 1, "control: it is off by default"


def test_a_full_disk_does_not_end_the_run(tmp_path, made, monkeypatch):
    log = Log(tmp_path / "log.txt")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", LoggingConfig(tensorboard=True), {}, log, 0)
    monkeypatch.setattr(Recorder, "full", True)
    for _ in range(2):
        writer.write(LINE)
    writer.close()
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert "tensorboard: No space left on device; it gets no further lines" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_purges_what_it_repeats(tmp_path, small_corpus, made, monkeypatch):
    """The first attempt logs step 3 but saves at step 2 only. The second repeats step 3."""
    words = [
        *small_corpus,
        "training.steps=4",
        "logging.every=1",
        "checkpoint.every=2",
        "checkpoint.asynchronous=false",
    ]
    first = trainer(tmp_path, "run", [*words, "logging.tensorboard=true"])
    honest = first.train_step

    def killed(step):
        if step == 3:
            raise KeyboardInterrupt
        return honest(step)

    monkeypatch.setattr(first, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    first.directory.release()
    assert trainer(tmp_path, "run", [*words, "logging.tensorboard=true"]).fit() == 0
    before, after = ([step for name, _, step in one.rows if name == "loss"] for one in made)
    assert before == [1, 2, 3] and after == [3, 4]
    kept = [step for step in before if step < made[1].purge_step]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert made[0].purge_step == 1 and kept + after == [line["step"] for line in logged if "loss" in line] == [
        1,
        2,
        3,
        4,
    ]
    assert not made[0].closed and made[1].closed


def test_only_the_main_rank_writes(tmp_path, small_corpus, made, monkeypatch):
    run = trainer(tmp_path, "run", [*small_corpus, "logging.tensorboard=true"])
    logging = next(one for one in run.callbacks if type(one).__name__ == "LoggingCallback")
    monkeypatch.setattr(type(run.world), "is_main", property(lambda _: False))
    logging.before_training()
    assert made == []
    monkeypatch.undo()


def test_the_preset_turns_it_on_and_wandb_may_stay():
    assert load("train", TrainConfig, ["logging=tensorboard"]).logging == LoggingConfig(tensorboard=True)
    both = load("train", TrainConfig, ["logging=wandb", "logging.tensorboard=true"]).logging
    assert both.tensorboard and both.wandb.value == "auto"
    assert not load("train", TrainConfig, []).logging.tensorboard


def test_without_the_package_it_is_refused(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name))
    words = ["train", f"run.root={tmp_path / 'runs'}"]
    assert main([*words, "--cfg"]) == 0, "control"
    assert main([*words, "logging=tensorboard"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    wanted = "logging.tensorboard=true: TensorBoard is not installed: pip install 'leviathan[tensorboard]'"
    assert line == f"leviathan: error: {wanted}"
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not INSTALLED, reason="TensorBoard is not installed")
def test_tensorboard_reads_the_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", LoggingConfig(tensorboard=True), {}, Log(None), start)
        for step in steps:
            writer.write({**LINE, "step": step, "loss": float(10 * start + step)})
        writer.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
