"""Losses and continuations of texts and pictures on several ranks are those of one process, under every layout."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.errors import LeviathanError
from core.exit_codes import RankFailure
from parallel.comm.world import connect
from parallel.sharding import local
from tests.distributed.vision.test_answers import prepared
from tests.support.tiny import saved
from train.corpus import keep_tokenizer
from train.eval import generate
from train.eval.config import GenerateConfig
from train.eval.generate import CachedModel, Continuation
from train.eval.scoring_model import ScoringModel, TokenWindow, from_run

PLACEHOLDER, PER_TILE, BATCH = 5, 4, 2
PICTURE = [PLACEHOLDER] * PER_TILE


def pixels(tiles: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tiles, 3, 8, 8), generator=generator).to(torch.uint8)


def windows() -> list[TokenWindow]:
    """Five windows of different lengths, so that batches and ranks are uneven. Two show pictures."""
    texts = [
        TokenWindow(i, [(7 * i + 3 * j) % 290 + 6 for j in range(length)], 2) for i, length in enumerate((9, 4, 30))
    ]
    one = TokenWindow(3, [0, 6, *PICTURE, 7, 20, 21, 22], 3, pixels(1, 1))
    two = TokenWindow(4, [0, 6, *PICTURE, 7, 6, *PICTURE, 7, 30, 31], 1, pixels(2, 2))
    return [texts[0], one, texts[1], two, texts[2]]


def continuations() -> list[Continuation]:
    """Seven prompts, greedy and sampled, with different limits. One outgrows the context, three show pictures."""
    found = []
    for i, length in enumerate((3, 12, 5, 58)):
        config = GenerateConfig(run="", tokens=(4, 9, 2, 9)[i], temperature=0.8 * (i % 2), top_k=None, seed=i)
        found.append(Continuation([(5 * i + 11 * j) % 280 + 6 for j in range(length)], config))
    for i, tiles in enumerate((1, 2, 1)):
        config = GenerateConfig(run="", tokens=3 + 2 * i, temperature=0, top_k=None)
        prompt = [0, *[6, *PICTURE, 7] * tiles, 40 + i]
        found.append(Continuation(prompt, config, pixels_N3SS=pixels(tiles, i)))
    return found


def asked(directory: Path) -> dict[str, Any]:
    model = from_run(directory, connect())
    continued = continuations()
    model.continue_all(continued, BATCH)
    losses = model.losses(windows(), BATCH)
    return {
        "axes": {} if model.placed is None else model.placed.meshes.layout.axes,
        "tokens": [one.found for one in continued],
        "losses": [losses_T.tolist() for losses_T, _ in losses],
        "likeliest": [flags_T.tolist() for _, flags_T in losses],
        "fingerprint": model.fingerprint,
    }


def save_run(root: Path, words: list[str]) -> None:
    run = saved(root, "run", words, 4)
    keep_tokenizer(run.corpus, run.directory)


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> Path:
    """Return the directory of a short run on pictures, made by one process."""
    root, words = tmp_path_factory.mktemp("alone"), prepared(tmp_path_factory.mktemp("cache"))
    ranks(1, save_run, root, words)
    return root / "run"


@pytest.fixture(scope="module")
def alone(ranks, trained) -> dict[str, Any]:
    (found,) = ranks(1, asked, trained)
    assert all(found["tokens"]) and len({len(tokens) for tokens in found["tokens"]}) > 3
    return found


def laid_out(run: Path, root: Path, degrees: dict[str, Any]) -> Path:
    """Copy a run, as if it had been trained under another layout."""
    copied = Path(shutil.copytree(run, root / "run"))
    config = yaml.safe_load((copied / "config.yaml").read_text())
    for key, value in degrees.items():
        owner = config["parallel"]
        *path, last = key.split(".")
        for name in path:
            owner = owner[name]
        assert last in owner
        owner[last] = value
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    return copied


QUICK = {"fsdp": (2, {})}
LAYOUTS = {
    "replicas": (2, {"dp_replicate": 2}),
    "ep": (2, {"ep": 2}),
    "shared tiles": (2, {"vision.over_data_parallel": True}),
    "tp": (2, {"tp": 2}),
    "cp": (2, {"cp": 2}),
    "pp": (2, {"pp": 2}),
    "pp, all stages": (2, {"pp": 2, "vision.stages": "all"}),
    "fsdp 4": (4, {}),
    "tp, fsdp": (4, {"tp": 2}),
    "pp, all stages, fsdp": (4, {"pp": 2, "vision.stages": "all"}),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_one_process(ranks, trained, alone, tmp_path, name):
    count, degrees = (QUICK | LAYOUTS)[name]
    for found in ranks(count, asked, laid_out(trained, tmp_path, degrees)):
        assert {axis: size for axis, size in degrees.items() if "." not in axis}.items() <= found["axes"].items()
        for key in ("tokens", "likeliest", "fingerprint"):
            assert found[key] == alone[key]
        for mine, expected in zip(found["losses"], alone["losses"], strict=True):
            assert mine == pytest.approx(expected, abs=1e-5)


def asked_with_bug(directory: Path, bug: str) -> str | dict[str, Any]:
    """Return the error of this rank, or its answers and forward passes. The bug is on rank 1."""
    world, passes, here = connect(), 0, sys.modules[__name__]
    check, run, opened, some = generate._check, CachedModel._run, from_run, windows()

    def diverged(logits: torch.Tensor) -> None:
        raise LeviathanError("the model computes NaN")

    def counted(*given: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return run(*given)

    @torch.no_grad()
    def perturbed(*given: Any) -> ScoringModel:
        model = opened(*given)
        for parameter in model.network.parameters():
            local(parameter).mul_(1.1)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedModel, "_run", counted)
        if world.rank == 1:
            patch.setattr(generate, "_check", diverged if bug == "NaN" else check)
            patch.setattr(here, "windows", lambda: some[:4] if bug == "other questions" else some)
            patch.setattr(here, "from_run", perturbed if bug == "other weights" else opened)
            if bug == "out of step":
                patch.setattr(CachedModel, "idle", lambda self: torch.empty(0))
        try:
            return {**asked(directory), "passes": passes}
        except LeviathanError as error:
            return f"{error.everywhere} {error}"


def test_ranks_run_equally_many_passes(ranks, trained, alone):
    found: list[Any] = ranks(2, asked_with_bug, trained, "")
    assert found[0]["passes"] == found[1]["passes"] > max(map(len, alone["tokens"]))


@pytest.mark.slow
def test_a_rank_that_runs_fewer_passes_is_noticed(ranks, trained):
    with pytest.raises(RankFailure):
        ranks(2, asked_with_bug, trained, "out of step", timeout_s=5)


@pytest.mark.parametrize("bug", ["NaN", "other questions"])
def test_the_failure_of_one_rank_is_that_of_all(ranks, trained, bug):
    first, second = ranks(2, asked_with_bug, trained, bug)
    assert first == second and ("computes NaN" in first) == (bug == "NaN")
    assert first.startswith("True ") and ("start all ranks alike" in first) == (bug == "other questions")


def test_weights_that_differ_on_one_rank_are_noticed(ranks, trained, alone):
    found: Any = ranks(2, asked_with_bug, trained, "other weights")[0]
    for key in ("tokens", "losses", "fingerprint"):
        assert found[key] != alone[key]
