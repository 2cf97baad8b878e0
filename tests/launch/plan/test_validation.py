"""`leviathan plan validate=...`: the report, the kinds of tables, and bad ones."""

import csv
import json
from pathlib import Path
from random import Random

import pytest

from bench.plan.fit import SPLIT, rows_to_fit
from launch.cli import main
from launch.plan.calibration import FILE, Calibration, read_calibration
from launch.plan.readers import open_table
from launch.plan.scores import MeasuredLayout, Pair, error_scores, fit_scores, memory_scores, regret_scores
from launch.plan.validate import validate

HERE = Path(__file__).parent
ERRORS = {"median_error", "mean_error", "n"}


def run(*overrides: str) -> int:
    return main(["plan", *overrides])


def test_scores_are_what_they_say():
    pairs = [Pair(90, 100), Pair(130, 100), Pair(100, 100)]
    assert error_scores(pairs) == {"median_error": pytest.approx(0.1), "mean_error": pytest.approx(0.4 / 3), "n": 3}
    assert memory_scores(pairs)["worst_under"] == pytest.approx(0.1)
    assert error_scores([])["n"] == 0
    outcomes = [(True, True)] * 9 + [(False, True)] + [(True, False)]
    assert fit_scores(outcomes)["balanced_accuracy"] == pytest.approx(0.45)  # not the accuracy, 9 of 11
    assert fit_scores([(True, True)])["balanced_accuracy"] is None


def test_regret_is_measured_not_predicted():
    layouts = [MeasuredLayout("a", 1.0, 50.0), MeasuredLayout("a", 2.0, 100.0), MeasuredLayout("b", 1.0, 7.0)]
    assert regret_scores(layouts) == {"mean": 0.5, "worst": 0.5, "groups": 1}  # one layout alone is no choice


@pytest.mark.parametrize("table", ["sweep", "runs", "rival", "peaks"])
def test_report_has_its_keys(table, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert run(f"validate={HERE / table}.csv", f"report={out}") == 0
    content = json.loads(out.read_text())
    assert content.keys() == {"time", "memory", "fits", "regret", "rival", "skipped"}
    assert content["time"].keys() == content["rival"]["time"].keys() == ERRORS
    assert content["memory"].keys() == content["rival"]["memory"].keys() == ERRORS | {"worst_under"}
    assert content["fits"].keys() == {"balanced_accuracy", "n"}
    assert content["regret"].keys() == {"mean", "worst", "groups"}
    assert all(one.keys() == {"row", "reason"} for one in content["skipped"])
    assert content["rival"]["time"]["n"] == (5 if table == "rival" else 0)
    assert "skipped" in capsys.readouterr().out


def test_rows_without_a_prediction_are_named(tmp_path):
    lines = list(csv.reader((HERE / "runs.csv").open()))
    gpu, seq = lines[0].index("gpu"), lines[0].index("seq")
    lines[1][gpu], lines[2][seq], lines[3][seq] = "TPU v5p", "", "-4096"
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    table = open_table(path)
    assert [one.number for one in table.skipped] == [2, 3, 4]
    assert [one.reason.split("=")[0].split(" is")[0] for one in table.skipped] == ["gpu", "seq", "seq"]
    assert len(table.rows) == len(lines) - 4


@pytest.mark.parametrize(("share", "skipped"), [(1.0, True), (0.99, False)])
def test_a_peak_without_a_step_is_skipped(share, skipped, tmp_path):
    lines = list(csv.DictReader((HERE / "peaks.csv").open()))
    lines[0]["alloc_bytes_end"] = str(share * float(lines[0]["max_alloc_bytes"]))
    path = tmp_path / "peaks.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    reasons = {one.number: one.reason for one in open_table(path).skipped}
    assert ("no training step" in reasons.get(2, "")) == skipped


@pytest.mark.parametrize(
    "column", ["dp", "mbs", "vpp", "recompute", "notes", "zero", "etp", "peak_mem_gb", "shared_experts"]
)
def test_a_column_may_be_missing(column, tmp_path):
    lines = list(csv.DictReader((HERE / "runs.csv").open()))
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in lines[0] if name != column], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    table = open_table(path)
    assert len(table.skipped) <= len(lines) / 10


@pytest.mark.parametrize("table", ["sweep", "runs", "rival", "peaks"])
def test_nonsense_in_cells_is_survived(table, tmp_path):
    lines = list(csv.DictReader((HERE / f"{table}.csv").open()))
    random, path = Random(table), tmp_path / "table.csv"
    nonsense = ["", "0", "-1", "nan", "inf", "x", "1e9", "7", "0.5", "None", "full", "TPU"]
    for _ in range(10):
        rows = [row | {random.choice(list(row)): random.choice(nonsense) for _ in range(3)} for row in lines]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = validate(path, Calibration())
        assert content["time"]["n"] + len(content["skipped"]) <= len(lines)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["report=out.json"], "validate=FILE.csv"),
        (["validate=nowhere.csv"], "No such file"),
        (["validate=other.csv"], "no known kind"),
        (["validate=binary.csv"], "no CSV file"),
        (["validate=runs.csv", "report=out.csv"], "report"),
        (["validate=runs.csv", "calibration=other.csv"], "no calibration"),
    ],
)
def test_bad_input_gets_one_line(overrides, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "runs.csv").write_text((HERE / "runs.csv").read_text())
    assert run(*overrides) in (1, 2)
    printed = capsys.readouterr().err.strip()
    assert said in printed
    assert len(printed.splitlines()) == 1


def test_stored_constants_are_those_of_the_class(tmp_path):
    stored = json.loads(FILE.read_text())
    assert stored["fitted_on"] == SPLIT
    assert read_calibration(FILE) != Calibration()
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"constants": {"product_tile": -1}}))
    with pytest.raises(Exception, match="product_tile"):
        read_calibration(path)


def test_held_out_sources_are_never_fitted(tmp_path):
    names = {"runs": "runs", "rival": "simumax_b200", "sweep": "nanotron_h100_sweep", "peaks": "megatron_peak_memory"}
    for here, name in names.items():
        (tmp_path / f"{name}.csv").write_text((HERE / f"{here}.csv").read_text())
    fitted = rows_to_fit(tmp_path)
    assert 0 < len(fitted["runs"]) < len(open_table(HERE / "runs.csv").rows)
    assert {row.source for row in fitted["runs"]} <= set(SPLIT["runs"])
    assert not fitted["nanotron"]  # the sample is of a held-out size
    assert all(row.job.shapes.experts is None for row in fitted["simumax"])
