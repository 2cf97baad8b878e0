"""Spikes need a median, a spread, a ratio and patience; NaN needs nothing. Digests notice every single bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from core.exit_codes import ATTEMPT
from train.checkpoint.manager import superfluous
from train.recovery.amendments import Amendments, LowerRate
from train.recovery.config import RecoveryConfig
from train.recovery.detector import Detector, Finding
from train.recovery.ledger import Ledger
from train.recovery.replicas import digest
from train.run_directory import CommittedCheckpoint

CONFIG = RecoveryConfig(window=32, history=8, patience=3)


def watched(values: list[float], config: RecoveryConfig = CONFIG, calm: int = 40) -> list[Finding]:
    """Watch a noisy loss of about 3 for `calm` steps, then `values`."""
    draw, detector, found = random.Random(0), Detector(config), []
    for step, value in enumerate([draw.gauss(3, 0.02) for _ in range(calm)] + values, 1):
        found += detector.observe(step, {"loss": value, "gradient_norm": 1.0})
    return found


def test_a_spike_is_an_alarm_only_after_patience():
    (alarm,) = watched([9.0] * 3)
    assert (alarm.detector, alarm.first, alarm.step, alarm.healed) == ("loss", 41, 43, False)
    assert alarm.statistics["median"] == pytest.approx(3, abs=0.02) and alarm.statistics["suspicious_steps"] == 3
    (note,) = watched([9.0, 9.0, 3.0])
    assert note.healed and (note.first, note.step) == (41, 42) and note.statistics["value"] == 9
    (alarm, note) = watched([9.0] * 300 + [3.0])
    assert note.healed and note.statistics["suspicious_steps"] == 300, "trouble does not become usual, and alarms once"


@pytest.mark.parametrize(
    "values, changes, calm",
    [
        ([3.3] * 9, {}, 40),  # many deviations, but a small ratio
        ([9.0] * 9, {"deviations": 1e9}, 40),  # a large ratio, but few deviations
        ([9.0] * 3, {}, 5),  # too short a history
        ([3.0 - 0.002 * i for i in range(500)], {}, 40),  # a falling loss
    ],
)
def test_calm_values_are_calm(values, changes, calm):
    assert watched(values, replace(CONFIG, **changes), calm) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_an_alarm_at_once(value):
    (alarm,) = watched([value], calm=0)
    assert (alarm.detector, alarm.step, alarm.healed) == ("not_finite", 1, False)


def test_a_restored_detector_continues():
    one, other, values = Detector(CONFIG), Detector(CONFIG), [3.0] * 20 + [9.0] * 2
    for step, value in enumerate(values):
        one.observe(step, {"loss": value, "gradient_norm": 1.0})
    other.load_state_dict(one.state_dict())
    last = {"loss": 9.0, "gradient_norm": 1.0}
    assert other.observe(22, last) == one.observe(22, last) != []
    assert Detector(CONFIG).observe(22, last) == [], "control: without the state"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_digest_notices_each_bit_and_place(dtype):
    tensor = torch.arange(1, 61).reshape(5, 12).to(dtype)
    usual, size = digest(tensor), tensor.element_size()
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    for bit in range(8 * size):
        flipped = tensor.clone()
        flipped.view(as_integers)[2, 3] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63)).to(as_integers)
        assert digest(flipped) != usual
    assert digest(tensor.flip(0)) != usual and digest(tensor.clone()) == usual


def test_a_good_checkpoint_outlives_the_newest_ones():
    present = [CommittedCheckpoint(step, Path(str(step))) for step in (10, 20, 30, 31, 32)]
    assert [one.step for one in superfluous(present, 2, 1, 5)] == [10, 30]
    assert [one.step for one in superfluous(present, 2, 0, 5)] == [10, 20, 30]
    assert superfluous(present, 2, 9, 0) == [] and superfluous(present[:1], 1, 1, 50) == []


def test_the_last_lower_rate_counts_and_only_in_its_steps():
    found = Amendments().plus(lower_rates=[LowerRate(5, 9, 0.5), LowerRate(7, 12, 0.1)])
    assert [found.learning_rate_factor(step) for step in (4, 5, 7, 11, 12)] == [1, 0.5, 0.1, 0.1, 1]
    assert found.before(7) == Amendments().plus(lower_rates=[LowerRate(5, 9, 0.5)])
    assert Amendments.of(found.plain()) == found


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"history": 200}, "history=200: must not exceed window=128"),
        ({"loss_ratio": 0.5}, "loss_ratio=0.5: must be at least 1"),
        ({"patience": 0}, "patience=0: must be positive"),
        ({"lr_factor": 2.0}, "lr_factor=2.0: must not exceed 1"),
    ],
)
def test_wrong_settings_are_rejected(wrong, message):
    with pytest.raises(ConfigError, match=message):
        RecoveryConfig(**wrong)


def test_a_ledger_keeps_the_launchers_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "198d5e4e")
    ledger = Ledger(tmp_path / "recovery.jsonl", "x", print)
    ledger.write("alarm", 14, detector="loss")
    (line,) = Ledger(ledger.path, "x", print).read()
    assert line == ledger.lines[0] and (line["attempt"], line["verdict"]) == ("198d5e4e", None)
    assert Ledger(None, "x", print).read() == [], "another rank"
