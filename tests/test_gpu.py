"""What needs a GPU: the same commands use it. `make test-gpu`; without a GPU these fail, they do not skip."""

from __future__ import annotations

import json

import pytest
import torch

from launch.cli import main
from tests.train.tiny import TINY

pytestmark = pytest.mark.gpu


def run(root, name, *overrides) -> dict:
    assert torch.cuda.is_available(), "make test-gpu needs a GPU"
    assert main(["train", *TINY, f"run.root={root}", f"run.name={name}", *overrides]) == 0
    return json.loads((root / name / "metrics.jsonl").read_text().splitlines()[-2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_training_on_a_gpu(tmp_path, small_corpus, precision):
    line = run(tmp_path, "run", *small_corpus, f"precision={precision}", "checkpoint.every=2")
    assert line["step"] == 6 and line["loss"] < 6.0 and line["peak_memory_bytes"] < 2**30


def test_a_gpu_computes_what_a_cpu_computes(tmp_path, small_corpus, monkeypatch):
    exact = [*small_corpus, "precision=fp64", "optimizer=sgd", "training.clip_norm=null"]
    on_gpu = run(tmp_path, "gpu", *exact)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", *TINY, f"run.root={tmp_path}", "run.name=cpu", *exact]) == 0
    on_cpu = json.loads((tmp_path / "cpu" / "metrics.jsonl").read_text().splitlines()[-2])
    for key in ("loss", "gradient_norm"):
        assert on_gpu[key] == pytest.approx(on_cpu[key], rel=1e-9)


def test_a_run_on_a_gpu_goes_on(tmp_path, small_corpus):
    whole = run(tmp_path, "whole", *small_corpus, "precision=bf16", "parallel.recompute=selective")
    first = [*small_corpus, "precision=bf16", "parallel.recompute=selective", "checkpoint.every=3"]
    run(tmp_path, "cut", *first)
    (tmp_path / "cut" / "summary.json").unlink()
    for path in (tmp_path / "cut" / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    again = run(tmp_path, "cut", *first)
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-6)
