"""Each setting is in the hashes that depend on it and in no other, and hashes of default settings stay as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from core.config import plain
from core.errors import ConfigError
from core.files import sha256_text
from data.filter.config import (
    ContaminationConfig,
    DuplicateConfig,
    FeatureKind,
    FilterRules,
    InputConfig,
    ScorerConfig,
    ScorerKind,
    SelectConfig,
    decisive_settings,
    without_defaults,
)
from data.filter.input.records import Record
from data.filter.score.baselines import RandomScorer
from data.filter.score.factory import make_scorer
from data.filter.score.features import ReferenceFeatures
from data.filter.score.learned import LearnedScorer
from data.filter.score.losses import DifficultyOfFollowing, ExcessScorer, LossScorer
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import fold, sample_key
from data.images.config import ImagesConfig
from data.images.parts import PartsConfig

CONNECTION = {"url", "key_variable", "concurrency", "timeout_s", "retries", "answers"}
JUDGE = ScorerConfig(ScorerKind.judge, url="http://a", judge="m")
PASS_RATE = ScorerConfig(ScorerKind.pass_rate, url="http://a", judge="m", verifier="_operator:eq")


def other_value(value: Any) -> Any:
    """Return another value of the same type."""
    match value:
        case Enum():
            return next(one for one in type(value) if one is not value)
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.9 * value or 0.25
        case list():
            return [*value, "x"]
        case dict():
            return {**value, "x": 1}
    return f"{value}x"


def changes(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting and a copy of the configuration with another value for it alone, without checks."""
    for one in fields(config):
        value, key = getattr(config, one.name), f"{path}{one.name}"
        if is_dataclass(value):
            found = changes(value, f"{key}.")
        elif value and isinstance(value, list) and is_dataclass(value[0]):
            found = ((name, [changed, *value[1:]]) for name, changed in changes(value[0], f"{key}."))
        else:
            found = iter(
                [(key, JUDGE if one.name == "labeler" else [JUDGE] if one.name == "members" else other_value(value))]
            )
        for name, changed in found:
            new = copy.copy(config)
            object.__setattr__(new, one.name, changed)
            yield name, new


@pytest.mark.parametrize(
    "scorer",
    [
        ScorerConfig(),
        ScorerConfig(ScorerKind.learned, labeler=JUDGE),
        ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(ScorerKind.learned, labeler=JUDGE), ScorerConfig()]),
    ],
)
def test_each_rule_decides_except_those_of_the_connection(scorer):
    rules = FilterRules(scorer=scorer)
    base, whole = json.dumps(decisive_settings(rules)), json.dumps(without_defaults(plain(rules)))
    names = set()
    for name, changed in changes(rules):
        last = name.rpartition(".")[2]
        names.add(last)
        is_free = last == "require_auc" or (last in CONNECTION and name.startswith("scorer"))
        assert (json.dumps(decisive_settings(changed)) == base) == is_free, name
        assert json.dumps(without_defaults(plain(changed))) != whole, name
    assert names > CONNECTION and {"keep", "seed", "features", "order", "buckets", "pictures"} < names


def test_hashes_of_stored_stages_stay_as_they_are():
    """Omit a new setting at its default; keep the old name of one that was renamed."""
    ensemble = ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(order=3), ScorerConfig(ScorerKind.random)])
    found = [
        sha256_text(json.dumps(settings))[:8]
        for scorer in (ScorerConfig(), ensemble, ScorerConfig(ScorerKind.learned, labeler=JUDGE))
        for settings in (
            decisive_settings(FilterRules(scorer=scorer)),
            without_defaults(plain(FilterRules(scorer=scorer))),
        )
    ]
    assert found == ["8fc09e97", "6e5023af", "768761d6", "f93eeea4", "cc376ab0", "f9af1bd1"]


def scorers(tmp_path: Path) -> dict[str, Any]:
    def loss(pairs: Any) -> Any:
        return []

    configs = {
        "random": ScorerConfig(ScorerKind.random),
        "length": ScorerConfig(ScorerKind.length),
        "ngram": ScorerConfig(),
        "judge": JUDGE,
        "quality": ScorerConfig(ScorerKind.judge, url="http://a", judge="m", rubric="quality"),
        "pass_rate": PASS_RATE,
        "learned": ScorerConfig(ScorerKind.learned),
        "graded": ScorerConfig(ScorerKind.learned, labeler=ScorerConfig(ScorerKind.length)),
        "ensemble": ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(), ScorerConfig(ScorerKind.length)]),
    }
    found = {name: make_scorer(config, None, tmp_path, 1) for name, config in configs.items()}
    found |= {"loss": LossScorer(loss, "f"), "ifd": DifficultyOfFollowing(loss, "f")}
    return found | {"excess": ExcessScorer(loss, "f", loss, "g")}


