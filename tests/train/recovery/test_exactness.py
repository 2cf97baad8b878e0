"""Recovery is exact to the bit: a rewind repeats a run, and a skip equals a run that never had the documents."""

from __future__ import annotations

import json

import pytest

from core.errors import CheckpointError, ConfigError
from tests.support.tiny import trainer
from tests.train.recovery.planted import (
    NAN,
    SMALL,
    STEPS,
    digest_of,
    ledger,
    losses,
    multiply_marked,
    of_event,
    train,
    verdicts,
    write_corpus,
)
from train.checkpoint.manager import Checkpointer
from train.recovery.attribution import Attribution
from train.run_directory import committed
from train.trainer import Trainer

pytestmark = pytest.mark.slow
ONLINE = ["online.every=5", "online.keep=0.7", "optimizer=adamw", "optimizer.lr=3e-3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def mended(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a run that has met a document that gives NaN, and skipped it from step 10 on."""
    run = train(tmp_path_factory.mktemp("mended"), "run", corpus, NAN)
    assert isinstance(run, Trainer)
    return run


def stepped(run: Trainer, stop: int) -> list[tuple[float, float]]:
    found = []
    while run.step < stop:
        metrics = run.repeat_step()
        found.append((metrics.loss.item(), metrics.gradient_norm.item()))
    return found


@pytest.mark.parametrize("more", [["optimizer=adamw"], ["optimizer=muon"], ONLINE], ids=["adamw", "muon", "online"])
def test_a_rewind_repeats_the_run(corpus, tmp_path, monkeypatch, more):
    run = trainer(tmp_path, "run", [*SMALL, *corpus, *more])
    stepped(run, 4)
    run.save()
    first, digest = stepped(run, 12), digest_of(run)
    run.rewind(4)
    assert stepped(run, 12) == first and digest_of(run) == digest
    honest = Checkpointer.restore

    def without_moments(self, state, newest=None):
        return honest(self, [one for one in state if not one.name.startswith("optimizer.")], newest)

    monkeypatch.setattr(Checkpointer, "restore", without_moments)
    run.rewind(4)
    assert stepped(run, 12) != first, "control: a rewind without the moments"


def test_a_skip_equals_a_run_without_the_document(corpus, mended, tmp_path):
    amendments = mended.directory.amendments
    never = train(tmp_path, "never", [*corpus, f"recovery.amendments={amendments}"], NAN)
    assert isinstance(never, Trainer) and not never.directory.ledger.exists()
    assert losses(never.directory.path) == losses(mended.directory.path)
    assert digest_of(never) == digest_of(mended)
    content = json.loads(amendments.read_text())
    content["exclusions"][0]["start"] -= 100
    (tmp_path / "other.json").write_text(json.dumps(content))
    other = train(tmp_path, "other", [*corpus, f"recovery.amendments={tmp_path / 'other.json'}"], NAN)
    assert isinstance(other, Trainer) and digest_of(other) != digest_of(mended), "control: one more document"


def interrupted(*arguments) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["verdict", "trial", "action"])
def test_a_killed_recovery_ends_as_an_uninterrupted_one(corpus, mended, tmp_path, monkeypatch, place):
    """End the run as a kill does: before a trial, before the verdict, and between the ledger and the amendments."""
    owner, name = {
        "verdict": (Attribution, "_judged"),
        "trial": (Attribution, "_is_calm"),
        "action": ("train.recovery.amendments.Amendments", "write"),
    }[place]
    target = [owner, name] if not isinstance(owner, str) else [f"{owner}.{name}"]
    with monkeypatch.context() as patch:
        patch.setattr(*target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "run", corpus, NAN)
    left = trainer(tmp_path, "run", [*SMALL, *corpus])
    assert left.step in (10, 11, 12), "no checkpoint from after the trouble"
    left.directory.release()
    again = train(tmp_path, "run", corpus, NAN)
    assert isinstance(again, Trainer) and digest_of(again) == digest_of(mended)
    assert losses(again.directory.path) == losses(mended.directory.path)


def test_a_mended_run_resumes_exactly(corpus, mended, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_must_stop", lambda self, interruption, step: step == 17)
        multiply_marked(patch, NAN)
        assert trainer(tmp_path, "run", [*SMALL, *corpus]).fit() == 130
    again = train(tmp_path, "run", corpus, NAN)
    assert isinstance(again, Trainer) and digest_of(again) == digest_of(mended)
    assert verdicts(again.directory.path) == ["data"]


def test_lost_or_changed_amendments_are_rejected(corpus, tmp_path, monkeypatch):
    run = train(tmp_path, "run", corpus, NAN)
    path = run.directory.amendments
    content = json.loads(path.read_text())
    for change, error, reason in (
        ({"exclusions": []}, CheckpointError, "lacks amendments"),
        ({"corpus": "x"}, ConfigError, "of a run on other data"),
        ({"exclusions": [{"source": "text"}]}, ConfigError, "cannot be read"),
        ({"lower_rates": [{"step": 1, "stop": 2, "factor": float("nan")}]}, ConfigError, "does not lower"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(error, match=reason):
            trainer(tmp_path, "run", [*SMALL, *corpus])
    path.write_text(json.dumps(content))
    text = run.directory.ledger.read_text()
    run.directory.ledger.write_text(text + '{"time": 1, "st')
    trainer(tmp_path, "run", [*SMALL, *corpus])
    assert run.directory.ledger.read_text() == text, "a line that a kill has truncated is removed"
    for damaged, reason in ((text + "{]\n", "is damaged"), (text.replace('"run": "', '"run": "x'), "of another run")):
        run.directory.ledger.write_text(damaged)
        with pytest.raises(ConfigError, match=reason):
            trainer(tmp_path, "run", [*SMALL, *corpus])


def test_amendments_by_hand_go_back_to_a_checkpoint_before_them(corpus, tmp_path):
    """A user excludes documents from step 22 on: the run resumes from step 20, not from step 25 or 30."""
    run = train(tmp_path, "run", corpus)
    own = {"corpus": run.corpus.fingerprint, "lower_rates": []}
    span = {"source": "text", "start": 100, "stop": 200}
    for step, resumed in ((27, 25), (3, None)):
        (tmp_path / "by_hand.json").write_text(json.dumps({**own, "exclusions": [{**span, "step": step}]}))
        more = [*SMALL, *corpus, f"recovery.amendments={tmp_path / 'by_hand.json'}"]
        if resumed is None:
            with pytest.raises(ConfigError, match="no checkpoint is from before it"):
                trainer(tmp_path, "run", more)
        else:
            again = trainer(tmp_path, "run", more)
            assert again.step == resumed and again.fit() == 0
    assert committed(run.directory.checkpoints)[-1].step == STEPS


def test_callbacks_that_report_do_not_see_trials(corpus, mended):
    assert list(losses(mended.directory.path)) == list(range(1, STEPS + 1)), "lines of void steps are removed"
    trials = of_event(mended.directory.path, "evidence")
    assert [line["trial"] for line in trials] == ["rerun", "without_outliers", "older_checkpoint"]
    assert all(
        set(line) >= {"time", "step", "event", "detector", "statistics", "verdict", "action"}
        for line in ledger(mended.directory.path)
    )
