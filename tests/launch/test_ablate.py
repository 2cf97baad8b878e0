"""`leviathan filter ablate`: what its arms are trained on, its arithmetic on made-up losses, all of it once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import FilterRules, GateConfig, ScorerConfig, ScorerKind, SelectConfig
from launch.ablate import AGAINST, COLOURS, THIRDS, AblateConfig, Losses, arms, difference, thirds, write
from launch.cli import main
from tests.support.filtering import prose
from tests.support.tiny import TINY
from train.run_directory import load_config

MADE_UP: Losses = {
    "filtered": [[3.0, 4.0, 5.0, 4.0], [3.0, 4.5, 5.0, 4.1], [3.0, 5.0, 5.0, 4.2]],
    "random half": [[3.5, 4.0, 5.0, 4.1], [3.5, 4.0, 5.5, 4.3], [3.5, 4.0, 6.0, 4.5]],
    "longest half": [[4.0, 4.0, 5.0, 4.3]] * 3,
    "everything": [[3.5, 4.0, 5.0, 4.1], [3.5, 4.0, 5.5, 4.3], [3.5, 4.0, 6.0, 4.5]],
}


def test_thirds_are_of_the_rows_by_difficulty():
    losses = np.arange(9.0)
    assert thirds(losses, losses) == [1.0, 4.0, 7.0, 4.0]
    assert thirds(losses, -losses) == [7.0, 4.0, 1.0, 4.0]
    assert thirds(np.array([1.0, 2.0, 4.0, 9.0]), np.zeros(4)) == [1.5, 4.0, 9.0, 4.0], "ties in the order of the rows"


def test_differences_are_paired_by_seed():
    assert difference(MADE_UP, "filtered", 0) == (-0.5, 0.0), "the same for each seed: no doubt"
    mean, half_width = difference(MADE_UP, "filtered", 2)
    assert (mean, half_width) == (-0.5, pytest.approx(4.303 * 0.5 / 3**0.5))
    assert difference(MADE_UP, "everything", 2) == (0.0, 0.0)
    two = {arm: losses[:2] for arm, losses in MADE_UP.items()}
    assert difference(two, "filtered", 2) == (-0.25, pytest.approx(12.706 * 0.125**0.5 / 2**0.5))


def test_arms_differ_in_the_choice_alone():
    rules = FilterRules(keep=0.3, seed=5, gates=GateConfig(min_characters=7), select=SelectConfig(revive=0.1))
    found = arms(rules, seed=2)
    assert list(found) == list(COLOURS) and found["filtered"] == rules and found["everything"] is None
    for arm, kind, seed in (("random half", ScorerKind.random, 7), ("longest half", ScorerKind.length, 5)):
        select = replace(rules.select, length_buckets=1)
        assert found[arm] == replace(rules, scorer=ScorerConfig(kind=kind), select=select, seed=seed)


def test_each_seed_has_a_random_half_of_its_own():
    seeds = [arms(FilterRules(seed=5), seed) for seed in range(3)]
    assert len({one[AGAINST].seed for one in seeds}) == 3
    assert len({one["filtered"].seed for one in seeds}) == len({one["longest half"].seed for one in seeds}) == 1


def test_what_is_written_is_what_was_found(tmp_path, capsys):
    write(MADE_UP, AblateConfig(), FilterRules(keep=0.3), tmp_path)
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert told["losses"] == MADE_UP and told["rules"]["keep"] == 0.3 and told["ablate"]["seeds"] == 3
    table = told["against random half"]
    assert set(table) == set(COLOURS) - {AGAINST}
    for arm, row in table.items():
        assert list(row) == [*THIRDS, "all"]
        assert [(one["difference"], one["half_width"]) for one in row.values()] == [
            difference(MADE_UP, arm, place) for place in range(4)
        ]
    page = (tmp_path / "ablation.html").read_text()
    assert "<td>filtered</td><td class=n>-0.5000 ± 0.0000</td>" in page and "-0.5000 ± 1.2422" in page
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "filtered minus random half: easy third -0.5000 ± 0.0000, " in capsys.readouterr().out


@pytest.mark.parametrize("setting", [{"seeds": 1}, {"seeds": 9}, {"steps": 0}, {"sequences": 0}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError):
        AblateConfig(**setting)


@pytest.mark.parametrize(
    "words",
    [
        ["input=problems.jsonl", "prompt_key=question", "response_key=answer"],
        ["dataset=some/set"],
        ["domain_key=kind"],
        ["tokenizer=tokens"],
        ["processes=2"],
        ["explain=a.jsonl:3"],
    ],
)
def test_what_an_ablation_would_not_look_at_is_refused(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.verbs.filter.ablate", lambda config, rules, out: 0)
    assert main(["filter", "ablate", *words, f"out={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"leviathan: error: {words[0]}: does not apply to filter ablate, whose data are configured by ablate.train "
        """(docs/filter.md); try 'ablate.train=["data=files","data.sources.text.path=FOLDER"]'"""
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_ablation(tmp_path: Path):
    """On files of one's own, from the words to the page."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, row in enumerate(prose(80)):
        (texts / f"{number}.txt").write_text(row["text"])
    data = ["data=files", f"data.sources.text.path={texts}", "data.tokenizer.vocab_size=300", "data.held_out=0.2"]
    train = [*TINY, *data, f"data.cache={tmp_path / 'cache'}"]
    words = ["ablate.seeds=2", "ablate.steps=2", "ablate.sequences=6", f"ablate.train={json.dumps(train)}"]
    assert main(["filter", "ablate", "keep=0.6", *words, f"out={tmp_path / 'out'}"]) == 0
    told = json.loads((tmp_path / "out" / "ablation.json").read_text())
    losses = {arm: np.array(found) for arm, found in told["losses"].items()}
    assert list(losses) == list(COLOURS) and all(found.shape == (2, 4) for found in losses.values())
    assert all(np.isfinite(found).all() and (found > 0).all() for found in losses.values())
    for arm in set(COLOURS) - {AGAINST}:
        assert (losses[arm] != losses[AGAINST]).any(), f"{arm} is trained on something else"
    runs = {path.name: load_config(path) for path in (tmp_path / "out" / "runs").iterdir()}
    assert set(runs) == {f"{arm.replace(' ', '-')}-{seed}" for arm in COLOURS for seed in range(2)}
    lots = [runs[f"random-half-{seed}"].data.filter for seed in range(2)]
    assert [None if one is None else one.seed for one in lots] == [0, 1], "one lot for each seed"
