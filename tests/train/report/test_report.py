"""The report of a run: it shows what the run's files hold, and each warning has its cause."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from core.config import plain
from core.errors import ConfigError
from launch.cli import main
from launch.local import read_stored
from tests.support.tiny import TINY
from tests.train.report.runs import composed, make_run
from train.metap.hyperparameters import resolve
from train.report import plots
from train.report.page import write_report
from train.report.run import RunData
from train.run_directory import read_config


def page(*runs: Path) -> str:
    out = runs[0].parent / "page.html"
    write_report(runs, out)
    return out.read_text()


def test_a_page_holds_everything_and_needs_nothing(tmp_path):
    run = make_run(tmp_path / "one")
    write_report([run], run / "report.html")
    text = (run / "report.html").read_text()
    for wanted in ("4.2500", "2.1250", "12,345,678", "held-out loss: code", "num_kv_heads: 2", "leviathan train"):
        assert wanted in text, wanted
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert len(pictures) == 10
    for content in pictures:
        height, width, _ = (picture := imread(io.BytesIO(content))).shape
        assert width > 500 and height > 300 and len(np.unique(picture)) > 10, "the picture is not blank"
    assert {path.name for path in (tmp_path / "one" / "plots").iterdir()} >= {"loss.png", "expert_load.png"}


def test_labels_are_not_cut_off(tmp_path, monkeypatch):
    run, made, honest = RunData(make_run(tmp_path / "one")), [], plots.png
    monkeypatch.setattr(plots, "png", lambda figure: made.append(figure) or honest(figure))

    def cut_off() -> list[str]:
        labels = {one.axes[0].get_ylabel(): (one.bbox, one.axes[0].yaxis.label.get_window_extent()) for one in made}
        out = (text for text, (page, box) in labels.items() if box.y0 < page.y0 or box.y1 > page.y1 or box.x0 < 0)
        return [text for text in out if text]

    plots.draw([run])
    assert len(made) == 10 and cut_off() == []
    made.clear()
    monkeypatch.setattr(plots, "LABEL_CHARACTERS", 1000)
    plots._picture("x", "x", lambda axes: plots._LAYER_PLOTS["router_entropy"].draw(axes, run, (0.0, 1.0)), False)
    assert cut_off() == ["entropy of a token's scores over its maximum"], "control: in one line it does not fit"


def test_two_runs_share_axes_and_list_differences(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", "optimizer.lr=0.5")
    text = page(first, second)
    assert text.count("data:image/png") == 5 + 2 * 5
    assert f"<td>optimizer.lr</td><td>{composed().optimizer.lr}</td><td>0.5</td>" in text
    assert "Expert load: second" in text and not (first / "plots").exists()


def test_text_from_files_is_escaped(tmp_path, undrawn):
    text = page(make_run(tmp_path / "<b>x", "logging.project='<script>alert(1)</script>'"))
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>x" not in text


@pytest.mark.parametrize(
    "cause, warning",
    [
        (lambda d: make_run(d, dead=2), "2 of 8 experts got no token"),
        (lambda d: make_run(d, max_over_mean=7.5), "busiest expert gets 7.5 times the mean"),
        (lambda d: make_run(d, loss=lambda step: 9.0 if step == 40 else 5.0), "to 9.00 at step 40"),
        (lambda d: (make_run(d) / "log.txt").write_text("2026-01-01 00:00:00 could not save x: full\n"), "could not"),
        (make_run, None),
    ],
)
def test_each_warning_has_its_cause(tmp_path, cause, warning):
    cause(tmp_path / "run")
    found = list(RunData(tmp_path / "run").warnings())
    assert any(warning in text for text in found) if warning else found == []


def test_unfinished_runs_and_losses_above_the_bigram(tmp_path, undrawn):
    """A full disk may truncate lines in the middle of the metrics, after which the run continues."""
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "bigram_loss": 4.0}))
    assert any("not below the bigram" in text for text in RunData(run).warnings())
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = RunData(run).steps
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:9], '{"step": 20, "lo']))
    assert RunData(run).steps == steps[:3] + steps[4:9]
    damaged = "metrics.jsonl: 1 of 9 lines is damaged and left out."  # the last one is being written
    assert [text for text in RunData(run).warnings()] == [damaged, "The run has reached step 18 of 60."]
    assert "4.2500" not in page(run)


def test_a_dense_run_with_one_line_is_enough(tmp_path):
    run = make_run(tmp_path / "run", "model.moe_every=0", steps=2)
    assert page(run).count("data:image/png") == 5


def test_the_printed_command_runs(tmp_path, small_corpus, command, undrawn, capsys):
    tiny = [*TINY, *small_corpus, "training.steps=2", "parallel.tp=2", "launch=torchrun", "launch.processes=2"]
    run = make_run(tmp_path / "it's <1>", *tiny, f"run.root={tmp_path}", "run.name='it\\'s <1>'", steps=2)
    (line,) = re.findall(r"<pre>(leviathan train .*)</pre>", page(run))
    leviathan, *words = shlex.split(html.unescape(line))
    assert leviathan == "leviathan" and main([*words, "launch.kind=inline", "launch.processes=null"]) == 2
    assert "parallel" in capsys.readouterr().err, "control: without its launch section the run is rejected"
    done = command(*words)
    assert done.returncode == 0, done.stderr
    found, wanted = (plain(read_config(path / "config.yaml")) for path in (tmp_path / "it's <1>-again", run))
    assert found["run"].pop("name") == "it's <1>-again" and wanted["run"].pop("name") and found == wanted


def test_a_stored_run_keeps_or_derives_its_figures(tmp_path):
    path = make_run(tmp_path / "run", "phases=[{name: longer, steps: 5, seq_len: 512}]") / "config.yaml"
    config = read_config(path)
    assert config.optimizer.transferred is not None
    assert read_stored(path, ["run.name=x"]) == replace(config, run=replace(config.run, name="x"))
    longer = resolve(read_stored(path, ["training.steps=240"]))
    assert longer.optimizer.transferred != config.optimizer.transferred and longer.training.steps == 240


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--config: name a stored configuration"),
        (["nowhere.yaml"], "config=nowhere.yaml: cannot be read"),
        (["config.yaml", "optimizer=sgd"], "optimizer=sgd: a stored configuration has no groups"),
        (["config.yaml", "run.nam=x"], "run.nam: no such key; try run.name"),
    ],
)
def test_a_wrong_stored_configuration_is_rejected(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(make_run(tmp_path / "run"))
    assert main(["train", "--config", *words]) == 2
    assert message in capsys.readouterr().err


def test_directories_without_a_run_are_rejected(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name at least one run" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    for path in ("x", "metrics.jsonl"):
        (run / "metrics.jsonl").write_text("") if path == "x" else (run / path).unlink()
        with pytest.raises(ConfigError, match="has logged no step yet"):
            RunData(run)