def test_fingerprints_of_scorers_stay_as_they_are(tmp_path):
    """Stored scores and answers are found by them."""
    found = scorers(tmp_path)
    record = Record("1", "d", "s", "why? because", 4)
    known = {name: one.fingerprint[:8] for name, one in found.items()}
    known["key of a grade"], known["key of an answer"] = (
        next(iter(found[name].requests(record)))[:8] for name in ("judge", "pass_rate")
    )
    assert known == {
        "random": "2e24ca39",
        "length": "e07973cf",
        "ngram": "5c87e748",
        "judge": "a09ec373",
        "quality": "0606c399",
        "pass_rate": "64155cd2",
        "learned": "c501d74d",
        "graded": "6e784657",
        "ensemble": "d256002e",
        "loss": "1ffbf0da",
        "ifd": "74f0490a",
        "excess": "e24b9428",
        "key of a grade": "09516351",
        "key of an answer": "c72db5b9",
    }
    assert [round(score, 6) for score in RandomScorer(1).score([record]).tolist()] == [0.696852]
    halves, key = int(record.content[:8], 16), int(record.content[8:24], 16)
    assert (fold(record), sample_key(record)) == (halves % 2, key)
    assert found["learned"].directory == tmp_path / f"learned-{known['learned']}"


def test_settings_that_change_scores_change_fingerprints(tmp_path):
    def loss(pairs: Any) -> Any:
        return []

    (tmp_path / "own.txt").write_text("{text}")
    made: list[Any] = [*scorers(tmp_path).values()]
    made += [make_scorer(config, None, tmp_path, 2) for config in (ScorerConfig(ScorerKind.random),)]
    made += [
        NgramScorer(4),
        NgramScorer(5, 7),
        NgramScorer(5, None, 100),
        LossScorer(loss, "g"),
        LossScorer(loss, "f", 2),
    ]
    made += [DifficultyOfFollowing(loss, "g"), ExcessScorer(loss, "g", loss, "f"), ExcessScorer(loss, "f", loss, "h")]
    own = {"judge": "n"}, {"rubric": str(tmp_path / "own.txt")}
    made += [
        make_scorer(ScorerConfig(ScorerKind.judge, url="http://a", **{"judge": "m", **one}), None, tmp_path)
        for one in own
    ]
    rates: list[dict[str, Any]] = [{"judge": "n"}, {"samples": 5}, {"verifier": "operator:ne"}]
    for one in rates:
        settings = {"url": "http://a", "judge": "m", "verifier": "operator:eq", **one}
        made.append(make_scorer(ScorerConfig(ScorerKind.pass_rate, **settings), None, tmp_path))
    learned = ScorerKind.learned
    made.append(make_scorer(ScorerConfig(learned, labels=60), None, tmp_path))
    for seed in (1, 2):
        random = ScorerConfig(ScorerKind.random)
        for one in (ScorerConfig(learned, labeler=random), ScorerConfig(ScorerKind.ensemble, members=[random] * 2)):
            made.append(make_scorer(one, None, tmp_path, seed))
    for fingerprint in "fg":
        reference = ReferenceFeatures(FeatureKind.hidden, "m", Mock(), fingerprint)
        made.append(LearnedScorer(ScorerConfig(learned), tmp_path, None, reference))
    found = [one.fingerprint for one in made]
    assert len(set(found)) == len(found) == 33
    same = ScorerConfig(
        ScorerKind.judge, url="http://b", judge="m", retries=1, timeout_s=3.0, concurrency=2, answers="x"
    )
    assert make_scorer(same, None, tmp_path).fingerprint == scorers(tmp_path)["judge"].fingerprint


def test_an_imported_scorer_has_a_direction(monkeypatch, tmp_path):
    (tmp_path / "own_scorers.py").write_text("""
from tests.support.filtering import FixedScorer
class Good(FixedScorer):
    def __init__(self, scale): super().__init__(lambda record: scale)
class Bad(Good): direction = "hard"
""")
    monkeypatch.syspath_prepend(tmp_path)
    made = make_scorer(ScorerConfig("own_scorers:Good", {"scale": 3}), None, tmp_path)
    assert made.score([Record("1", "d", "s", "text")]).tolist() == [3]
    with pytest.raises(ConfigError, match="direction must be"):
        make_scorer(ScorerConfig("own_scorers:Bad", {"scale": 3}), None, tmp_path)
    with pytest.raises(ConfigError, match="options"):
        ScorerConfig(options={"scale": 3})


