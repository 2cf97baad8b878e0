"""Wrong settings are rejected before anything is built, with the key to change."""

from __future__ import annotations

import pytest

from core.config import load
from core.errors import ConfigError
from launch.verbs.evaluate import EvaluateConfig
from tests.support.tiny import TINY
from train.config import TrainConfig, check

LATER = "phases=[{name: later, steps: 4, "


@pytest.mark.parametrize(
    "override, key",
    [
        (
            LATER + "global_batch_size: 3, micro_batch_size: 2}]",
            r"phases\.later\.micro_batch_size=2: must divide a rank's 3 ",
        ),
        (LATER + "seq_len: 50}]", r"phases\.later\.seq_len=50: must divide"),
        ("training.micro_batch_size=3", r"^training\.micro_batch_size=3: must divide"),
    ],
)
def test_errors_name_the_phase(override, key):
    with pytest.raises(ConfigError, match=key):
        check(load("train", TrainConfig, [*TINY, "data.align=16", override]), 1)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"few_shot": 0}, "few_shot=0: applies to tasks"),
        ({"task_path": "here"}, "task_path=here: applies to tasks"),
        ({"tasks": ["a"], "few_shot": -3}, "few_shot=-3: must not be negative"),
        ({"tasks": ["a"], "sequences": 3}, "sequences=3: applies to the held-out"),
    ],
)
def test_evaluate_rejects_settings_it_ignores(asked, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(run="run", **asked)
