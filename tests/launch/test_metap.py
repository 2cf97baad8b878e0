"""The verb `metap`, as a user runs it: sweep, fit, transfer, train; check; mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from launch.cli import VERBS, _collected
from launch.metap import CheckConfig, MetapConfig
from launch.metap_sweep import SweepConfig, collect, loss_of
from tests.hparam.families import SMALL

QUICK = [
    *(one for one in SMALL if "vocab_size" not in one and "std" not in one),
    "model.vocab_size=320",
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=2",
    "training.steps=12",
    "schedule.warmup_steps=2",
    "evaluation.every=0",
    "evaluation.rows=2",
    "evaluation.baselines=false",
    "checkpoint.every=0",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, small_corpus):
    """A sweep of two sizes by the command, stopped and continued."""
    out = tmp_path_factory.mktemp("metap")
    how = ["sweep.low=-10", "sweep.high=-2", "sweep.step=4", "sweep.seeds=2", "sweep.axis=width", "sweep.factors=[1,2]"]
    leviathan = str(Path(sys.executable).with_name("leviathan"))
    line = [leviathan, "metap", "sweep", f"out={out}", *how, *QUICK, *small_corpus]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(line, cwd=out, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(line, cwd=out, env=environment, capture_output=True, text=True)
    assert "12 runs, 12 done before" in again.stdout
    return out


def test_a_sweep_leaves_a_run_for_each_rate_size_and_seed(swept):
    found = sorted(path.name for path in (swept / "runs").iterdir())
    assert len(found) == 12 and "width-x2-metap-lr-6-seed1" in found
    curves = collect([swept / "runs"])["metap"]
    assert list(curves) == ["width 32", "width 64"]
    assert curves["width 32"].losses.shape == (3, 2) and curves["width 32"].log2_lrs.tolist() == [-10, -6, -2]


def test_fit_then_transfer_then_train(swept, command, small_corpus):
    done = command("metap", "fit", f"out={swept}")
    assert done.returncode == 0, done.stderr
    found = json.loads((swept / "fit.json").read_text())["metap"]
    assert (
        set(found["optima"]) == {"width 32", "width 64"} and -10 < found["optima"]["width 32"]["log2_lr"]["value"] < -2
    )
    assert {"value", "low", "high"} == set(found["drift_octaves"])
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    base = yaml.safe_load((swept / "base.yaml").read_text())
    assert base["hparam"]["base"]["width"] == 32 and base["hparam"]["provenance"]["runs"] == 12
    larger = [*QUICK, "model.width=64", "model.heads=4", "model.kv_heads=4", "model.expert_width=128"]
    where = [f"base={swept / 'base.yaml'}", f"out={swept / 'carried'}", "name=wide"]
    done = command("metap", "transfer", *where, *larger, *small_corpus)
    assert done.returncode == 0, done.stderr
    assert "| query | width -> query_width |" in done.stdout and "Warning: the base is small" in done.stdout
    assert (swept / "carried" / "wide.md").read_text() in done.stdout
    line = shlex.split(done.stdout.strip().splitlines()[-1])[1:]
    trained = command(*line, "run.name=wide", "logging.report=false", cwd=swept)
    assert trained.returncode == 0, trained.stderr
    config = yaml.safe_load((swept / "runs" / "wide" / "config.yaml").read_text())
    written = yaml.safe_load((swept / "carried" / "experiment" / "wide.yaml").read_text())
    assert config["hparam"]["table"] == written["hparam"]["table"]
    assert config["optimizer"]["transferred"] == written["optimizer"]["transferred"]
    assert config["model"]["multipliers"]["residual"] == 1.0
    log = (swept / "runs" / "wide" / "log.txt").read_text()
    assert "hyperparameters: the base is small" in log

    path = swept / "carried" / "experiment" / "wide.yaml"
    path.write_text(re.sub(r"(router:\n\s+lr: )\S+", r"\g<1>0.5", path.read_text()))
    edited = command(*line, "run.name=edited", cwd=swept)
    assert edited.returncode == 2 and "optimizer.transferred.roles.router.lr=0.5: the rules find" in edited.stderr


@pytest.mark.slow
def test_a_search_goes_on_from_its_journal(tmp_path, command, small_corpus):
    how = ["sweep.low=-10", "sweep.high=-4", "sweep.seeds=1"]
    for trials in (3, 4):
        done = command("metap", "sweep", f"out={tmp_path}", f"sweep.trials={trials}", *how, *QUICK, *small_corpus)
        assert done.returncode == 0, done.stderr
        assert re.search(r"search: base: best 2\^-\d+\.\d+, loss \d", done.stdout)
        assert len(list((tmp_path / "runs").iterdir())) == trials


def test_a_check_says_what_failed(tmp_path, command, small_corpus):
    how = ["check.width=[1,2]", "check.depth=[]", "check.experts=[]", "check.seeds=1", "optimizer.lr=0.0078"]
    done = command("metap", f"out={tmp_path}", *how, *QUICK, *small_corpus)
    found = json.loads((tmp_path / "coordinates.json").read_text())
    assert done.returncode == (0 if found["pass"] else 1), done.stderr
    assert set(found["axes"]) == {"width"} and set(found["axes"]["width"]["slopes"]) == {"metap", "standard"}
    assert "residual" in found["axes"]["width"]["slopes"]["metap"]
    assert (tmp_path / "coordinates.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["transfer"], "base: name what to transfer from"),
        (["transfer", "base=nowhere.yaml"], "base=nowhere.yaml: cannot be read"),
        (["check", "check.width=[4,2]"], "check.width: needs ascending factors"),
        (["sweep", "sweep.low=-3", "sweep.high=-4"], "sweep.low=-3.0: must be below sweep.high=-4"),
        (["fit", "fit.runs=[nowhere]"], "fit.runs: no run in nowhere"),
        (["sweep", "modle.width=3"], "modle: no such key"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    from launch.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["metap", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_keys_of_train_go_to_train():
    words = [
        "out=x",
        "model.width=64",
        "+data.sources.a={kind: files, path: 'b c'}",
        "check.seeds=1",
        "experiment=smoke",
    ]
    mine = _collected(VERBS["metap"], MetapConfig, words)
    assert mine[:2] == ["out=x", "check.seeds=1"] and mine[2].startswith("train=['model.width=64',")
    assert _collected(VERBS["train"], MetapConfig, words) == words


def test_a_run_that_diverged_counts_as_infinite(tmp_path):
    assert loss_of(tmp_path) is None
    (tmp_path / "diverged.json").write_text("{}")
    assert loss_of(tmp_path) == float("inf")


def test_rates_are_octaves():
    assert SweepConfig(low=-8, high=-6, step=0.5).log2_rates == [-8, -7.5, -7, -6.5, -6]
    with pytest.raises(ConfigError, match="step=0"):
        SweepConfig(step=0)
    with pytest.raises(ConfigError, match="no axis is left"):
        CheckConfig([], [], [])
