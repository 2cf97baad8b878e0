"""`leviathan plan`: its plans, its files, what `train` makes of them, and bad input."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import yaml

from core.errors import ConfigError
from launch.cli import main
from launch.plan.calibration import default_calibration
from launch.plan.cluster import ClusterConfig
from launch.plan.search import search as searching
from launch.plan.search.footprint import taken
from launch.plan.search.report import SearchReport
from launch.plan.search.search import SearchResult
from launch.plan.search.speed import PARTS, StepTimes
from launch.plan.search.uncertainty import Residual, RunTraits, error_bar
from launch.plan.step_time import exchange_time, layer_time
from launch.plan.traffic import _ring, layer_exchanges
from parallel.pipeline.stages import PipelineSchedule
from tests.launch.plan.search.small import SMALL, planned, search

OVERRIDES = ["model=smoke", "cluster.nodes=1", "seq_len=1024", "global_batch_size=64", "best=2"]


@cache
def found() -> SearchResult:
    return search()(3)


def test_plans_fit_and_come_fastest_first():
    result = found()
    times = [plan.step_s for plan in result.plans]
    assert times == sorted(times)
    assert result.fitting >= len(result.plans) == 3
    assert result.tried == result.fitting + result.rejected[searching.TOO_LARGE]
    for plan in result.plans:
        assert plan.memory <= search().limit
        assert plan.layout.world_size == 16
        assert sum(plan.seconds[name] for name in PARTS) == pytest.approx(plan.step_s)
        assert min(plan.seconds.values()) >= 0


def test_limits_are_kept():
    plans = search(pp=[2], tp=[2], schedule=[PipelineSchedule.zbv])(2).plans
    assert {(plan.layout.pp, plan.layout.tp, plan.layout.schedule.value) for plan in plans} == {(2, 2, "zbv")}
    assert plans[0].simulated is not None


def test_less_memory_means_fewer_plans():
    whole, half = search(), search()
    half.limit = float(np.median(np.concatenate([memory for _, memory in whole.fitting()])))
    fitting = sum(len(memory) for _, memory in whole.fitting())
    left = sum(len(memory) for _, memory in half.fitting())
    assert 0 < left < fitting


def test_a_layer_takes_what_the_validated_model_says():
    job = planned()
    one = search(job, tp=[2])
    table = one.fitting()[0][0]
    row = taken(table, np.array([0]))
    layers, _ = one.times.tables(row)
    keys = ("tp", "cp", "ep", "etp", "micro_batch_size", "recompute", "fp8")
    published = one.times.job(one.outline.shapes(0), *(row[name][0].item() for name in keys))
    assert layers[0, :, 0].sum() >= layer_time(published, 0, one.calibration).total > 0


@pytest.mark.parametrize(("ranks", "span"), [(8, 8), (4, 32), (64, 64), (16, 128)])
def test_rings_are_those_of_the_validated_model(ranks, span):
    times = search().times
    job = times.job(times.shapes[0], 1, 1, 1, 1, 1, 0, False)
    exchange = _ring(job, "dp", "gradients", 1e10, ranks, span, 0)
    ours = times._ring(np.array([1e10]), np.array([ranks]), np.array([span]), 0.0)
    assert ours[0] == pytest.approx(exchange_time(job, exchange, default_calibration()))


@pytest.mark.parametrize(("ep", "etp"), [(1, 4), (4, 1), (4, 2), (2, 8)])
def test_slices_of_experts_are_exchanged_too(ep, etp):
    times = search().times
    moe = next(at for at, kind in enumerate(times.outline.kinds) if kind.is_moe)
    found = [one for one in layer_exchanges(times.job(times.shapes[moe], 1, 1, ep, etp, 1, 0, False), True)]
    copies = 4 * etp * ep * (1 - (1 - 1 / ep) ** 2) * (1 - 1 / (ep * etp))  # top-2; each way, both passes
    assert sum(one.nvlink_bytes for one in found) == pytest.approx(2 * 2048 * SMALL.hidden_size * copies)
    assert (sum(one.network_bytes for one in found) > 0) == (ep * etp > 8)


def test_slower_links_are_never_faster():
    one, quick = search(planned(network_gb_s=5.0), pp=[2, 4]), search(pp=[2, 4])
    table = quick.fitting()[0][0]
    times = StepTimes(one.outline, one.counts, one.gpu, one.calibration)
    assert (searching.scored(times, table) >= searching.scored(quick.times, table) - 1e-9).all()


def test_error_bars_widen_outside_the_range():
    rows = [Residual("hopper", "H100", True, False, 2**at, 1e10, 0.02 * at - 0.1, None) for at in range(3, 10)]
    inside = error_bar(RunTraits("hopper", "H100", True, False, 64, 1e10), "time", rows)
    outside = error_bar(RunTraits("hopper", "H100", True, False, 8192, 1e10), "time", rows)
    assert inside.low < 1 < inside.high
    assert not inside.outside
    assert outside.low < inside.low
    assert outside.high > inside.high
    assert "8,192 GPUs" in outside.words
    unknown = error_bar(RunTraits("ampere", "A800", True, False, 64, 1e10), "time", rows)
    assert "no row is of A800" in unknown.words


def test_train_takes_the_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *OVERRIDES, "out=mine"]) == 0
    printed = capsys.readouterr().out
    assert "tok/s/GPU" in printed
    preset = yaml.safe_load((tmp_path / "mine/parallel/plan.yaml").read_text())
    page = (tmp_path / "mine/plan.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "NaN" not in (tmp_path / "mine/plan.json").read_text()
    content = json.loads((tmp_path / "mine/plan.json").read_text())
    assert content["plans"][0]["parallel"] == preset
    assert content["plans"][0]["step_s_between"][0] < content["plans"][0]["step_s"]
    command = [f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "parallel=plan"]
    command += ["launch=torchrun", "launch.processes=8", "training.global_batch_size=64"]
    assert main(["train", *command, "--cfg"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)["parallel"]
    assert {key: composed[key] for key in preset} == preset


def test_the_report_names_what_it_cannot_time():
    report = SearchReport(planned(), found())
    lines = "\n".join(report.lines())
    assert "error bar of step times" in lines
    assert "no row" in lines or "widened" in lines  # two nodes of a tiny model are outside the rows
    assert report.mfu(report.plans[0]) < 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.gpu=H1000"], "cluster.gpu=H1000: no such GPU is known; try H100"),
        (["cluster=tpu"], "cluster"),
        (["cluster.network_gb_s=400"], "not Gbit/s"),
        (["cluster.nvlink_gb_s=-1"], "cluster.nvlink_gb_s=-1.0: must be positive"),
        (["cluster.network_gb_s=nan"], "must be a finite number"),
        (["cluster.network_gb_s=60", "cluster.nvlink_gb_s=50"], "must not exceed nvlink_gb_s"),
        (["cluster.nvlink_domain=3"], "cluster.nvlink_domain=3: must be a part"),
        (["search.tp=[0]"], "search.tp=0: must be a positive number"),
        ([f"search.pp={list(range(1, 102))}".replace(" ", "")], "search.pp: names more than 100 values"),
        (["search.recompute=[]"], "must allow at least one value"),
        (["search.tp=[3]"], "no layout of 8 GPUs is allowed: "),
        (["imbalance=0.5"], "imbalance=0.5"),
        (["global_batch_size=0"], "global_batch_size=0: must be positive"),
        (["model.num_kv_heads=3"], "model.num_kv_heads=3"),
        (["report=scores.json"], "validate=FILE.csv"),
        (["out=s3://bucket"], "is a URL"),
    ],
)
def test_bad_input_gets_one_line(overrides, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *OVERRIDES, *overrides]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed
    assert len(printed.splitlines()) == 1


def test_a_small_cluster_says_how_many_gpus_it_needs():
    large = replace(SMALL, num_experts=4096, expert_hidden_size=16384)
    job = planned(large, nodes=1)
    with pytest.raises(ConfigError, match=r"layouts that fit on [0-9,]+ GPUs") as error:
        search(job)(1)
    nodes = int(error.value.legal[0])
    assert search(replace(job, cluster=ClusterConfig(nodes=nodes))).fitting()
    assert not search(replace(job, cluster=ClusterConfig(nodes=nodes // 2))).fitting()
