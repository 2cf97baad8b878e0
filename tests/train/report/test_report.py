"""The report of a run: what it shows comes from the run's files, and each warning from its cause."""

from __future__ import annotations

import base64
import json
import re
import shlex
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from core.config import load, plain
from core.errors import ConfigError
from launch.cli import main
from train.config import TrainConfig
from train.report import plots
from train.report.page import repeat_command, write_report
from train.report.run import RunData


def make_run(directory: Path, *overrides: str, steps: int = 60, loss=lambda step: 7 - step / 20, **load_) -> Path:
    """A finished run's files, with one evaluation in the middle and one at the end."""
    directory.mkdir(parents=True)
    config = load("train", TrainConfig, [f"training.steps={steps}", "logging.every=2", *overrides])
    (directory / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    layers = sum(block.feed_forward.value == "moe" for block in config.model.blocks)
    expert = {"max_over_mean": 1.5, "entropy": 0.97, "dead": 0, **load_}
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(2, steps + 1, 2):
            line = {"step": step, "tokens": step * 2048, "loss": loss(step), "learning_rate": 1e-3}
            line |= {"gradient_norm": 0.5, "tokens_per_second": 7000.0, "mfu": None, "peak_memory_bytes": 700_000_000}
            if layers:
                line |= {"router_z": [0.5] * layers, "router_entropy": [0.9] * layers, "aux_loss": [0.0] * layers}
                line |= {"expert_load": [expert] * layers}
            file.write(json.dumps(line) + "\n")
            if step in (steps // 2, steps):
                held_out = {"code": {"loss": 4.25, "bits_per_byte": 2.0, "tokens": 10}}
                line = {"step": step, "tokens": step * 2048, "heldout_loss": 4.25, "heldout": held_out}
                file.write(json.dumps(line) + "\n")
    summary = {"heldout_loss": 4.25, "bigram_loss": 4.5, "unigram_loss": 6.0, "total_parameters": 12345678}
    summary |= {"heldout": {"bits_per_byte": 2.125, "sources": {"code": {"loss": 4.25}}}}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "log.txt").write_text("2026-01-01 00:00:00 step 2/60\n")
    return directory


def page(*runs: Path) -> str:
    out = runs[0].parent / "page.html"
    write_report(runs, out)
    return out.read_text()


def pixels(content: bytes) -> tuple[int, int, int]:
    """Width, height and the number of different bytes in a PNG's picture."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    data, place = b"", 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        if content[place + 4 : place + 8] == b"IDAT":
            data += content[place + 8 : place + 8 + size]
        place += 12 + size
    return width, height, len(set(zlib.decompress(data)))


@pytest.fixture
def cut_off(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """Draws a run's pictures; returns the labels that do not fit beside their axes."""
    run, made = RunData(make_run(tmp_path / "one")), []
    honest = plots.drawn
    monkeypatch.setattr(plots, "drawn", lambda *arguments: made.append(honest(*arguments)) or made[-1])

    def labels() -> list[str]:
        made.clear()
        assert len(plots.draw([run])) == len(made) == 10
        named = [(figure.bbox, figure.axes[0].yaxis.label) for figure in made if figure.axes[0].get_ylabel()]
        boxes = {label.get_text(): (page, label.get_window_extent()) for page, label in named}
        return [text for text, (page, box) in boxes.items() if box.y0 < page.y0 or box.y1 > page.y1 or box.x0 < 0]

    return labels


def test_labels_are_not_cut_off(cut_off, monkeypatch):
    assert cut_off() == []
    monkeypatch.setattr(plots, "_LABEL_LETTERS", 1000)
    assert cut_off() == ["entropy of a token's scores over its maximum"], "control: in one line it does not fit"


def test_the_page_holds_everything_and_needs_nothing(tmp_path):
    text = page(make_run(tmp_path / "one"))
    for wanted in ("4.2500", "2.1250", "12,345,678", "held-out loss: code", "num_kv_heads: 2", "leviathan train"):
        assert wanted in text, wanted
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert len(pictures) == 10
    for content in pictures:
        width, height, different = pixels(content)
        assert width > 500 and height > 300 and different > 10, "a blank picture"
    assert {path.name for path in (tmp_path / "one" / "plots").iterdir()} >= {"loss.png", "expert_load.png"}


def test_two_runs_share_the_axes_and_list_what_differs(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", "optimizer.lr=0.5")
    text = page(first, second)
    assert text.count("data:image/png") == 5 + 2 * 5
    usual = load("train", TrainConfig, []).optimizer.lr
    assert f"<td>optimizer.lr</td><td>{usual}</td><td>0.5</td>" in text
    assert "Expert load: second" in text and not (first / "plots").exists()


def test_what_comes_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "<b>x", "logging.project='<script>alert(1)</script>'")
    assert "<script" not in page(run) and "&lt;script&gt;" in page(run)


@pytest.mark.parametrize(
    "cause, warning",
    [
        (lambda d: make_run(d, dead=2), "2 experts got no token"),
        (lambda d: make_run(d, max_over_mean=7.5), "busiest expert gets 7.5 times the mean"),
        (lambda d: make_run(d, loss=lambda step: 9.0 if step == 40 else 5.0), "jumped to 9.00 at step 40"),
        (lambda d: (make_run(d) / "log.txt").write_text("2026-01-01 00:00:00 could not save x: full\n"), "could not"),
    ],
)
def test_each_warning_has_its_cause(tmp_path, cause, warning):
    cause(tmp_path / "run")
    assert any(warning in text for text in RunData(tmp_path / "run").warnings())
    assert list(RunData(make_run(tmp_path / "healthy")).warnings()) == []


def test_a_loss_above_the_bigram_and_an_unfinished_run_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "bigram_loss": 4.0}))
    assert any("not below the bigram" in text for text in RunData(run).warnings())
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:9]) + '\n{"step": 20, "lo')
    assert [text for text in RunData(run).warnings()] == ["The run stands at step 18 of 60."]
    assert "4.2500" not in page(run)


def test_a_line_that_was_cut_short_hides_none_after_it(tmp_path):
    """A full disk leaves such lines in the middle: the run goes on behind them."""
    run = make_run(tmp_path / "run", steps=20)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = RunData(run).steps
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:]]))
    assert RunData(run).steps == steps[:3] + steps[4:]
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="has logged no step yet"):
        RunData(run)


def test_a_dense_run_and_one_line_are_enough(tmp_path):
    run = make_run(tmp_path / "run", "model.moe_every=0", steps=2)
    assert page(run).count("data:image/png") == 5


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["hparam=none"],
        ["hparam=none", "optimizer=sgd"],
        ["optimizer.lr=0.5", "model.balance.bias_rate=0", "precision=bf16", "optimizer.groups.router.lr_scale=0.5"],
        ["phases=[{name: longer, steps: 5, seq_len: 512}]", "model=llama4_scout", "hparam=llama4", "run.seed=3"],
        ["experiment=qwen3_30b_a3b"],
    ],
)
def test_the_command_repeats_the_configuration(overrides):
    overrides = [f"+{o}" if o.startswith("optimizer.groups") else o for o in overrides]
    config = load("train", TrainConfig, overrides)
    command = repeat_command(config)
    assert command is not None
    verb, train, *again = shlex.split(command)
    assert (verb, train) == ("leviathan", "train")
    assert plain(load("train", TrainConfig, again)) == plain(config)


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name at least one run" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has logged no step yet"):
        RunData(run)
