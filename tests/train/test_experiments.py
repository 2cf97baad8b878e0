"""The runs under `configs/experiment`, and the proxies whose hyperparameters they transfer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.proxies import PROXIES, RUN
from core.config import load
from core.errors import ConfigError
from hparam.scale import kind_of
from launch.metap.runs import bases
from model.config import ModelConfig
from model.multipliers import fold_multipliers
from train.config import TrainConfig
from train.metap.hyperparameters import derive, resolve, scale_of_run

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").iterdir())
NEEDED = {"smoke_captions": ["data.tokenizer.path=text/tokenizer.json"]}
"""Keys that an experiment leaves to the user."""
OWN_SIZE = ("glyphs_contrastive", "scenes_contrastive", "smoke_captions", "smoke_vision")
"""Experiments that were tuned at their own size."""
FITS = sorted(path.stem for path in (CONFIGS / "hparam").iterdir() if path.stem != "none")


def weightless(model: ModelConfig) -> Any:
    return SimpleNamespace(config=model, shapes={}, dtypes={})


def experiment(name: str, *overrides: str) -> TrainConfig:
    return load("train", TrainConfig, [f"experiment={name}", *NEEDED.get(name, ()), *overrides])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in OWN_SIZE])
def test_every_experiment_transfers_its_hyperparameters(name):
    run = resolve(experiment(name))
    assert run.hparam.base is not None and run.hparam.kind == kind_of(run.model)
    assert run.optimizer.transferred is not None
    base, here = run.hparam.base, scale_of_run(run)
    rates = {role: own.lr for role, own in run.optimizer.transferred.roles.items()}
    assert rates["query"] / rates["embedding"] == pytest.approx(base.hidden_size / here.hidden_size)
    assert run.model.multipliers.residual == pytest.approx(base.num_layers / here.num_layers)
    assert not any("sparsity" in line for line in derive(run).warnings), "the same sparsity"
    assert fold_multipliers(weightless(run.model)).config.multipliers.residual == 1, "it can be exported"
    if "weightless" in {layer.qk_norm.value for layer in run.model.blocks}:
        other = resolve(experiment(name, "hparam.base.head_dim=8")).model
        with pytest.raises(ConfigError, match=r"multipliers.attention.*without a gain"):
            fold_multipliers(weightless(other))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_model_of_another_kind_is_rejected(name):
    other = "mixtral" if name != "mixtral_8x7b" else "olmoe"
    with pytest.raises(ConfigError, match=r"hparam.kind.*hparam=none"):
        resolve(experiment(name, f"hparam={other}"))
    assert resolve(experiment(name, "hparam=none")).optimizer.transferred is None


def test_every_proxy_is_checked_in_and_nothing_else():
    assert sorted(PROXIES) == FITS


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_of_the_proxy_that_its_sweep_describes(name):
    words = [word for word in [*RUN, *PROXIES[name]] if not word.startswith("sweep.")]
    settings = list(bases(words).values())
    fit = load("train", TrainConfig, [f"hparam={name}"])
    assert fit.hparam.base == scale_of_run(settings[0]) and fit.hparam.kind == kind_of(settings[0].model)
    assert fit.model.init == settings[0].model.init
    assert fit.optimizer.weight_decay in {one.optimizer.weight_decay for one in settings}
    found = fit.hparam.provenance
    assert fit.optimizer.lr == pytest.approx(2 ** found["log2_lr"]["value"], rel=1e-3)
    said = dict(word.split("=", 1) for word in [*RUN, *PROXIES[name]])
    assert float(said["sweep.low"]) < math.log2(fit.optimizer.lr) < float(said["sweep.high"])
    assert found["runs"] > 0 and found["loss"]["value"] > 0
