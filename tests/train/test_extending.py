"""A user's package adds a callback, a metric, a source, a scorer and a schedule by import path."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.support.tiny import TINY
from train.run_directory import committed, read_lines
from train.trainer import Trainer

EXAMPLE = Path(__file__).parents[1] / "support" / "example_extension"
MODEL = ["model.num_layers=2", "model.balance.bias_rate=0"]
ALL_FIVE = [
    "callbacks=[{target: acme.callbacks:LossAverage, options: {decay: 0.5}}, acme.callbacks:WeightNorm]",
    "data=files",
    "~data.sources.text",
    "+data.sources.counting={kind: acme.data:Counting, options: {documents: 80}}",
    "+data.filter={keep: 0.5, unit: documents, scorer: {kind: acme.data:Sevens}}",
    "data.tokenizer.vocab_size=300",
    "schedule.kind=acme.schedules:inverse_sqrt",
    "+schedule.options={scale: 2.0}",
]


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Put a folder on the import path, as PYTHONPATH does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("acme", "broken")]:
        del sys.modules[name]


@pytest.fixture
def acme():
    with on_path(EXAMPLE):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the finished run `whole`."""
    root = tmp_path_factory.mktemp("extended")
    with on_path(EXAMPLE):
        assert train(root, "whole") == 0
    return root


def train(root: Path, name: str, *overrides: str, steps: int = 5) -> int:
    words = [f"data.cache={root / 'cache'}", f"run.root={root}", f"run.name={name}", f"training.steps={steps}"]
    return main(["train", *TINY, *ALL_FIVE, *MODEL, "checkpoint.every=2", *words, *overrides])


def figures(root: Path, name: str) -> list[dict[str, Any]]:
    keys = ("step", "loss", "learning_rate", "loss_average", "weight_norm")
    return [{key: line[key] for key in keys} for line in read_lines(root / name / "metrics.jsonl") if "loss" in line]


def test_all_five_train_and_resume_exactly(acme, root, monkeypatch):
    whole, average = figures(root, "whole"), 0.0
    for step, line in enumerate(whole):
        average = 0.5 * average + 0.5 * line["loss"]
        assert line["loss_average"] == pytest.approx(average, rel=1e-12) and line["weight_norm"] > 1
        assert line["learning_rate"] == pytest.approx(3e-3 * (2 / (2 + step)) ** 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_must_stop", lambda self, interruption, step: step == 3)
        assert train(root, "cut") == 130 and figures(root, "cut") == whole[:3]
    (step, path) = committed(root / "cut" / "checkpoints")[-1]
    state = json.loads((path / "progress.json").read_text())["callbacks"]
    assert step == 3 and state == {"acme.callbacks:LossAverage": {"average": whole[2]["loss_average"]}}
    assert train(root, "cut") == 0 and figures(root, "cut") == whole
    audit = next((root / "cache" / "tokens").glob("*/audit.json")).read_text()
    assert "share of characters that are a 7" in audit


def test_paths_of_a_stored_run_are_not_imported(root, tmp_path, small_corpus, capsys):
    """A package of the stored name writes a file if a verb that reads the run imports it. None must."""
    run, mark = str(root / "whole"), tmp_path / "executed"
    (tmp_path / "trap" / "acme").mkdir(parents=True)
    for name in ("__init__", "callbacks", "data", "schedules"):
        (tmp_path / "trap" / "acme" / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with on_path(tmp_path / "trap"):
        for verb in (["evaluate", run], ["report", run], ["generate", run, "1 2"], ["export", run, f"{tmp_path}/hf"]):
            assert main(verb) == 0, verb
        first = [*MODEL, f"model.init_from={run}", "training.steps=1"]
        assert main(["train", *TINY, *small_corpus, *first, f"run.root={tmp_path}", "run.name=next"]) == 0
        cache = (root / "cache").rename(root / "elsewhere")
        assert main(["evaluate", run]) == 2
        cache.rename(root / "cache")
    assert "import paths of a stored run are not imported" in capsys.readouterr().err
    assert not mark.exists() and "acme" not in sys.modules


@pytest.mark.parametrize(
    "override, message",
    [
        ("callbacks=[acme]", "callbacks.0.target=acme: must be an import path, module:Name"),
        ("callbacks=[{target: a:B, option: 1}]", "callbacks.0.option: no such key; try callbacks.0.options"),
        ("callbacks=[a:B, a:B]", "callbacks=a:B: is named twice"),
        ("callbacks=[acme.none:Mine]", "callbacks.0=acme.none:Mine: no module 'acme.none': install its package, or"),
        ("callbacks=[broken:Mine]", "callbacks.0=broken:Mine: cannot be imported: NameError: name 'nothing'"),
        ("callbacks=[acme.callbacks:LossAverag]", "acme.callbacks has no LossAverag; try acme.callbacks:LossAverage"),
        ("callbacks=[acme.schedules:inverse_sqrt]", "must be a subclass of train.callbacks.base:Callback"),
        ("callbacks=[{target: acme.callbacks:LossAverage, options: {decy: 1}}]", "arguments and options decy: got an"),
        ("callbacks=[train.callbacks:Logging]", "has no Logging; try train.callbacks.logging:LoggingCallback"),
        ("callbacks=[train.callbacks.logging:LoggingCallback]", "is part of Leviathan, which has configuration keys"),
        ("schedule.kind=cosinus", "schedule.kind=cosinus: must be an import path, module:Name, or a known name; try"),
        ("schedule.kind=acme.data:Sevens", "schedule.kind=acme.data:Sevens: cannot be called with 2 arguments"),
        ("+data.sources.other={kind: acme.data:Sevens}", "must be a class with documents, fingerprint; documents is"),
        ("+data.sources.other={path: x, options: {a: 1}}", "data.sources.other.options: apply only to a kind that"),
        ("data.filter.scorer.kind=acme.data:Counting", "filter.scorer.kind=acme.data:Counting: must be a class with"),
        ("data.filter.scorer.kind=acme.schedules:inverse_sqrt", "kind=acme.schedules:inverse_sqrt: must be a class"),
    ],
)
def test_bad_shapes_are_one_line(acme, tmp_path, monkeypatch, capsys, override, message):
    (tmp_path / "broken.py").write_text("nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train(tmp_path, "run", override) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_state_that_is_not_json_is_an_error(acme, tmp_path, monkeypatch, capsys):
    import acme.callbacks

    monkeypatch.setattr(acme.callbacks.LossAverage, "state_dict", lambda self: {"average": object()})
    assert train(tmp_path, "run", steps=1) == 1
    assert "acme.callbacks:LossAverage: state_dict() must return plain JSON values" in capsys.readouterr().err
