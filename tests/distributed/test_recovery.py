"""Recovery under layouts: one decision for all ranks, the same as one process makes; and silent corruption is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.recovery.planted import (
    GARBAGE,
    NAN,
    STEPS,
    digest_of,
    losses,
    of_event,
    outcome,
    planted_callback,
    train,
    verdicts,
    write_corpus,
)
from train.trainer import Trainer

pytestmark = pytest.mark.slow
LAYOUTS = {
    "ep": (2, ["parallel.ep=2"]),
    "pp": (4, ["parallel.pp=2", "training.micro_batch_size=1"]),
    "tp": (2, ["parallel.tp=2"]),
}
REPLICAS = ["parallel.dp_replicate=2", "recovery.replicas_every=4", "optimizer=adamw", "optimizer.lr=3e-3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("recovery"))


def amendments(run: Path) -> Any:
    return json.loads((run / "amendments.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [NAN, GARBAGE], ids=["nan", "garbage"])
def test_ranks_find_what_one_process_finds(ranks, corpus, tmp_path, layout, factor):
    count, overrides = LAYOUTS[layout]
    found = ranks(count, outcome, tmp_path, "run", [*corpus, *overrides], factor)
    assert found == [(STEPS, "")] * count
    assert verdicts(tmp_path / "run") == ["data"]
    assert outcome(tmp_path, "alone", corpus, factor) == (STEPS, "")
    assert amendments(tmp_path / "run") == amendments(tmp_path / "alone")
    theirs, ours = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert list(theirs) == list(ours)
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-9) for step in theirs)


@pytest.mark.parametrize("kind, found", [("Scaled", "corruption"), ("RouterCollapse", "corruption")])
def test_a_passing_fault_of_one_rank_is_repeated_away(ranks, corpus, tmp_path, kind, found):
    planted = planted_callback(kind, step=13, once=True, rank=1)
    assert ranks(2, outcome, tmp_path, "run", [*corpus, "parallel.ep=2", planted]) == [(STEPS, "")] * 2
    assert verdicts(tmp_path / "run") == [found]


def final_digest(root: Path, name: str, overrides: list[str]) -> dict[str, list[int]]:
    run = train(root, name, overrides)
    assert isinstance(run, Trainer), run
    return digest_of(run)


@pytest.fixture(scope="module")
def clean(ranks, corpus, tmp_path_factory) -> list[dict[str, list[int]]]:
    return ranks(2, final_digest, tmp_path_factory.mktemp("clean"), "run", [*corpus, *REPLICAS])


@pytest.mark.parametrize(
    "name, bit, step, named",
    [
        pytest.param("model. head", 0, 13, [1], id="least"),
        pytest.param("optimizer. exp_avg_sq", 50, 15, [1], id="moment"),
        pytest.param("model. head", 40, 13, [], id="weight"),  # gradients carry it to the other replica
    ],
)
def test_a_flipped_bit_is_found_and_mended(ranks, corpus, tmp_path, clean, name, bit, step, named):
    flip = planted_callback("FlippedBit", step=step, rank=1, name=f"'{name}'", bit=bit)
    assert ranks(2, final_digest, tmp_path, "run", [*corpus, *REPLICAS, flip]) == clean
    (alarm,), (action,) = of_event(tmp_path / "run", "alarm"), of_event(tmp_path / "run", "action")
    assert (alarm["detector"], alarm["step"], action["verdict"]) == ("replicas", 16, "corruption")
    (evidence,) = of_event(tmp_path / "run", "evidence")
    assert evidence["outcome"]["ranks"] == named and evidence["outcome"]["replicas"] == "agree again"
    corrupt = tmp_path / "run" / "logs" / "corrupt.jsonl"
    assert corrupt.exists() == bool(named)
    if named:
        assert json.loads(corrupt.read_text())["hosts"] == evidence["outcome"]["hosts"] != []


def test_without_comparison_the_flipped_bit_stays(ranks, corpus, tmp_path, clean):
    flip = planted_callback("FlippedBit", step=13, rank=1, name="'model. head'", bit=40)
    found = ranks(2, final_digest, tmp_path, "run", [*corpus, *REPLICAS, "recovery.replicas_every=0", flip])
    assert found[0] != found[1] and found != clean and not (tmp_path / "run" / "recovery.jsonl").exists()
