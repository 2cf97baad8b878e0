"""A sweep on this machine runs one run after the other, even if some fail, until the user interrupts it."""

from __future__ import annotations

import pytest

from core.errors import ConfigError, LeviathanError
from core.exit_codes import CRASHED
from launch import agent
from launch.cli import main

SWEEP = ["train", "run.name=s", "optimizer.lr=1e-3,2e-3,3e-3"]
TWO_RANKS = ["launch=torchrun", "launch.processes=2"]


@pytest.fixture(params=["inline", pytest.param("torchrun", marks=pytest.mark.slow)])
def sweep(request, monkeypatch, tmp_path):
    """Return `sweep(outcomes)`: its runs end with these codes or errors. It returns its code and the runs begun."""

    def run(outcomes: dict[str, int | Exception]) -> tuple[int, list[str]]:
        begun: list[str] = []

        def end(name: str) -> int:
            begun.append(name)
            outcome = outcomes.get(name, 0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr("train.trainer.run", lambda config: end(config.run.name))
        monkeypatch.setattr(agent, "run", lambda node: end(node.job))
        return main([*SWEEP, f"run.root={tmp_path}", *(TWO_RANKS if request.param == "torchrun" else [])]), begun

    return run


def test_an_interrupted_sweep_stops(sweep):
    assert sweep({}) == (0, ["s-0", "s-1", "s-2"]), "control"
    assert sweep({"s-1": 130}) == (130, ["s-0", "s-1"])
    assert sweep({"s-0": 1, "s-1": 130}) == (130, ["s-0", "s-1"]), "a failed run does not end the sweep"
    assert sweep({"s-1": agent.AgentInterrupted(15)}) == (130, ["s-0", "s-1"])


def test_a_failed_run_of_a_sweep_does_not_stop_the_others(sweep, capsys):
    diverged = LeviathanError("the loss after step 3 is nan")
    outcomes = {"s-0": diverged, "s-2": ConfigError("model.vocab_size", 1, "too small")}
    assert sweep(outcomes) == (1, ["s-0", "s-1", "s-2"])
    assert capsys.readouterr().err.splitlines() == [
        "leviathan: error: s-0: the loss after step 3 is nan",
        "leviathan: error: s-2: model.vocab_size=1: too small",
    ]
    assert sweep({"s-1": 2}) == (2, ["s-0", "s-1", "s-2"])


def test_a_crash_under_torchrun_ends_one_run_of_a_sweep(monkeypatch, capsys, tmp_path):
    codes = {"s-0": CRASHED, "s-1": 0, "s-2": 0}
    monkeypatch.setattr(agent, "run", lambda node: codes.pop(node.job))
    assert main([*SWEEP, *TWO_RANKS, f"run.root={tmp_path}"]) == 1 and codes == {}
    assert capsys.readouterr().err.startswith("leviathan: error: s-0: s-0 failed; rerun with run.name=s-0")
