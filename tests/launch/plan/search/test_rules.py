"""The search's rules accept what the framework accepts, and nothing else."""

from collections import Counter
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest

from core.errors import ConfigError
from launch.plan.search.config import SearchConfig
from launch.plan.search.grid import layouts
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import SCHEDULES, candidate_rules, layout_rules
from parallel.layout import ParallelConfig
from tests.launch.plan.search.small import SMALL, planned

WORLD = 48
CHOICES = {
    "pp": [1, 2, 3, 4, 6, 16],
    "dp_replicate": [1, 2, 3],
    "cp": [1, 2, 3, 4, 8],
    "tp": [1, 2, 3, 4, 8],
    "ep": [1, 2, 4, 6, 16],
    "etp": [1, 2, 3, 24, 48],
    "micro_batch_size": [1, 2, 3, 4],
    "schedule": range(len(SCHEDULES)),
    "per_rank": [2, 3],
}
MODELS = {
    "small": SMALL,
    "dense": replace(SMALL, moe_every=0),
    "tied": replace(SMALL, tie_embeddings=True),
    "long chunks": replace(SMALL, attention_chunk_size=768),
}


def sample(count: int) -> list[dict[str, int]]:
    random, found = Random(1), []
    while len(found) < count:
        one = {name: random.choice(values) for name, values in CHOICES.items()}
        if random.random() < 0.7:  # most random degrees do not divide the world
            one |= {"ep": 1, "etp": 1} if random.random() < 0.5 else {"cp": 1, "dp_replicate": 1}
        schedule = SCHEDULES[one["schedule"]]
        one["per_rank"] = 1 if schedule.is_single or one["pp"] == 1 else 2 if schedule.is_v else one["per_rank"]
        found.append(one)
    return found


def framework_accepts(one: dict[str, int], model, run) -> bool:
    degrees = {name: one[name] for name in ("pp", "dp_replicate", "cp", "tp", "ep", "etp")}
    if one["pp"] > 1:
        schedule = SCHEDULES[one["schedule"]]
        degrees |= {"schedule": schedule, "stages_per_rank": None if schedule.is_single else one["per_rank"]}
    try:
        layout = ParallelConfig(**degrees).resolve(WORLD)
        layout.check_model(model)
        layout.check_batch(run.global_batch_size, one["micro_batch_size"])
        layout.check_seq_len(model, run.seq_len)
    except ConfigError:
        return False
    return True


def rules_accept(found: list[dict[str, int]], outline: ModelOutline) -> np.ndarray:
    c = {name: np.array([one[name] for one in found]) for name in CHOICES}
    c["dp"] = np.maximum(1, WORLD // (c["pp"] * c["cp"] * c["tp"]))
    c["fp8"] = np.zeros(len(found), bool)
    return np.all([rule.allows(c) for rule in (*layout_rules(outline, WORLD), *candidate_rules(outline, 16))], axis=0)


def of_batch(batch: int):
    return replace(planned().run, seq_len=4608, global_batch_size=batch)


@cache
def truths(name: str, batch: int, count: int) -> np.ndarray:
    return np.array([framework_accepts(one, MODELS[name], of_batch(batch)) for one in sample(count)])


@pytest.mark.parametrize(
    ("name", "batch", "count"),
    [("small", 144, 600)] + [pytest.param(name, 96, 4000, marks=pytest.mark.slow) for name in MODELS],
)
def test_rules_agree_with_the_framework(name, batch, count):
    found, truth = sample(count), truths(name, batch, count)
    assert 10 < truth.sum() < count / 2
    wrong = np.flatnonzero(rules_accept(found, ModelOutline(MODELS[name], of_batch(batch))) != truth)
    assert not len(wrong), [found[at] for at in wrong[:3]]


@pytest.mark.parametrize("forgotten", [0, 2, 3, 5, 6])  # rules 1 and 4 are the beginnings of rules of candidates
def test_a_forgotten_rule_is_noticed(forgotten, monkeypatch):
    outline = ModelOutline(SMALL, of_batch(144))
    kept = [rule for at, rule in enumerate(layout_rules(outline, WORLD)) if at != forgotten]
    monkeypatch.setitem(rules_accept.__globals__, "layout_rules", lambda *given: kept)
    assert (rules_accept(sample(600), outline) != truths("small", 144, 600)).any()


def test_rejected_and_kept_layouts_add_up():
    outline, gpu = ModelOutline(SMALL, planned().run), planned().cluster.description
    values = [1, 2, 4, 8, 16, 48]
    search = SearchConfig(**{name: values for name in ("pp", "dp_replicate", "cp", "tp", "ep", "etp")})
    rejected: Counter[str] = Counter()
    table = layouts(outline, gpu, 16, search, rejected)
    assert len(table["pp"]) + rejected.total() == len(values) ** 6
    assert (table["pp"] * table["dp"] * table["cp"] * table["tp"] == 16).all()