RANGES: list[tuple[Callable[..., Any], str, list[Any], list[Any]]] = [
    (FilterRules, "keep", [1e-9, 1], [0, -1, 1.01]),
    (ScorerConfig, "labels", [30, 5000], [29, 5001]),
    (ScorerConfig, "window", [1, None], [0]),
    (ScorerConfig, "retries", [0], [-1]),
    (SelectConfig, "revive", [0, 0.99], [-0.1, 1]),
    (SelectConfig, "noise_quantile", [0.51, 1], [0.5, 1.01]),
    (SelectConfig, "length_buckets", [1, 64], [0, 65]),
    (SelectConfig, "require_auc", [0.5, 0.99, None], [0.49, 1]),
    (SelectConfig, "floor", [0], [-1]),
    (SelectConfig, "domains", [{"a": 0.0, "b": 1.0}], [{"a": -0.1}, {"a": 0.5, "b": 1.1}]),
    (DuplicateConfig, "near", [0.3, 0.99, None], [0.29, 1]),
    (DuplicateConfig, "pictures", [0, 11, None], [-1, 12]),
    (ContaminationConfig, "words", [3], [2]),
]
RANGES += [
    (ScorerConfig, key, [1], [0]) for key in ("order", "seq_len", "batch_size", "concurrency", "timeout_s", "samples")
]


@pytest.mark.parametrize(("config", "key", "good", "bad"), RANGES, ids=[one[1] for one in RANGES])
def test_a_number_outside_its_range_is_rejected(config, key, good, bad):
    for value in good:
        config(**{key: value})
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            config(**{key: value})
        assert caught.value.key.partition(".")[0] == key


def test_inputs_that_contradict_themselves_are_rejected():
    one = {"input": "a"}
    for settings, key in (
        ({}, "input"),
        (one | {"dataset": "b"}, "input"),
        (one | {"prompt_key": "q"}, "response_key"),
        (one | {"response_key": "a"}, "response_key"),
        (one | {"parts": PartsConfig("caption")}, "parts"),
        ({"dataset": "b", "images": ImagesConfig()}, "dataset"),
        *(
            (one | {"images": ImagesConfig(), key: "x"}, key)
            for key in ("text_key", "id_key", "domain_key", "label_key")
        ),
        (one | {"prompt_key": "q", "response_key": "a", "messages_key": "m"}, "messages_key"),
        *(
            (one | {"template": text}, "template")
            for text in ("{prompt}", "{response}{prompt}", "{prompt}{response}{x}")
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            InputConfig(**settings)
        assert caught.value.key == key
    parts = {"images": ImagesConfig(), "parts": PartsConfig("caption")}
    for settings in (
        one,
        one | parts,
        {"dataset": "b"},
        one | {"messages_key": "m"},
        one | {"template": "{prompt}|{response}!"},
    ):
        InputConfig(**settings)


def test_parts_of_a_scorer_have_their_keys():
    scorer = ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(ScorerKind.learned, labeler=JUDGE), PASS_RATE])
    keys = ["s", "s.members[0]", "s.members[0].labeler", "s.members[1]"]
    assert [key for key, _ in scorer.parts("s")] == keys
    paths = scorer.import_paths("s")
    assert set(paths) == {f"{key}.{name}" for key in keys for name in ("kind", "verifier")}
    assert paths["s.members[1].verifier"] == "_operator:eq" and paths["s.members[1].kind"] is ScorerKind.pass_rate
    for config, key in ((scorer, "s.members[0].labeler.rubric"), (PASS_RATE, "s.kind")):
        with pytest.raises(ConfigError, match="requires prompts") as caught:
            config.check_documents("s")
        assert caught.value.key == key
    files = [ScorerConfig(ScorerKind.judge, url="http://a", judge="m", rubric=name) for name in ("quality", "own.txt")]
    both = ScorerConfig(ScorerKind.ensemble, members=files)
    both.check_documents("s")
    assert both.rubric_files() == ["own.txt"] and scorer.rubric_files() == []


def test_only_scorers_that_learn_read_all_records_first():
    reading = {ScorerKind.auto, ScorerKind.ngram, ScorerKind.learned, ScorerKind.ensemble}
    needs = {"model": "m", "reference": "r", "url": "http://a", "judge": "m", "verifier": "v", "members": [JUDGE] * 2}
    for kind in ScorerKind:
        given = {} if kind is ScorerKind.learned else {"model": "m"}
        config = ScorerConfig(kind, **{**needs, "model": None, **given})
        assert config.reads_all_first == (kind in reading), kind
    assert not ScorerConfig(ScorerKind.learned, model="m").reads_all_first
    assert not ScorerConfig("module:Name").reads_all_first
