"""The verb `dryrun`: its report, its exit code and its one-line errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launch.cli import main
from launch.plan import cluster
from tests.train.dryrun.real import MODEL

JOB = ["experiment=smoke", "hparam=none", *MODEL]


def test_the_report_has_bytes_and_collectives_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["dryrun", *JOB, "parallel.ep=2", "world_size=4", "ranks=[1,0]", "gpu=H100", "out=found.json"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "deadlocks among 2 walked ranks: none" in shown and "the host waits" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layout"] == {"dp_shard": 4, "ep": 2} and found["deadlocks"] == found["races"] == []
    first, second = found["ranks"]
    assert [one["rank"] for one in found["ranks"]] == [0, 1] and second["place"]["ep"] == 1
    assert first["bytes"]["optimizer"] > first["bytes"]["parameters"] == first["bytes"]["gradients"] > 0
    assert sum(row["bytes"] for row in first["calls"]) == sum(row[2] for row in first["order"]) > 0
    assert {"axis": "world/dp", "ranks": {"first": 0, "step": 1, "count": 4}} in first["groups"].values()


def test_a_rank_that_does_not_fit_is_reported(monkeypatch, capsys):
    small = replace(cluster.GPUS["H100"], memory_gib=0.001)
    monkeypatch.setattr(cluster, "GPUS", {**cluster.GPUS, "H100": small})
    assert main(["dryrun", *JOB, "gpu=H100"]) == 1
    assert "does not fit: 0.0 GiB at the peak, and H100 has 0.001 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rank=4", "world_size=4"], "rank=4: ranks are 0 to 3 (world_size)"),
        (["ranks=[0,-1]"], "ranks=[0, -1]: ranks are 0 to 0 (world_size)"),
        (["world_size=4", "parallel.tp=3"], "parallel.tp=3: tp = 3 must divide the world's 4 ranks; try 1, 2 or 4"),
        (["gpu=X9"], "gpu=X9: no such GPU is known"),
        (["model.hiden_size=3"], "model.hiden_size"),
        (["out=found.txt"], "out=found.txt"),
    ],
)
def test_bad_input_is_one_line(words, line, capsys):
    assert main(["dryrun", *words]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
