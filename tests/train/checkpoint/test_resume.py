"""A run that is killed and resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.rank_pool import PRELOAD
from tests.support.tiny import TINY, figures, saved, trainer
from train.run_directory import read_lines

STEPS = 24
ADAMW = ["precision=fp32", "optimizer=adamw"]


def arguments(root: Path, name: str, *more: str) -> list[str]:
    place = [f"run.root={root}", f"run.name={name}", f"training.steps={STEPS}"]
    return [*TINY, *place, "checkpoint.every=4", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_corpus) -> Path:
    """Train an uninterrupted run: dense and MoE layers, packed documents, top-2 routing, all balancing terms."""
    root = tmp_path_factory.mktemp("resume")
    assert main(["train", *arguments(root, "whole", *small_corpus, *ADAMW)]) == 0
    return root / "whole"


def lines(run: Path) -> list[dict]:
    """Return the lines of logged steps, without the lines of evaluations."""
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def exact(run: Path) -> list[tuple]:
    return [(x["step"], x["loss"], x["gradient_norm"], x["expert_load"], x["router_z"]) for x in lines(run)]


def killed(run: Path, overrides: list[str], after: str) -> None:
    """Start a run and SIGKILL it once `after` names a path that exists below its directory."""
    context = multiprocessing.get_context("forkserver")  # has imported everything if ranks have run
    context.set_forkserver_preload(list(PRELOAD))
    process = context.Process(target=quietly, args=(["train", *overrides],))
    process.start()
    deadline = time.monotonic() + 240
    while not list(run.glob(after)):
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def quietly(arguments: list[str]) -> None:
    """Run the command with one thread, as here: sums differ in the last bit between thread counts."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(arguments)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, small_corpus, finished, precision):
    """Kill the run once between checkpoints and once while a checkpoint is written."""
    more = [*small_corpus, f"precision={precision}", "optimizer=adamw"]
    if precision != "fp32":
        assert main(["train", *arguments(tmp_path, "whole", *more)]) == 0
        finished = tmp_path / "whole"
    overrides, run = arguments(tmp_path, "cut", *more), tmp_path / "cut"
    killed(run, overrides, "checkpoints/step-00000008/COMMITTED")
    killed(run, overrides, "checkpoints/step-00000016/rank_0.bin")
    assert main(["train", *overrides]) == 0
    assert exact(run) == exact(finished)
    assert "resuming from" in (run / "log.txt").read_text()


def test_the_comparison_notices_lost_moments(tmp_path, small_corpus, finished):
    """Control: without the first moments the losses differ."""
    overrides = arguments(tmp_path, "cut", *small_corpus, *ADAMW)
    saved(tmp_path, "cut", overrides, 4).directory.release()
    run = trainer(tmp_path, "cut", overrides)
    for state in run.engine.optimizer.state.values():
        state["exp_avg"].zero_()
    losses = [run.train_step(step).loss.item() for step in range(4, 8)]
    wanted = [line["loss"] for line in lines(finished)[4:8]]
    assert losses[0] == wanted[0] and losses[1:] != wanted[1:]


FP64 = ["precision=fp64", "optimizer=adamw"]


@pytest.fixture(scope="module")
def six_losses(ranks, small_corpus, tmp_path_factory) -> list[float]:
    return ranks(1, figures, tmp_path_factory.mktemp("six"), "whole", [*small_corpus, *FP64], 6)[0]["loss"]


@pytest.mark.parametrize("first, second", [(2, 1), (1, 4), (4, 2)])
def test_a_run_resumes_with_another_number_of_ranks(ranks, small_corpus, tmp_path, six_losses, first, second):
    overrides = [*small_corpus, *FP64]
    ranks(first, save, tmp_path, overrides, 3)
    found = ranks(second, resume, tmp_path, overrides, 3, 6)[0]
    assert found == pytest.approx(six_losses[3:], rel=1e-9)


def save(root: Path, overrides: list[str], steps: int) -> None:
    saved(root, "cut", overrides, steps)


def resume(root: Path, overrides: list[str], start: int, stop: int) -> list[float]:
    run = trainer(root, "cut", overrides)
    assert run.step == start
    return [run.train_step(step).loss.item() for step in range(start, stop)]


def test_a_finished_run_is_left_alone_and_takes_a_phase(tmp_path, small_corpus, finished, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    overrides = arguments(tmp_path, "run", *small_corpus, *ADAMW)
    files = run / "summary.json", run / "metrics.jsonl"
    before = [path.read_bytes() for path in files]
    capsys.readouterr()
    assert main(["train", *overrides]) == 0
    assert [path.read_bytes() for path in files] == before
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"run: {run}"
    phase = "phases=[{name: longer, steps: 4, seq_len: 96, global_batch_size: 4, weights: {text: 0.2, code: 0.8}}]"
    assert main(["train", *overrides, phase]) == 0
    found = lines(run)
    assert [line["step"] for line in found] == list(range(1, STEPS + 5))
    assert found[STEPS]["tokens"] - found[STEPS - 1]["tokens"] == 96 * 4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS + 4 and summary["tokens"] == STEPS * 8 * 48 + 4 * 4 * 96


LONGER = (
    "phases=[{name: long, steps: 6, seq_len: 256, global_batch_size: 2, micro_batch_size: 1, "
    "weights: {text: 0.2, code: 0.8}, rope_theta: 1e6, "
    "rope_scaling: {factor: 4, low_freq_factor: 1, high_freq_factor: 2, original_seq_len: 64}, temperature_floor: 64}]"
)


def test_a_long_phase_resumes_bit_for_bit(tmp_path, small_corpus, capsys):
    """The phase has 256 instead of 64 tokens, another blend and other RoPE settings. Resume two steps into it."""
    usual = [*small_corpus, "training.seq_len=64", "training.steps=4", "checkpoint.every=0", "checkpoint.keep=9"]

    def train(name: str, phase: str) -> list[tuple]:
        assert main(["train", *TINY, f"run.root={tmp_path}", f"run.name={name}", *usual, phase]) == 0
        return exact(tmp_path / name)

    wanted = train("whole", LONGER)
    saved(tmp_path, "cut", [*usual, f"+{LONGER}"], 6).directory.release()
    assert [line[0] for line in wanted] == list(range(1, 11))
    assert train("cut", LONGER) == wanted[6:]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "cut")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == summaries[0]["heldout_loss"], "RoPE of the last phase"
    other = train("plain", LONGER.partition(", rope_theta")[0] + "}]")
    assert other[:4] == wanted[:4] and other[4] != wanted[4], "control: without RoPE settings the phase differs"
