"""What a run takes of its sources: through phases, to their limits, ahead of the step; and what it tells of it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from core.errors import ConfigError
from data.corpus import TRAIN
from data.loader import IGNORED
from launch.cli import main
from tests.support.tiny import EXACT, TINY, config, trainer
from train.config import check
from train.online_filter import OnlineConfig, OnlineFilter, OnlineWindow, candidates

CODE_LATER = [
    "training.steps=6",
    "+training.weights={text: 1.0}",
    "+phases=[{name: both, steps: 4, weights: {text: 1.0, code: 1.0}}, {name: code, steps: 3, weights: {code: 1.0}}]",
]


def lines(root: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def consumed(run, steps) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in run.corpus.sources}
    for step in steps:
        batch = run.batches.get(step, run.steps)
        for tokens, source in zip(batch.tokens_BT.tolist(), batch.sources_B.tolist(), strict=True):
            found[run.corpus.sources[source]].append(tuple(tokens))
    return found


def test_phases_add_and_leave_out_sources_and_repeat_no_row(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT, *CODE_LATER])
    parts = [consumed(run, steps) for steps in (range(6), range(6, 10), range(10, 13))]
    assert len(parts[0]["text"]) == 48 and not parts[0]["code"]
    assert parts[1]["text"] and parts[1]["code"] and not parts[2]["text"]
    for source in ("text", "code"):
        rows = Counter(row for part in parts for row in part[source])
        stream = run.corpus.stream(source, TRAIN)
        there = Counter(tuple(stream.window(r * 48, 48).tolist()) for r in range(stream.num_sequences(48)))
        assert rows.total() < stream.num_sequences(48) and rows <= there, source
    run.batches.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_run_stopped_in_a_phase_goes_on_with_the_very_rows(tmp_path, small_corpus, prefetch):
    usual = [*small_corpus, *CODE_LATER, f"data.prefetch={prefetch}"]
    whole = trainer(tmp_path, "whole", usual)
    wanted = [whole.train_step(step).loss.item() for step in range(13)]
    first = trainer(tmp_path, "cut", usual)
    seen = [first.train_step(step).loss.item() for step in range(8)]
    first.save()
    first.checkpointer.wait()
    first.directory.release()
    again = trainer(tmp_path, "cut", [*usual, f"data.prefetch={2 - prefetch}"])
    assert again.step == 8
    assert seen + [again.train_step(step).loss.item() for step in range(8, 13)] == wanted


def test_limits_end_sources_and_runs_that_outlast_them_are_refused(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, "+data.sources.code.max_epochs=0.1", "training.steps=30"])
    rows = run.corpus.stream("code", TRAIN).num_sequences(48)
    assert len(consumed(run, range(30))["code"]) == int(0.1 * rows) < 30 * 8 / 3
    limits = ["+data.sources.code.max_epochs=0.1", "+data.sources.text.max_epochs=0.2"]
    there = int(0.1 * rows) + int(0.2 * run.corpus.stream("text", TRAIN).num_sequences(48))
    message = (
        rf"training.steps=5000: phase main uses up all of .*: {there * 48:,} tokens are left .*; try {there // 8}$"
    )
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, "long", [*small_corpus, *limits, "training.steps=5000"])
    trainer(tmp_path, "fits", [*small_corpus, *limits, f"training.steps={there // 8}"])


def test_many_epochs_are_told_in_the_log(tmp_path, small_corpus):
    trainer(tmp_path, "run", [*small_corpus, "training.steps=100000"])
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "source text is repeated" in text and "source code is repeated" in text
    trainer(tmp_path, "short", small_corpus)
    assert not (tmp_path / "short" / "log.txt").exists(), "nothing to say"


BIG = ["data.align=48", "training.global_batch_size=32"]


def test_metrics_tell_of_waiting_labels_padding_and_sources(tmp_path, small_corpus):
    before = threading.active_count()
    usual = [f"run.root={tmp_path}", "run.name=run", "training.steps=4", "logging.every=2", *BIG]
    assert main(["train", *TINY, *small_corpus, *usual]) == 0
    assert threading.active_count() <= before, "the thread has ended"
    found = [line for line in lines(tmp_path, "run") if "loss" in line]
    run = trainer(tmp_path, "other", [*small_corpus, *BIG, "training.steps=4"])
    batches = [run.loaders["main"].batch(step) for step in range(4)]
    for line, pair in zip(found, (batches[:2], batches[2:]), strict=True):
        assert line["labelled_tokens"] == sum(int((batch.labels_BT != IGNORED).sum()) for batch in pair)
        assert 0 < line["padding_share"] < 0.1 and 0 <= line["data_wait_s"] < 5
        rows = [sum(int((batch.sources_B == source).sum()) for batch in pair) for source in (0, 1)]
        assert line["source_shares"] == dict(zip(run.corpus.sources, [round(r / 64, 4) for r in rows], strict=True))


def test_packed_rows_are_trained_on_and_need_their_context(tmp_path, small_corpus):
    packing = ["data.packing=best_fit", "data.pack_seq_len=48"]
    assert (
        main(["train", *TINY, *small_corpus, *packing, f"run.root={tmp_path}", "run.name=a", "training.steps=2"]) == 0
    )
    with pytest.raises(ConfigError, match=r"training.seq_len=64: the rows are packed for data.pack_seq_len=48; try 48"):
        check(config(tmp_path, "b", *small_corpus, *packing, "training.seq_len=64"), 1)
    later = "+phases=[{name: late, steps: 1, seq_len: 96}]"
    with pytest.raises(ConfigError, match=r"phases.late.seq_len=96: the rows are packed"):
        check(config(tmp_path, "b", *small_corpus, *packing, later), 1)


def test_an_unknown_source_of_the_first_stretch_is_named(tmp_path, small_corpus):
    with pytest.raises(ConfigError, match=r"training.weights.txt: no such source; try text or code"):
        check(config(tmp_path, "a", *small_corpus, "+training.weights={txt: 1.0}"), 1)


@pytest.mark.parametrize("steps, every", [(10, 3), (9, 3), (2, 5)])
def test_online_windows_take_no_more_candidates_than_they_are_counted_for(steps, every):
    import numpy as np

    settings = OnlineConfig(every=every, keep=0.4, hysteresis=0.3)
    chance = np.random.default_rng(0)
    filter_ = OnlineFilter(settings, 8, 1, lambda ordinals: chance.random(len(ordinals)))
    window = OnlineWindow()
    for step in range(0, steps, every):
        window = filter_.next(window, step, min(every, steps - step))
    assert window.cursor <= candidates(settings, steps, 8)
    assert candidates(OnlineConfig(), steps, 8) == 8 * steps


def test_online_filtering_makes_batches_ahead_within_its_windows(tmp_path, small_corpus):
    usual = [*small_corpus, "online.every=3", "training.steps=8", "checkpoint.every=0"]
    for prefetch in (0, 4):
        arguments = [*usual, f"run.root={tmp_path}", f"run.name={prefetch}", f"data.prefetch={prefetch}"]
        assert main(["train", *TINY, *arguments]) == 0
    losses = [[line["loss"] for line in lines(tmp_path, name) if "loss" in line] for name in ("0", "4")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
