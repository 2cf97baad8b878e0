"""The prediction that `train` prints: that of the search for the same layout, and in the log and the report."""

import json

import pytest

from core.config import load
from core.files import write_json
from launch.config import LaunchConfig, LaunchKind
from launch.plan.calibration import default_calibration
from launch.plan.search.config import PlanPrecision, RunShape
from launch.plan.search.finalists import as_values
from launch.plan.search.predict import IMBALANCE, announce, cluster_of, prediction
from tests.launch.plan.search.small import planned, search
from tests.train.report.runs import make_run
from train.config import TrainConfig
from train.report.page import write_report
from train.run_directory import read_prediction

LAUNCH = LaunchConfig(kind=LaunchKind.torchrun, processes=8)
SIZES = ["training.seq_len=1024", "training.global_batch_size=64", "precision=bf16", "hparam=none"]


def configured(root, *overrides: str) -> TrainConfig:
    return load("train", TrainConfig, [f"run.root={root}", "run.name=one", *SIZES, *overrides])


@pytest.mark.parametrize(
    "limits", [{"pp": [2], "tp": [2]}, pytest.param({"pp": [1], "ep": [4]}, marks=pytest.mark.slow)]
)
def test_a_run_of_a_plan_is_predicted_as_planned(limits, tmp_path):
    base = configured(tmp_path)
    job = planned(base.model, 1, RunShape(1024, 64, IMBALANCE))
    plan = search(job, precision=[PlanPrecision.bf16], **limits)(1).plans[0]
    layout = [f"parallel.{key}={value}" for key, value in as_values(plan).items()]
    config = configured(tmp_path, f"training.micro_batch_size={plan.micro_batch_size}", *layout)
    found = prediction(config, cluster_of("H100", LAUNCH, 8), default_calibration())
    assert found["tokens_per_second"] == pytest.approx(64 * 1024 / plan.step_s)
    assert found["memory_bytes"] == pytest.approx(plan.memory)


@pytest.mark.slow
def test_the_prediction_is_stored_printed_and_reported(tmp_path, capsys):
    make_run(tmp_path / "one")
    announce(configured(tmp_path), LAUNCH, "NVIDIA H100 80GB HBM3")
    assert "planned: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "one/prediction.json").read_text())
    assert stored["tokens_per_second_between"][0] < stored["tokens_per_second"]
    write_report([tmp_path / "one"], tmp_path / "page.html")
    assert "tokens per second, planned" in (tmp_path / "page.html").read_text()


def test_only_a_known_gpu_is_predicted(tmp_path, capsys):
    config = configured(tmp_path)
    for device in ("", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090"):
        announce(config, LAUNCH, device)
    assert not (tmp_path / "one").exists()
    announce(config, LAUNCH, "NVIDIA H100 80GB HBM3")
    assert "planned: " in capsys.readouterr().out
    assert read_prediction(tmp_path / "one/prediction.json")


def test_what_the_planner_does_not_model_is_not_predicted(tmp_path):
    cluster = cluster_of("H100", LAUNCH, 8)
    assert prediction(configured(tmp_path, "precision=fp32"), cluster, default_calibration()) is None


def test_a_damaged_prediction_is_none(tmp_path):
    path = tmp_path / "prediction.json"
    assert read_prediction(path) is None
    write_json(path, {"tokens_per_second": "many"})
    assert read_prediction(path) is None
    write_json(path, {"tokens_per_second": 2.0, "memory_bytes": 3})
    assert read_prediction(path) == {"tokens_per_second": 2.0, "memory_bytes": 3}
