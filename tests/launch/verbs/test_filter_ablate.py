"""`leviathan filter ablate`: the data of its arms, its arithmetic on made-up losses, and one small run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data.filter.config import FilterRules, GateConfig, ScorerConfig, ScorerKind, SelectConfig
from launch.cli import main
from launch.filter.ablate import COLOURS, CONTROL, GROUPS, Losses, arms, difference, group_means, write
from launch.filter.config import AblateConfig
from tests.support.filtering import prose
from tests.support.tiny import TINY
from train.run_directory import load_config

MADE_UP: Losses = {
    "filtered": [[3.0, 4.0, 5.0, 4.0], [3.0, 4.5, 5.0, 4.1], [3.0, 5.0, 5.0, 4.2]],
    "random half": [[3.5, 4.0, 5.0, 4.1], [3.5, 4.0, 5.5, 4.3], [3.5, 4.0, 6.0, 4.5]],
    "longest half": [[4.0, 4.0, 5.0, 4.3]] * 3,
    "everything": [[3.5, 4.0, 5.0, 4.1], [3.5, 4.0, 5.5, 4.3], [3.5, 4.0, 6.0, 4.5]],
}


def test_thirds_are_by_difficulty():
    losses = np.arange(9.0)
    assert group_means(losses, losses) == [1.0, 4.0, 7.0, 4.0]
    assert group_means(losses, -losses) == [7.0, 4.0, 1.0, 4.0]
    assert group_means(np.array([1.0, 2.0, 4.0, 9.0]), np.zeros(4)) == [1.5, 4.0, 9.0, 4.0], "ties keep their order"


def test_differences_are_paired_by_seed():
    assert difference(MADE_UP, "filtered", 0) == (-0.5, 0.0), "equal differences have no spread"
    mean, half_width = difference(MADE_UP, "filtered", 2)
    assert (mean, half_width) == (-0.5, pytest.approx(4.303 * 0.5 / 3**0.5))
    assert difference(MADE_UP, "everything", 2) == (0.0, 0.0)
    two = {arm: losses[:2] for arm, losses in MADE_UP.items()}
    assert difference(two, "filtered", 2) == (-0.25, pytest.approx(12.706 * 0.125**0.5 / 2**0.5))


def test_arms_differ_in_the_choice_only():
    rules = FilterRules(keep=0.3, seed=5, gates=GateConfig(min_characters=7), select=SelectConfig(revive=0.1))
    select = replace(rules.select, length_buckets=1)
    for number in range(3):
        found = arms(rules, seed=number)
        assert list(found) == list(COLOURS) and found["filtered"] == rules and found["everything"] is None
        for arm, kind, seed in ((CONTROL, ScorerKind.random, 5 + number), ("longest half", ScorerKind.length, 5)):
            assert found[arm] == replace(rules, scorer=ScorerConfig(kind=kind), select=select, seed=seed)


def test_outputs_match_the_losses(tmp_path, capsys):
    write(MADE_UP, AblateConfig(), FilterRules(keep=0.3), tmp_path)
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert found["losses"] == MADE_UP and found["rules"]["keep"] == 0.3 and found["ablate"]["seeds"] == 3
    table = found["against random half"]
    assert set(table) == set(COLOURS) - {CONTROL}
    for arm, row in table.items():
        assert list(row) == list(GROUPS)
        assert [(one["difference"], one["half_width"]) for one in row.values()] == [
            difference(MADE_UP, arm, place) for place in range(4)
        ]
    page = (tmp_path / "ablation.html").read_text()
    assert "<td>filtered</td><td class=n>-0.5000 ± 0.0000</td>" in page and "-0.5000 ± 1.2422" in page
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "filtered minus random half: easy third -0.5000 ± 0.0000, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_ablation(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, row in enumerate(prose(80)):
        (texts / f"{number}.txt").write_text(row["text"])
    data = ["data=files", f"data.sources.text.path={texts}", "data.tokenizer.vocab_size=300", "data.held_out=0.2"]
    train = [*TINY, *data, f"data.cache={tmp_path / 'cache'}"]
    words = ["ablate.seeds=2", "ablate.steps=2", "ablate.sequences=6", f"ablate.train={json.dumps(train)}"]
    assert main(["filter", "ablate", "keep=0.6", *words, f"out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    losses = {arm: np.array(values) for arm, values in found["losses"].items()}
    assert list(losses) == list(COLOURS) and all(found.shape == (2, 4) for found in losses.values())
    assert all(np.isfinite(found).all() and (found > 0).all() for found in losses.values())
    for arm in set(COLOURS) - {CONTROL}:
        assert (losses[arm] != losses[CONTROL]).any(), f"{arm} is trained on other data"
    runs = {path.name: load_config(path) for path in (tmp_path / "out" / "runs").iterdir()}
    assert set(runs) == {f"{arm.replace(' ', '-')}-{seed}" for arm in COLOURS for seed in range(2)}
    filters = [runs[f"random-half-{seed}"].data.filter for seed in range(2)]
    assert [None if one is None else one.seed for one in filters] == [0, 1], "another random half for each seed"
