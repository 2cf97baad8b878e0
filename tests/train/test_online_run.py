"""Online filtering in a run: windows follow the model's losses, and a resumed run takes the same sequences."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from data.corpus import TRAIN, prepare
from data.loader import Loader
from launch.cli import main
from model.attention.plan import ForwardContext
from tests.data.conftest import silent
from tests.support.tiny import EXACT, TINY, config, trainer
from train.config import check, phases
from train.corpus import source_weights
from train.eval.held_out import held_out_loss, sequence_losses
from train.online_filter import OnlineConfig, OnlineFilter, OnlineWindow
from train.provenance import DocumentSpan, TrainedSequence, visits
from train.run_directory import load_config, read_lines
from train.trainer import Trainer

SMALL = [
    "model.num_layers=2",
    "model.attention_chunk_size=16",
    "training.seq_len=32",
    "training.global_batch_size=4",
    "training.steps=7",
]
ONLINE = ["online.every=3", "online.keep=0.5", "online.revive=0.25", "online.hysteresis=0.02"]


def overrides(corpus: list[str], *more: str) -> list[str]:
    return [*corpus, *EXACT, *SMALL, *ONLINE, *more]


def stepped(run: Trainer, stop: int, save_at: int | None = None) -> dict[str, Any]:
    """Train up to step `stop` with online filtering, saving after step `save_at`. Return losses and windows."""
    online, losses, windows = run.callbacks[0], [], []
    for step in range(run.step, stop):
        online.before_step(step)
        losses.append(run.train_step(step).loss.item())
        windows.append((online.window.generation, tuple(online.window.rows), tuple(online.window.deferred)))
        if step + 1 == save_at:
            run.save()
            run.checkpointer.wait()
    return {"losses": losses, "windows": windows}


def undisturbed(root: Path, name: str, words: list[str]) -> dict[str, Any]:
    return stepped(trainer(root, name, words), 7)


def cut(root: Path, name: str, words: list[str], at: int) -> dict[str, Any]:
    """Save after `at` steps and train one step more. Then resume from the checkpoint; return the result."""
    before = stepped(trainer(root, name, words), min(at + 1, 7), save_at=at)
    after = stepped(trainer(root, name, words), 7)
    return {key: before[key][:at] + after[key] for key in before}


@torch.no_grad()
def losses_of(run: Trainer, ordinals: list[int]) -> np.ndarray:
    """Compute the loss of each sequence by itself, from the model's logits."""
    found = []
    for ordinal in ordinals:
        batch = run.loaders["main"].samples([ordinal])
        logp = run.engine.placed.model(batch.tokens_BT, ForwardContext(batch.positions_BT)).log_softmax(-1)[0]
        labels = batch.labels_BT[0]
        found.append(float(-logp[torch.arange(len(labels)), labels.clamp_min(0)][labels >= 0].mean()))
    return np.array(found)


