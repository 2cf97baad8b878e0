"""The data of a run: phases, limits of sources, prefetching, and the metrics of the data."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from data.corpus import TRAIN
from data.loader import IGNORED
from launch.cli import main
from tests.support.tiny import EXACT, TINY, config, trainer
from train.config import check
from train.online_filter import OnlineConfig, OnlineFilter, OnlineWindow, candidates
from train.run_directory import read_lines

CODE_LATER = [
    "training.steps=6",
    "+training.weights={text: 1.0}",
    "+phases=[{name: both, steps: 4, weights: {text: 1.0, code: 1.0}}, {name: code, steps: 3, weights: {code: 1.0}}]",
]


def train(root: Path, name: str, *overrides: str) -> list[dict]:
    """Train by the command; return the metrics of its steps."""
    assert main(["train", *TINY, f"run.root={root}", f"run.name={name}", *overrides]) == 0
    return [line for line in read_lines(root / name / "metrics.jsonl") if "loss" in line]


def consumed(run, steps) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in run.corpus.sources}
    for step in steps:
        batch = run.batches.get(step)
        for tokens, source in zip(batch.tokens_BT.tolist(), batch.sources_B.tolist(), strict=True):
            found[run.corpus.sources[source]].append(tuple(tokens))
    return found


def test_phases_change_sources_and_repeat_no_sequence(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT, *CODE_LATER])
    parts = [consumed(run, steps) for steps in (range(6), range(6, 10), range(10, 13))]
    run.batches.close()
    assert len(parts[0]["text"]) == 48 and not parts[0]["code"]
    assert parts[1]["text"] and parts[1]["code"] and not parts[2]["text"]
    for source in ("text", "code"):
        taken = Counter(sequence for part in parts for sequence in part[source])
        stream = run.corpus.stream(source, TRAIN)
        there = Counter(tuple(stream.window(r * 48, 48).tolist()) for r in range(stream.num_sequences(48)))
        assert taken.total() < stream.num_sequences(48) and taken <= there, source


def test_limits_end_sources_and_too_long_runs_are_rejected(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, "+data.sources.code.max_epochs=0.1", "training.steps=30"])
    rows = run.corpus.stream("code", TRAIN).num_sequences(48)
    assert len(consumed(run, range(30))["code"]) == int(0.1 * rows) < 30 * 8 / 3
    limits = ["+data.sources.code.max_epochs=0.1", "+data.sources.text.max_epochs=0.2"]
    there = int(0.1 * rows) + int(0.2 * run.corpus.stream("text", TRAIN).num_sequences(48))
    reason = rf"training.steps=5000: phase main .*: {there * 48:,} tokens are left, but it needs 1,920,000; .*; try {there // 8}$"
    with pytest.raises(ConfigError, match=reason):
        trainer(tmp_path, "long", [*small_corpus, *limits, "training.steps=5000"])
    trainer(tmp_path, "fits", [*small_corpus, *limits, f"training.steps={there // 8}"])


def test_many_epochs_are_logged(tmp_path, small_corpus):
    trainer(tmp_path, "run", [*small_corpus, "training.steps=100000"])
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "source text is repeated" in text and "source code is repeated" in text
    trainer(tmp_path, "short", small_corpus)
    assert not (tmp_path / "short" / "log.txt").exists(), "without a warning there is no log"


def test_metrics_have_waiting_labels_padding_and_sources(tmp_path, small_corpus):
    before, big = threading.active_count(), [*small_corpus, "data.align=48", "training.global_batch_size=32"]
    found = train(tmp_path, "run", "training.steps=4", "logging.every=2", *big)
    assert threading.active_count() <= before, "the thread has ended"
    run = trainer(tmp_path, "other", [*big, "training.steps=4"])
    batches = [run.loaders["main"].batch(step) for step in range(4)]
    for line, pair in zip(found, (batches[:2], batches[2:]), strict=True):
        assert line["labelled_tokens"] == sum(int((batch.labels_BT != IGNORED).sum()) for batch in pair)
        assert 0 < line["padding_share"] < 0.1 and 0 <= line["data_wait_s"] < 5
        counts = [sum(int((batch.sources_B == source).sum()) for batch in pair) for source in (0, 1)]
        assert line["source_shares"] == dict(zip(run.corpus.sources, [round(c / 64, 4) for c in counts], strict=True))


def test_packed_sequences_train_and_need_their_length(tmp_path, small_corpus):
    packing = [*small_corpus, "data.packing=best_fit", "data.pack_seq_len=48"]
    train(tmp_path, "a", *packing, "training.steps=2")
    with pytest.raises(
        ConfigError, match=r"training.seq_len=64: sequences are packed for data.pack_seq_len=48; try 48"
    ):
        check(config(tmp_path, "b", *packing, "training.seq_len=64"), 1)
    with pytest.raises(ConfigError, match=r"phases.late.seq_len=96: sequences are packed"):
        check(config(tmp_path, "b", *packing, "+phases=[{name: late, steps: 1, seq_len: 96}]"), 1)


def test_an_unknown_source_of_the_first_phase_is_named(tmp_path, small_corpus):
    with pytest.raises(ConfigError, match=r"training.weights.txt: no such source; try text or code"):
        check(config(tmp_path, "a", *small_corpus, "+training.weights={txt: 1.0}"), 1)


@pytest.mark.parametrize("steps, every", [(10, 3), (9, 3), (2, 5)])
def test_online_windows_take_no_more_candidates_than_counted(steps, every):
    settings, chance = OnlineConfig(every=every, keep=0.4, hysteresis=0.3), np.random.default_rng(0)
    filter_ = OnlineFilter(settings, 8, 1, lambda ordinals: chance.random(len(ordinals)))
    window = OnlineWindow()
    for step in range(0, steps, every):
        window = filter_.next(window, step, min(every, steps - step))
    assert window.cursor <= candidates(settings, steps, 8)
    assert candidates(OnlineConfig(), steps, 8) == 8 * steps


def test_online_filtering_prefetches_within_its_windows(tmp_path, small_corpus):
    usual = [*small_corpus, "online.every=3", "training.steps=8"]
    found = [train(tmp_path, f"{depth}", *usual, f"data.prefetch={depth}") for depth in (0, 4)]
    losses = [[line["loss"] for line in lines] for lines in found]
    assert losses[0] == losses[1] and len(losses[0]) == 8
