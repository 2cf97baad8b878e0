"""A run that is killed and started again equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.cli import main
from tests.support.tiny import TINY, figures, trainer

STEPS = 40


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As many as a killed run has: sums are bit for bit the same for one number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def arguments(root: Path, name: str, corpus: list[str], *more: str) -> list[str]:
    return [
        *TINY,
        *corpus,
        f"run.root={root}",
        f"run.name={name}",
        f"training.steps={STEPS}",
        "checkpoint.every=4",
        *more,
    ]


def lines(root: Path, name: str) -> list[dict]:
    """The logged steps; evaluations have lines of their own."""
    found = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def exact(root: Path, name: str) -> list[tuple]:
    return [(x["step"], x["loss"], x["gradient_norm"], x["expert_load"], x["router_z"]) for x in lines(root, name)]


def killed(root: Path, name: str, overrides: list[str], after: str) -> None:
    """Start a run and SIGKILL it once `after` names a path that exists below its directory."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *overrides],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    deadline = time.monotonic() + 120
    while not list((root / name).glob(after)):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, small_corpus, precision):
    """Killed once between checkpoints and once while one is being written; dense, packed, top-2, all terms on."""
    more = [f"precision={precision}", "optimizer=adamw"]
    assert main(["train", *arguments(tmp_path, "whole", small_corpus, *more)]) == 0
    overrides = arguments(tmp_path, "cut", small_corpus, *more)
    killed(tmp_path, "cut", overrides, "checkpoints/step-00000008/COMMITTED")
    killed(tmp_path, "cut", overrides, "checkpoints/step-0000002*/rank_0.bin")
    assert main(["train", *overrides]) == 0
    assert exact(tmp_path, "cut") == exact(tmp_path, "whole")
    assert "going on from" in (tmp_path / "cut" / "log.txt").read_text()


def test_the_comparison_notices_lost_optimizer_state(tmp_path, small_corpus, monkeypatch):
    """Control: without the moments, or with another batch order, the losses differ."""
    more = ["optimizer=adamw", "training.steps=8"]
    assert main(["train", *arguments(tmp_path, "whole", small_corpus, *more)]) == 0
    run = trainer(tmp_path, "cut", arguments(tmp_path, "cut", small_corpus, *more))
    for step in range(4):
        run.train_step(step)
    run.save()
    run.checkpointer.wait()
    run = trainer(tmp_path, "cut", arguments(tmp_path, "cut", small_corpus, *more))
    for state in run.engine.optimizer.state.values():
        state["exp_avg"].zero_()
    losses = [run.train_step(step).loss.item() for step in range(4, 8)]
    wanted = [line["loss"] for line in lines(tmp_path, "whole")[4:8]]
    assert losses[0] == wanted[0] and losses[1:] != wanted[1:]