def test_windows_are_what_the_model_scores(small_corpus, tmp_path):
    """Compute each window again from its definition, and compare."""
    run = trainer(tmp_path, "run", overrides(small_corpus))
    online, deferred, cursor = run.callbacks[0], [], 0
    for step in range(6):
        if step % 3 == 0:
            fresh = round(12 / 0.5) - len(deferred)
            candidates = sorted([*deferred, *range(cursor, cursor + fresh)])
            losses = losses_of(run, candidates)
        online.before_step(step)
        if step % 3 == 0:
            cursor += fresh
            window = online.window
            assert (window.generation, window.first_step, window.cursor) == (step // 3 + 1, step, cursor)
            hardest = sorted(np.argsort(-losses)[:9])
            assert {candidates[place] for place in hardest} <= set(window.rows), "three quarters by loss"
            assert len(window.rows) == 12 == len(set(window.rows)) and window.rows == sorted(window.rows)
            assert window.threshold == pytest.approx(losses[hardest].min(), rel=1e-9)
            left = [c for c, loss in zip(candidates, losses, strict=True) if loss > window.threshold - 0.02]
            assert window.deferred == [c for c in left if c not in window.rows and c not in deferred]
            deferred = window.deferred
        batch = run.batches.get(step)
        wanted = run.loaders["main"].samples(online.window.rows[(step % 3) * 4 : (step % 3) * 4 + 4])
        assert torch.equal(batch.tokens_BT, wanted.tokens_BT) and torch.equal(batch.labels_BT, wanted.labels_BT)
        run.train_step(step)
    assert deferred or cursor == 48


def test_scores_of_another_model_are_noticed(small_corpus, tmp_path):
    """Control: the trained weights would choose another first window."""
    run = trainer(tmp_path, "run", overrides(small_corpus, "optimizer.lr=0.5"))
    found = stepped(run, 3)
    filter_ = OnlineFilter(run.config.online, 4, 0, partial(losses_of, run))
    assert filter_.next(OnlineWindow(), 0, 3).rows != list(found["windows"][0][1])


@pytest.fixture(scope="module")
def whole(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return undisturbed(tmp_path_factory.mktemp("whole"), "whole", overrides(small_corpus, "optimizer=adamw"))


@pytest.mark.parametrize("at", [3, 4], ids=["boundary", "middle"])
def test_a_resumed_run_takes_the_same_sequences(small_corpus, whole, tmp_path, at):
    assert cut(tmp_path, "cut", overrides(small_corpus, "optimizer=adamw"), at) == whole
    assert len(whole["losses"]) == 7 and whole["windows"][-1][0] == 3 and len(whole["windows"][-1][1]) == 4


def test_a_lost_window_is_noticed(small_corpus, whole, tmp_path):
    """Control: with the cursor reset the next window differs."""
    words = overrides(small_corpus, "optimizer=adamw")
    stepped(trainer(tmp_path, "cut", words), 3, save_at=3)
    run = trainer(tmp_path, "cut", words)
    run.callbacks[0].window = OnlineWindow(generation=run.callbacks[0].window.generation)
    assert stepped(run, 7)["windows"] != whole["windows"][3:]


@pytest.mark.slow
def test_two_ranks_take_the_same_sequences(small_corpus, tmp_path, ranks):
    words = overrides(small_corpus)
    one = ranks(1, undisturbed, tmp_path, "one", words)[0]
    two = ranks(2, undisturbed, tmp_path, "two", words)
    again = ranks(2, cut, tmp_path, "cut", words, 4)
    assert two[0] == two[1] == again[0] == again[1], "bit for bit on the same number of ranks"
    assert two[0]["windows"] == one["windows"] and two[0]["losses"] == pytest.approx(one["losses"], rel=1e-9)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]


def test_the_run_writes_its_windows_and_trims_them(small_corpus, tmp_path):
    """Run the command with a phase and a restart within a window. Check the steps that trained on each document."""
    phase = "+phases=[{name: later, steps: 4, seq_len: 16, global_batch_size: 2, micro_batch_size: 2, weights: {code: 1.0}}]"
    words = [*TINY, *overrides(small_corpus, phase, "checkpoint.every=2", "checkpoint.keep=9"), f"run.root={tmp_path}"]
    assert main(["train", *words, "run.name=run"]) == 0
    path = tmp_path / "run" / "online.jsonl"
    windows = lines_of(path)
    found = [(one["phase"], one["first_step"], one["generation"]) for one in windows]
    assert found == [("main", 0, 1), ("main", 3, 2), ("main", 6, 3), ("later", 7, 4), ("later", 10, 5)]
    assert [len(one["rows"]) for one in windows] == [12, 12, 4, 6, 2] and min(windows[3]["rows"]) < 12
    metrics = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    shares = {line["step"]: line["scoring_share"] for line in metrics}
    assert all(0 < shares[one["first_step"] + 1] < 1 for one in windows) and shares[2] == shares[3] == 0
    for step in (6, 8, 10, 11):  # as if killed after step 4
        for left in (tmp_path / "run" / "checkpoints").glob(f"step-{step:08d}"):
            (left / "COMMITTED").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    with open(path, "a") as file:
        file.write('{"first_step": 10, "gen')
    assert main(["train", *words, "run.name=run"]) == 0
    assert lines_of(path) == windows, "no window twice"
    again = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics]
    compare_with_batches(tmp_path / "run", windows)


