"""Hyperparameters belong to the whole model: every layout has the groups and factors of one process."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hparam.scale import scale_of
from parallel.comm.world import connect
from tests.support.tiny import config
from train.config import TrainConfig
from train.corpus import get_corpus
from train.metap.hyperparameters import resolve
from train.metrics import Log
from train.run_directory import RunDirectory
from train.trainer import Trainer

LAYOUTS = {"tp2": ["parallel.tp=2"], "ep2": ["parallel.ep=2"], "fsdp2": [], "pp2": ["parallel.pp=2"]}
EXACT = ["precision=fp64", "training.clip_norm=null"]
SMALL = {"hidden_size": 16, "num_layers": 2, "head_dim": 4, "dense_hidden_size": 24, "num_experts": 2}


def with_base(root: Path, name: str, overrides: list[str]) -> TrainConfig:
    """A run twice as wide and deep as its base, with twice the head size and experts: no factor is 1."""
    run = config(root, name, "optimizer=adamw", "hparam.head=multiplier", *overrides)
    small = replace(run.model, **SMALL, expert_hidden_size=16, router=replace(run.model.router, top_k=1))
    resolved = resolve(replace(run, hparam=replace(run.hparam, base=scale_of(small, 384, 2304))))
    factors = asdict(resolved.model.multipliers)
    assert factors == pytest.approx({"residual": 0.5, "logits": 0.5, "attention": 0.5**0.5, "gates": 0.5})
    return resolved


def groups(root: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """By parameter name its optimizer settings; and the losses of two steps."""
    run, world = with_base(root, name, overrides), connect()
    directory = RunDirectory.of(run)
    world.from_main(lambda: directory.open(run))
    corpus = get_corpus(run, world, lambda line: None)
    trainer = Trainer(run, run.parallel.resolve(world.size), world, directory, corpus, Log(None))
    names = {parameter: name for name, parameter in trainer.engine.placed.model.named_parameters()}
    found = {
        names[parameter]: (group["name"], group["lr"], group["eps"], group["weight_decay"], group["betas"])
        for group in trainer.engine.optimizer.param_groups
        for parameter in group["params"]
    }
    return {"groups": found, "table": run.hparam.table, "losses": [trainer.train_step(s).loss.item() for s in range(2)]}


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory, small_corpus) -> dict[str, Any]:
    """Those of one process."""
    return ranks(1, groups, tmp_path_factory.mktemp("alone"), "alone", [*small_corpus, *EXACT])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_groups_of_one_process(ranks, tmp_path, small_corpus, alone, name):
    found = ranks(2, groups, tmp_path, name, [*small_corpus, *EXACT, *LAYOUTS[name]])
    together = {key: value for rank in found for key, value in rank["groups"].items()}
    assert together == alone["groups"] and len({own[1] for own in together.values()}) > 1
    for rank in found:
        assert rank["table"] == alone["table"]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-10)
