"""Changing the backend: weights, optimizer state and checkpoints do not depend on it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.errors import ConfigError
from launch.cli import main
from parallel.comm.world import World
from parallel.layout import Recompute
from precision import fp8_emulated
from precision.config import Backend
from precision.resolve import no_compilation
from tests.support.tiny import TINY, config, figures, saved, trainer
from train.checkpoint.restore import restore
from train.trainer import run

WIDE = ["model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=64", "training.clip_norm=null"]
EIGHT, PLAIN = ["precision=fp8", "precision.backend=emulated"], ["precision=bf16"]


def state(made: Any) -> dict[str, torch.Tensor]:
    return {f"{part.name}{part.offset}": part.tensor.clone() for part in made.engine.state()}


@pytest.mark.parametrize(
    "before, after",
    [(PLAIN, EIGHT), pytest.param(EIGHT, PLAIN, marks=pytest.mark.slow)],
    ids=["into FP8", "out of FP8"],
)
def test_another_backend_resumes_from_the_same_state(tmp_path, small_corpus, before, after):
    first = saved(tmp_path, "run", [*small_corpus, *WIDE, *before], 3)
    kept = state(first)
    usual = first.train_step(3).loss.item()
    again = trainer(tmp_path, "run", [*small_corpus, *WIDE, *before])
    other = trainer(tmp_path, "run", [*small_corpus, *WIDE, *after])
    assert again.step == other.step == 3
    for found in (state(again), state(other)):
        assert found.keys() == kept.keys() and any(name.startswith("optimizer.") for name in found)
        assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert again.train_step(3).loss.item() == usual
    changed = other.train_step(3).loss.item()
    assert changed != usual and changed == pytest.approx(usual, rel=2e-2)


def test_other_changes_of_precision_are_rejected(tmp_path, small_corpus):
    saved(tmp_path, "run", [*small_corpus, *WIDE, *EIGHT])
    free = ["precision.recipe=mxfp8", "precision.fp8_products=[expert]"]
    trainer(tmp_path, "run", [*small_corpus, *WIDE, *EIGHT, *free])
    with pytest.raises(ConfigError, match=r"precision.compute=float32: the run in .* was started with bfloat16"):
        trainer(tmp_path, "run", [*small_corpus, *WIDE, "precision=fp32"])


@pytest.mark.slow
def test_neither_recomputation_nor_padding_changes_a_bit(tmp_path, small_corpus, monkeypatch):
    """In the last run, padding to 64 rows per expert makes up most of the experts' input."""
    words, made = [*small_corpus, *WIDE, *EIGHT, "model.num_experts=8"], fp8_emulated.EmulatedArithmetic.__init__

    def generous(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.token_multiple = 64

    runs = [figures(tmp_path, mode.value, [*words, f"parallel.recompute={mode.value}"]) for mode in Recompute]
    monkeypatch.setattr(fp8_emulated.EmulatedArithmetic, "__init__", generous)
    first, *others = [*runs, figures(tmp_path, "padded", words)]
    for other in others:
        assert first["loss"] == other["loss"] and first["norm"] == other["norm"]
        assert all(torch.equal(first["gradients"][name], other["gradients"][name]) for name in first["gradients"])
        assert all(map(torch.equal, first["counts"], other["counts"])), "recomputed tokens count once"


def test_a_run_is_evaluated_by_the_given_backend(tmp_path, small_corpus, capsys):
    assert main(["train", *TINY, *small_corpus, *WIDE, *EIGHT, f"run.root={tmp_path}", "run.name=run"]) == 0
    losses = {}
    for backend in ("null", "emulated", "native"):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "run"), f"backend={backend}"]) == 0
        losses[backend] = json.loads(capsys.readouterr().out)["loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert losses["null"] == losses["emulated"] == summary["heldout_loss"] != losses["native"]
    assert losses["native"] == pytest.approx(losses["null"], rel=1e-2)
    assert restore(tmp_path / "run", World(0, 1, torch.device("cpu")), Backend.native).step == 6


def refused(root: Any, overrides: list[str]) -> str:
    """Return the error of a run in which rank 1 lacks the emulation."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(fp8_emulated, "unavailable", lambda recipe, device: ["it was taken away"])
        try:
            run(config(root, "run", *overrides))
        except ConfigError as error:
            return str(error)
    return ""


def test_ranks_with_different_backends_are_rejected(ranks, small_corpus, tmp_path):
    said = ranks(2, refused, tmp_path, [*small_corpus, *WIDE, *EIGHT])
    assert said[0] == said[1] and not (tmp_path / "run").exists()
    assert said[0].startswith(
        "precision: rank 1 has precision.backend=emulated: cannot do blockwise here: it was taken"
    )
    assert "the other ranks FP8 blockwise by emulation for attention, dense, shared, expert" in said[0]


def test_no_compiler_is_one_line_before_a_run_begins(tmp_path, small_corpus, capfd):
    assert no_compilation(torch.device("cpu")) is None
    words = ["parallel.compile=true", "training.steps=1", f"run.root={tmp_path}", "run.name=run"]
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "missing"))}):
        assert main(["train", *TINY, *small_corpus, *words]) == 2 and not (tmp_path / "run").exists()
    reason = "torch.compile needs a C++ compiler: install g++, or set CXX to one that runs; try false"
    assert capfd.readouterr().err.strip() == f"leviathan: error: parallel.compile=true: {reason}"