def compare_with_batches(directory: Path, windows: list[dict[str, Any]]) -> None:
    """Compare the steps that `visits` finds for each document with those that follow from the windows."""
    stored = load_config(directory)
    corpus = prepare(stored.data, silent)
    read: list[tuple[TrainedSequence, int, int]] = []
    for phase in phases(stored):
        weights = phase.weights or source_weights(stored, corpus)
        loader = Loader(corpus, phase.seq_len, phase.global_batch_size, stored.run.seed, phase.name, weights)
        for window in (one for one in windows if one["phase"] == phase.name):
            places = zip(*loader.locate(np.asarray(window["rows"])), strict=True)
            for number, (source, sequence) in enumerate(places):
                step, row = divmod(number, phase.global_batch_size)
                visit, start = TrainedSequence(phase.name, window["first_step"] + step, row), sequence * phase.seq_len
                read += [(visit, start, start + phase.seq_len)] if loader.blend.names[source] == "code" else []
    tokens = np.empty(len(corpus.stream("code", TRAIN)), np.int64)
    corpus.stream("code", TRAIN).read(0, tokens)
    begins, met = np.flatnonzero(tokens == corpus.tokenizer.bos_id).tolist(), 0
    for start, stop in pairwise(begins):
        # inputs [begin, end) have the labels (begin, end]; BOS is no label
        wanted = [visit for visit, begin, end in read if begin < stop - 1 and end >= start + 1]
        found = visits(directory, stored, corpus, DocumentSpan("code", start, stop - start), 11)
        assert found == wanted
        met += len(found)
    assert met


def test_baselines_of_other_tokens_are_rejected(small_corpus, tmp_path):
    words = overrides(small_corpus, "evaluation.baselines=true")
    with pytest.raises(ConfigError, match=r"evaluation\.baselines=true: would be fitted to other tokens.*; try false"):
        check(config(tmp_path, "run", *words), 1)
    check(config(tmp_path, "run", *words, "online.every=0"), 1)


def test_revive_leaves_one_by_its_loss():
    scores = np.arange(100.0)
    filter_ = OnlineFilter(OnlineConfig(every=1, revive=0.99), 8, 0, lambda ordinals: scores[list(ordinals)])
    window = filter_.next(OnlineWindow(), 0, 1)
    assert window.threshold == 15.0 and 15 in window.rows and len(window.rows) == 8


def rows_and_held_out(root: Path, words: list[str]) -> tuple[list[float], float, float]:
    run = trainer(root, "run", words)
    loader, placed = run.loaders["main"], run.engine.placed
    bytes_V = torch.from_numpy(run.corpus.tokenizer.token_bytes())
    found = held_out_loss(placed, loader, bytes_V, 5, 2, {"text": 1.0})
    losses = sequence_losses(placed, lambda a, b: loader.held_out("text", a, b), 5, 2)
    labels = (loader.held_out("text", 0, 5).labels_BT >= 0).sum(1)
    mean = float((losses * labels).sum() / labels.sum())
    return losses.tolist(), mean, found.loss


@pytest.mark.parametrize("axis", ["dp_shard", "ep", "pp", "cp"])
def test_the_mean_over_sequences_is_the_held_out_loss(small_corpus, tmp_path, ranks, axis):
    """Five sequences in micro-batches of two leave one of two ranks with fewer. Results equal those of one rank."""
    words = [*small_corpus, *EXACT, *SMALL, "training.micro_batch_size=1"]
    alone = rows_and_held_out(tmp_path / "one", words)
    assert alone[1] == pytest.approx(alone[2], rel=1e-12) and len(set(alone[0])) == 5
    for found in ranks(2, rows_and_held_out, tmp_path / "two", [*words, f"parallel.{axis}=2"]):
        assert found[0] == pytest.approx(alone[0], rel=1e-9)
        assert found[1] == pytest.approx(found[2], rel=1e-12)
    assert alone[0][0] != pytest.approx(alone[2], rel=1e-6), "control: a single sequence"


def test_a_sequence_without_labels_has_no_loss(small_corpus, tmp_path):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT, *SMALL])
    loader = run.loaders["main"]

    def take(start: int, stop: int) -> Any:
        batch = loader.held_out("text", start, stop)
        batch.labels_BT[: max(0, 1 - start)] = -100
        return batch

    losses = sequence_losses(run.engine.placed, take, 3, 2)
    assert torch.isnan(losses).tolist() == [True, False, False]
