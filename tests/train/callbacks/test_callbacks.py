"""Callbacks in a run: the profiler's files, names of metrics that are taken, and callbacks without stored state."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from core.files import write_json
from tests.support.tiny import trainer
from train.callbacks import base, logging


class Mine(base.Callback):
    key = "mine"

    def metrics(self):
        return {"loss": 1.0}

    def load_state_dict(self, state):
        raise AssertionError("there is none")


def test_a_new_callback_starts_fresh_and_takes_no_name_of_ours(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", small_corpus)
    run.callbacks = [Mine(run), logging.LoggingCallback(run)]
    run._restore_callbacks({"another": {"a": 1}})
    assert "callback mine has no state in the checkpoint and starts fresh" in (tmp_path / "run/log.txt").read_text()
    run.callbacks[1].before_training()
    with pytest.raises(ConfigError, match=r"callbacks=mine: metrics\(\) returns loss, which is taken; rename it"):
        run.callbacks[1].after_step(1, run.train_step(0))


def test_the_log_shows_the_planned_speed(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", small_corpus)
    write_json(run.directory.prediction, {"tokens_per_second": 12345.0, "memory_bytes": 1})
    callback = logging.LoggingCallback(run)
    callback.before_training()
    callback.after_step(1, run.train_step(0))
    assert "tok/s (planned 12,345)" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
def test_the_profiler_writes_its_files(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, "profile.steps=[1]", "training.steps=2", "checkpoint.every=0"])
    assert run.fit() == 0
    written = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert written == ["step-00000001.memory.txt", "step-00000001.trace.json"]
    with pytest.raises(ConfigError, match=r"profile\.memory=true: memory snapshots need a GPU"):
        trainer(tmp_path, "other", [*small_corpus, "profile.steps=[1]", "profile.memory=true"])
