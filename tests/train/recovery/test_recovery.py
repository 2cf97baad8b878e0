"""Planted troubles are detected, attributed to the right cause and mended without a hand."""

from __future__ import annotations

import pytest

from tests.train.recovery.planted import (
    FIRST,
    GARBAGE,
    MARK_ID,
    NAN,
    STEPS,
    ledger,
    of_event,
    outcome,
    planted_callback,
    train,
    verdicts,
    write_corpus,
)

ONLINE = ["online.every=5", "online.keep=0.7"]
BUMP = [
    "schedule.kind=tests.train.recovery.planted:rate_bump",
    "+schedule.options={first: 12, last: 14, factor: 400}",
    "recovery.lr_factor=0.001",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("recovery"))


def test_a_document_that_gives_nan_is_skipped(corpus, tmp_path):
    found = train(tmp_path, "run", corpus, NAN)
    assert not isinstance(found, Exception) and found.step == STEPS
    run = tmp_path / "run"
    (alarm,), (action,) = of_event(run, "alarm"), of_event(run, "action")
    assert (alarm["step"], alarm["detector"], alarm["checkpoint"]) == (FIRST + 1, "not_finite", 10)
    assert (action["verdict"], action["action"]) == ("data", "rewind+skip")
    (document,) = action["documents"]
    tokens = found.corpus.stream("text", "train").window(document["start"], document["stop"] - document["start"])
    assert (tokens == MARK_ID).sum() == 40 and len(tokens) == 42, "exactly the document is blamed"
    seen = [found.loaders["main"].batch(step) for step in range(10, STEPS)]
    assert not any((batch.tokens_BT == MARK_ID).any() for batch in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "factor, overrides, detector, found",
    [
        pytest.param(GARBAGE, [], "loss", ["data"], id="garbage"),
        pytest.param(
            GARBAGE, [planted_callback("HarmlessEarly", step=11)], "loss", ["data_and_state"], id="interaction"
        ),
        pytest.param(
            GARBAGE, [*ONLINE, planted_callback("HarmlessEarly", step=11)], "loss", ["data_and_state"], id="online"
        ),
        pytest.param(None, BUMP, "loss", ["state"], id="learning_rate"),
        pytest.param(None, [planted_callback("Scaled", step=13, once=True)], "loss", ["corruption"], id="transient"),
        pytest.param(None, [planted_callback("NanWeight", step=13, once=True)], "not_finite", ["corruption"], id="nan"),
        pytest.param(
            None,
            [planted_callback("RouterCollapse", step=13, once=True), "recovery.norm_ratio=1e6"],
            "router_z",
            ["corruption"],
            id="router",
        ),
    ],
)
def test_troubles_find_their_cause(corpus, tmp_path, factor, overrides, detector, found):
    assert outcome(tmp_path, "run", [*corpus, *overrides], factor) == (STEPS, "")
    run = tmp_path / "run"
    assert verdicts(run) == found, ledger(run)
    assert [line["detector"] for line in of_event(run, "alarm")] == [detector]


@pytest.mark.slow
def test_trouble_that_comes_twice_is_mended_twice(tmp_path):
    corpus = write_corpus(tmp_path / "twice", (130, 200))
    assert outcome(tmp_path, "run", corpus, NAN) == (STEPS, "")
    assert verdicts(tmp_path / "run") == ["data", "data"]
    assert [line["retries_left"] for line in of_event(tmp_path / "run", "action")] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("callback, message", [("NanWeight", "is nan"), ("Scaled", "raise recovery.loss_ratio")])
def test_trouble_that_always_comes_ends_the_run(corpus, tmp_path, callback, message):
    step, error = outcome(tmp_path, "run", [*corpus, planted_callback(callback, step=13)])
    lines = ledger(tmp_path / "run")
    assert step == -1 and message in error
    assert verdicts(tmp_path / "run") == ["state"] * 3
    assert lines[-1]["event"] == "stop" and lines[-1]["verdict"] == "it came again after 3 retries"


@pytest.mark.slow
def test_a_detector_that_always_fires_names_its_threshold(corpus, tmp_path):
    nervous = ["recovery.deviations=1e-6", "recovery.norm_ratio=1", "recovery.patience=1", "recovery.suspects=0"]
    step, error = outcome(tmp_path, "run", [*corpus, *nervous])
    assert step == -1 and "if the run is sound, raise recovery.norm_ratio or recovery.deviations" in error
    assert len(of_event(tmp_path / "run", "action")) == 3


@pytest.mark.slow
def test_a_spike_that_heals_is_only_noted(corpus, tmp_path):
    assert outcome(tmp_path, "run", [*corpus, "optimizer=adamw", "optimizer.lr=3e-3"], 300.0) == (STEPS, "")
    assert {line["event"] for line in ledger(tmp_path / "run")} == {"note"}


@pytest.mark.slow
def test_observing_changes_nothing(corpus, tmp_path):
    step, error = outcome(tmp_path, "run", [*corpus, "recovery=observe"], NAN)
    assert step == -1 and "is nan: start a new run" in error
    assert [line["event"] for line in ledger(tmp_path / "run")] == ["alarm"]
    assert not (tmp_path / "run" / "amendments.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("setting, events", [("stop", ["alarm", "stop"]), ("go_on", ["alarm", "action"])])
def test_without_a_checkpoint_a_run_stops_or_goes_on(corpus, tmp_path, setting, events):
    more = [
        "checkpoint.every=0",
        f"recovery.without_checkpoint={setting}",
        planted_callback("Scaled", step=13, once=True),
    ]
    step, error = outcome(tmp_path, "run", [*corpus, *more])
    assert [line["event"] for line in ledger(tmp_path / "run")][:2] == events
    assert (step == STEPS) == (setting == "go_on") and ("no checkpoint is from before" in error) == (setting == "stop")
