"""Every layout has the parameter groups, initial values and factors of one process."""

from __future__ import annotations

from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hparam.scale import scale_of
from tests.support.tiny import config
from tests.support.tiny import trainer as tiny_trainer
from train.config import TrainConfig
from train.metap.hyperparameters import resolve

LAYOUTS = {"tp2": ["parallel.tp=2"], "ep2": ["parallel.ep=2"], "fsdp2": [], "pp2": ["parallel.pp=2"]}
EXACT = ["precision=fp64", "training.clip_norm=null"]


def with_base(root: Path, name: str, *overrides: str) -> TrainConfig:
    """Return a run with twice the width, depth, head size and experts of its base, so that no factor is 1."""
    run = config(root, name, "optimizer=adamw", "hparam.head=multiplier", *overrides)
    small = replace(run.model, hidden_size=16, num_layers=2, head_dim=4, dense_hidden_size=24, expert_hidden_size=16)
    small = replace(small, num_experts=2, router=replace(run.model.router, top_k=1))
    resolved = resolve(replace(run, hparam=replace(run.hparam, base=scale_of(small, 384, 2304))))
    factors = asdict(resolved.model.multipliers)
    assert factors == pytest.approx({"residual": 0.5, "logits": 0.5, "attention": 0.5**0.5, "gates": 0.5})
    return resolved


def groups(root: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of each parameter's group, the table of transferred values, and the losses of two steps."""
    with patch("tests.support.tiny.config", with_base):
        trainer = tiny_trainer(root, name, overrides)
    names = {parameter: name for name, parameter in trainer.engine.placed.model.named_parameters()}
    settings = itemgetter("name", "lr", "eps", "weight_decay", "betas")
    groups = trainer.engine.optimizer.param_groups
    found = {names[parameter]: settings(group) for group in groups for parameter in group["params"]}
    losses = [trainer.train_step(step).loss.item() for step in range(2)]
    return {"groups": found, "table": trainer.config.hparam.table, "losses": losses}


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory, small_corpus) -> dict[str, Any]:
    return ranks(1, groups, tmp_path_factory.mktemp("alone"), "alone", [*small_corpus, *EXACT])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_groups_of_one_process(ranks, tmp_path, small_corpus, alone, name):
    found = ranks(2, groups, tmp_path, name, [*small_corpus, *EXACT, *LAYOUTS[name]])
    together = {key: value for rank in found for key, value in rank["groups"].items()}
    assert together == alone["groups"] and len({own[1] for own in together.values()}) > 1
    for rank in found:
        assert rank["table"] == alone["table"]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-10)
