"""What is refused before anything is built, under the key that mends it."""

from __future__ import annotations

import pytest

from core.config import load
from core.errors import ConfigError
from tests.support.tiny import TINY
from train.config import TrainConfig, check
from train.eval.held_out import EvaluateConfig


@pytest.mark.parametrize(
    "phase, key",
    [
        (
            "global_batch_size: 3, micro_batch_size: 2",
            r"phases\.later\.micro_batch_size=2: must divide a rank's 3 rows",
        ),
        ("seq_len: 50", r"phases\.later\.seq_len=50: must divide"),
    ],
)
def test_what_is_wrong_with_a_phase_is_said_of_the_phase(phase, key):
    def checked(phase: str) -> None:
        check(load("train", TrainConfig, [*TINY, "data.align=16", f"phases=[{{name: later, steps: 4, {phase}}}]"]), 1)

    checked("seq_len: 96")
    with pytest.raises(ConfigError, match=key):
        checked(phase)


def test_what_is_wrong_with_the_first_stretch_is_said_of_training():
    with pytest.raises(ConfigError, match=r"^training\.micro_batch_size=3: must divide"):
        check(load("train", TrainConfig, [*TINY, "training.micro_batch_size=3"]), 1)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"out": "a.json"}, "out=a.json: is for tasks, and none is named"),
        ({"limit": 3}, "limit=3: is for tasks"),
        ({"few_shot": 0}, "few_shot=0: is for tasks"),
        ({"task_path": "here"}, "task_path=here: is for tasks"),
        ({"tasks": ["a"], "few_shot": -3}, "few_shot=-3: must not be negative"),
        ({"tasks": ["a"], "sequences": 3}, "sequences=3: counts held-out"),
    ],
)
def test_evaluate_refuses_what_it_would_not_do(asked, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(run="run", **asked)


def test_evaluate_takes_what_it_does():
    of_tasks = EvaluateConfig(run="run", tasks=["a"], few_shot=0, limit=1, out="a.json", micro_batch_size=2)
    assert (of_tasks.few_shot, of_tasks.limit, of_tasks.out) == (0, 1, "a.json")
    assert EvaluateConfig(run="run", sequences=3, micro_batch_size=2).sequences == 3
