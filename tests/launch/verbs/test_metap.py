"""The verb `metap`, as a user runs it: sweep, fit, transfer, train; check; mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from core.errors import ConfigError
from hparam.axes import SizeAxis
from launch.cli import VERBS, _collected, main
from launch.local import named
from launch.metap.config import FitConfig, SweepConfig
from launch.metap.fit import collect, fit
from launch.metap.runs import SweepSetting, bases, is_done, loss_of, member, one_run, settings
from launch.metap.sweep import sweep
from launch.verbs.metap import MetapConfig
from tests.support.families import SMALL, family
from train.metap.hyperparameters import as_base
from train.run_directory import write_config

QUICK = [
    "hparam=none",
    *(one for one in SMALL if "vocab_size" not in one and "std" not in one),
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "training.steps=12",
    "schedule.warmup_steps=2",
    "evaluation.every=0",
    "evaluation.sequences=2",
    "evaluation.baselines=false",
    "checkpoint.every=0",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, small_corpus):
    """Run a sweep of two sizes by the command, and then again, which repeats no run."""
    out = tmp_path_factory.mktemp("metap")
    how = ["sweep.low=-10", "sweep.high=-2", "sweep.step=4", "sweep.seeds=2", "sweep.axis=width", "sweep.factors=[1,2]"]
    for done in (0, 12):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["metap", "sweep", f"out={out}", *how, *QUICK, *small_corpus]) == 0
        assert f"12 runs, {done} done before" in said.getvalue()
    return out


def test_a_sweep_leaves_a_run_for_each_rate_size_and_seed(swept):
    found = sorted(path.name for path in (swept / "runs").iterdir())
    assert len(found) == 12 and "width-x2-metap-lr-6-seed1" in found
    curves = collect([swept / "runs"])["metap"]
    assert list(curves) == ["hidden_size 32", "hidden_size 64"]
    small = curves["hidden_size 32"].curve
    assert small.losses.shape == (3, 2) and small.log2_lrs.tolist() == [-10, -6, -2]


@pytest.mark.slow
def test_fit_then_transfer_then_train(swept, command, small_corpus):
    done = command("metap", "fit", f"out={swept}")
    assert done.returncode == 0, done.stderr
    found = json.loads((swept / "fit.json").read_text())["metap"]
    assert set(found["optima"]) == {"hidden_size 32", "hidden_size 64"}
    assert -10 < found["optima"]["hidden_size 32"]["log2_lr"]["value"] < -2
    base = yaml.safe_load((swept / "base.yaml").read_text())
    assert base["hparam"]["base"]["hidden_size"] == 32 and base["hparam"]["provenance"]["runs"] == 12
    sizes = ["model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=4", "model.expert_hidden_size=128"]
    larger = [*QUICK, "hparam.alpha=0.5", "optimizer.weight_decay=0.3", *sizes]
    where = [f"base={swept / 'base.yaml'}", f"out={swept / 'carried'}", "name=wide"]
    done = command("metap", "transfer", *where, *larger, *small_corpus)
    assert done.returncode == 0, done.stderr
    assert "| query | hidden_size -> query_width |" in done.stdout and "Warning: the base is small" in done.stdout
    assert (swept / "carried" / "wide.md").read_text() in done.stdout
    line = shlex.split(done.stdout.strip().splitlines()[-1])[1:]
    trained = command(*line, "run.name=wide", "logging.report=false", cwd=swept)
    assert trained.returncode == 0, trained.stderr
    config = yaml.safe_load((swept / "runs" / "wide" / "config.yaml").read_text())
    written = yaml.safe_load((swept / "carried" / "experiment" / "wide.yaml").read_text())
    for section, key in (("hparam", "table"), ("optimizer", "transferred")):
        assert config[section][key] == written[section][key]
    assert config["model"]["multipliers"]["residual"] == 1.0
    assert config["hparam"]["alpha"] == 0.5 and config["optimizer"]["weight_decay"] == 0.3, "the user's values"
    assert written["hparam"]["provenance"]["base"].endswith("base.yaml") and written["hparam"]["provenance"]["code"]
    assert "hyperparameters: the base is small" in (swept / "runs" / "wide" / "log.txt").read_text()
    path = swept / "carried" / "experiment" / "wide.yaml"
    path.write_text(re.sub(r"(router:\n\s+lr: )\S+", r"\g<1>0.5", path.read_text()))
    edited = command(*line, "run.name=edited", cwd=swept)
    assert edited.returncode == 2 and "optimizer.transferred.roles.router.lr=0.5: the rules derive" in edited.stderr


@pytest.mark.slow
def test_a_search_goes_on_from_its_journal(tmp_path, command, small_corpus):
    how = ["sweep.low=-10", "sweep.high=-4", "sweep.seeds=1"]
    for trials in (3, 4):
        done = command("metap", "sweep", f"out={tmp_path}", f"sweep.trials={trials}", *how, *QUICK, *small_corpus)
        assert done.returncode == 0, done.stderr
        assert re.search(r"search: base: best 2\^-\d+\.\d+, loss \d", done.stdout)
        assert len(list((tmp_path / "runs").iterdir())) == trials


@pytest.mark.parametrize("limit", [1e-9, 1e9])
def test_a_check_says_what_failed(tmp_path, monkeypatch, small_corpus, limit):
    monkeypatch.setattr("hparam.coordinate_check.LIMITS", {SizeAxis.width: {"residual": limit}})
    how = ["check.width=[1,2]", "check.depth=[]", "check.experts=[]", "check.seeds=1", "optimizer.lr=0.0078"]
    assert main(["metap", f"out={tmp_path}", *how, *QUICK, *small_corpus]) == (limit < 1)
    found = json.loads((tmp_path / "coordinates.json").read_text())
    assert found["pass"] == (limit > 1) == (not found["failures"])
    slopes = found["axes"].pop("width")["slopes"]
    assert not found["axes"] and set(slopes) == {"metap", "standard"} and "residual" in slopes["metap"]
    assert (tmp_path / "coordinates.png").exists()


def test_keys_of_train_go_to_train():
    source = "+data.sources.a={kind: files, path: 'b c'}"
    words = ["out=x", "model.hidden_size=64", source, "check.seeds=1", "experiment=smoke"]
    mine = _collected(VERBS["metap"], MetapConfig, words)
    assert mine[:2] == ["out=x", "check.seeds=1"] and mine[2].startswith("train=['model.hidden_size=64',")
    assert _collected(VERBS["train"], MetapConfig, words) == words


def made_up(out: Path, optimum: Callable[[int], float], *overrides: str, tokens: Sequence[int] = (8, 16, 32)) -> None:
    """Write runs that were never trained; their losses are parabolas in log2 of the rate."""
    for steps in tokens:
        base = family(*overrides, f"training.steps={steps}")
        for log2_lr in range(-8, -3):
            for seed in range(2):
                run = member(SweepConfig(), SweepSetting(base), log2_lr, seed, out / str(steps))
                path = out / str(steps) / "runs" / str(run.run.name)
                path.mkdir(parents=True)
                write_config(path / "config.yaml", run)
                loss = 2 + 0.01 * (log2_lr - optimum(steps)) ** 2 + 0.001 * seed
                (path / "summary.json").write_text(json.dumps({"heldout_loss": loss}))


@pytest.mark.slow
def test_exponents_of_runs_without_a_base(tmp_path, capsys):
    made_up(tmp_path, lambda steps: -6 - 0.4 * math.log2(steps / 8))
    assert fit(FitConfig([str(tmp_path)]), tmp_path) == 0
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    assert base["hparam"]["tokens_exponent"] == pytest.approx(0.4, abs=1e-3)
    assert base["hparam"]["base"]["tokens"] == 8 * 512 and base["optimizer"]["lr"] == pytest.approx(2**-6, rel=1e-3)
    assert (tmp_path / "optima_tokens.png").exists()
    said = capsys.readouterr().out
    assert "best rate ~ tokens^-0.400" in said and "octaves apart: do not extrapolate" in said


@pytest.mark.slow
def test_exponents_of_runs_with_a_base_are_added(tmp_path):
    """A fall as tokens^-0.3 was assumed, but rates at the base still rise as tokens^0.1: they fall as tokens^-0.2."""
    small = as_base(family("training.steps=4"))
    sizes = [f"hparam.base.{key}={value}" for key, value in asdict(small.hparam.base).items()]
    made_up(tmp_path, lambda steps: -6 + 0.1 * math.log2(steps / 8), *(f"+{one}" for one in sizes))
    assert fit(FitConfig([str(tmp_path)]), tmp_path) == 0
    hparam = yaml.safe_load((tmp_path / "base.yaml").read_text())["hparam"]
    assert hparam["tokens_exponent"] == pytest.approx(0.2, abs=1e-3)
    assert hparam["base"]["tokens"] == 4 * 512, "not the smallest run: the rates are at the base"


def test_settings_that_differ_in_anything_are_told_apart(tmp_path):
    for std in (0.5, 1.0):
        made_up(tmp_path / str(std), lambda steps: -6.0, f"model.init.std={std}", tokens=(8,))
    found = collect([tmp_path])["metap"]
    assert len(found) == 2 and any("model.init.std=1.0" in name for name in found)


def test_an_unbracketed_minimum_is_refused_and_drawn(tmp_path):
    made_up(tmp_path, lambda steps: -3.0, tokens=(8,))
    with pytest.raises(ConfigError, match=r"is at the edge of the grid, 2\^-4: extend it upwards"):
        fit(FitConfig([str(tmp_path)]), tmp_path)
    assert (tmp_path / "sweep.png").exists() and not (tmp_path / "base.yaml").exists()


def test_a_sweep_of_another_configuration_is_refused(tmp_path):
    made_up(tmp_path, lambda steps: -6.0, tokens=(8,))
    out = tmp_path / "8"
    assert is_done(member(SweepConfig(), SweepSetting(family("training.steps=8")), -6, 0, out))
    with pytest.raises(ConfigError, match=r"base-lr-6-seed0 was swept with training.steps=8, now 9: choose another"):
        is_done(member(SweepConfig(), SweepSetting(family("training.steps=9")), -6, 0, out))


def test_other_keys_and_muons_own_rate_are_swept(tmp_path):
    muon = ["optimizer=muon", "optimizer.lr=0.01", "optimizer.muon.lr=0.02", "optimizer.weight_decay=0,0.1"]
    found = settings(SweepConfig(), bases(["hparam=none", *muon, "model.num_layers=2"]))
    runs = named([member(SweepConfig(), one, -6, 0, tmp_path) for one in found])
    assert [run.optimizer.weight_decay for run in runs] == [0.0, 0.1]
    assert runs[1].run.name == "base-weight_decay=0.1-lr-6-seed0", "only runs with equal names are numbered"
    assert runs[0].optimizer.muon.lr == pytest.approx(0.02 * 2**-6 / 0.01)


@pytest.mark.parametrize("code, started", [(130, 1), (1, 6)])
def test_an_interrupted_sweep_stops_a_failed_run_does_not(tmp_path, monkeypatch, code, started):
    begun: list[str] = []
    monkeypatch.setattr("launch.metap.sweep.one_run", lambda run: begun.append(str(run.run.name)) or code)
    assert sweep(SweepConfig(low=-8, high=-6, seeds=2), {"": family()}, tmp_path) == code
    assert len(begun) == started


def test_a_run_that_diverged_in_ranks_is_a_result(tmp_path, monkeypatch):
    run = member(SweepConfig(), SweepSetting(family()), -6, 0, tmp_path)
    monkeypatch.setattr("launch.metap.runs.train", lambda runs: 1)
    path = tmp_path / "runs" / str(run.run.name)
    assert one_run(run) == 1 and loss_of(path) is None
    path.mkdir(parents=True)
    (path / "diverged.json").write_text("{}")
    assert one_run(run) == 0 and loss_of(path) == float("inf")


def test_a_file_without_a_base_is_no_base(tmp_path, refused):
    write_config(tmp_path / "config.yaml", family())
    line = refused("metap", "transfer", f"base={tmp_path / 'config.yaml'}", f"out={tmp_path}")
    assert "has no hparam.base; name the directory of the run" in line