@pytest.mark.parametrize("first, second", [(2, 1), (1, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, small_corpus, tmp_path, first, second):
    overrides = [*small_corpus, "precision=fp64", "optimizer=adamw"]
    wanted = ranks(1, figures, tmp_path, "whole", overrides, 6)[0]
    ranks(first, train_and_save, tmp_path, "cut", overrides, 3)
    found = ranks(second, go_on, tmp_path, "cut", overrides, 3, 6)[0]
    assert found == pytest.approx(wanted["loss"][3:], rel=1e-9)


def train_and_save(root: Path, name: str, overrides: list[str], steps: int) -> None:
    run = trainer(root, name, overrides)
    for step in range(steps):
        run.train_step(step)
    run.save()
    run.checkpointer.wait()


def go_on(root: Path, name: str, overrides: list[str], start: int, stop: int) -> list[float]:
    run = trainer(root, name, overrides)
    assert run.step == start
    return [run.train_step(step).loss.item() for step in range(start, stop)]


def test_a_phase_may_be_added_to_a_finished_run(tmp_path, small_corpus):
    base = arguments(tmp_path, "run", small_corpus, "training.steps=6")
    assert main(["train", *base]) == 0
    phase = "+phases=[{name: longer, steps: 4, seq_len: 96, global_batch_size: 4, weights: {text: 0.2, code: 0.8}}]"
    assert main(["train", *base, phase.removeprefix("+")]) == 0
    found = lines(tmp_path, "run")
    assert [line["step"] for line in found] == list(range(1, 11))
    assert found[6]["tokens"] - found[5]["tokens"] == 96 * 4
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["tokens"] == 6 * 8 * 48 + 4 * 4 * 96


def test_a_finished_run_started_again_changes_nothing(tmp_path, small_corpus, capsys):
    overrides = arguments(tmp_path, "run", small_corpus, "training.steps=5")
    assert main(["train", *overrides]) == 0
    before = (tmp_path / "run" / "summary.json").read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", *overrides]) == 0
    after = (tmp_path / "run" / "summary.json").read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert after == before
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"run: {tmp_path / 'run'}"


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tmp_path, small_corpus, capsys):
    code = main(
        [
            "train",
            *arguments(tmp_path, "run", small_corpus, "optimizer=sgd", "optimizer.lr=1e30", "training.clip_norm=null"),
        ]
    )
    assert code == 1
    assert "is nan: start a new run" in capsys.readouterr().err


def test_a_phase_begins_with_the_first_rows_of_its_own_order(tmp_path, small_corpus, monkeypatch):
    """The loader counts the phase's steps, whatever came before it."""
    from data.loader import Loader

    asked: list[tuple[int, int]] = []
    batch = Loader.batch

    def watched(self, step, start, stop):
        asked.append((self.seq_len, step))
        return batch(self, step, start, stop)

    monkeypatch.setattr(Loader, "batch", watched)
    phase = "+phases=[{name: longer, steps: 2, seq_len: 96}]"
    run = trainer(tmp_path, "run", [*small_corpus, "training.steps=3", phase])
    for step in range(5):
        run.train_step(step)
    assert asked == [(48, 0), (48, 1), (48, 2), (96, 0), (96, 1)]


LONGER = (
    "phases=[{name: long, steps: 6, seq_len: 256, global_batch_size: 2, micro_batch_size: 1, "
    "weights: {text: 0.2, code: 0.8}, rope_theta: 1e6, "
    "rope_scaling: {factor: 4, low_freq_factor: 1, high_freq_factor: 2, original_seq_len: 64}, temperature_floor: 64}]"
)


def test_a_run_goes_on_to_longer_rows_and_resumes_there_bit_for_bit(tmp_path, small_corpus, capsys):
    """From 64 to 256 tokens, with another blend and positions seen otherwise; stopped two steps into the phase."""
    usual = [*small_corpus, "training.seq_len=64", "training.steps=4", "checkpoint.every=0", "checkpoint.keep=9"]
    assert main(["train", *TINY, f"run.root={tmp_path}", "run.name=whole", *usual, LONGER]) == 0
    cut = trainer(tmp_path, "cut", [*usual, f"+{LONGER}"])
    for step in range(6):
        cut.train_step(step)
    cut.save()
    cut.checkpointer.wait()
    cut.directory.release()
    assert main(["train", *TINY, f"run.root={tmp_path}", "run.name=cut", *usual, LONGER]) == 0
    wanted = exact(tmp_path, "whole")
    assert [line[0] for line in wanted] == list(range(1, 11))
    assert exact(tmp_path, "cut") == wanted[6:]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "cut")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == summaries[0]["heldout_loss"], "positions as at the end"
    plain = LONGER.partition(", rope_theta")[0] + "}]"
    assert main(["train", *TINY, f"run.root={tmp_path}", "run.name=plain", *usual, plain]) == 0
    other = exact(tmp_path, "plain")
    assert other[:4] == wanted[:4] and other[4] != wanted[4], "control: without the settings the phase begins otherwise"
