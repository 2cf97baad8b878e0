"""Choose what each arm trains on. All arms of a cell train on equally many tokens.

A cell is a mix, the number of problems to train on and the number of epochs. Its pool is so large that an arm that
keeps half of it goes through that half `epochs` times. `everything` goes through the whole pool half as often. With one
epoch it would be another random half, and is omitted.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.problems import Problem, records
from bench.study.tasks import FAMILIES, draw_exam, draw_mix
from data.filter.audit.separation import auc
from data.filter.config import ScorerConfig
from data.filter.score.learned import LearnedScorer

RANDOM, HARD, JUDGE, LEARNED, EVERYTHING = "random half", "hard half", "judge", "learned", "everything"
LABELS = 500
"""Labels from which the learned scorer learns."""
EXAM_EACH = 25
"""Held-out problems of each family and number of steps."""


@dataclass(frozen=True)
class Cell:
    """`easy`: fraction of easy problems in the pool. `trained`: problems that a run trains on, repetitions counted.
    `epochs`: how often a half of the pool is seen.
    """

    easy: float
    trained: int
    epochs: int = 1
    size: str = "1M"

    @property
    def name(self) -> str:
        return f"{self.size}-easy{100 * self.easy:.0f}-trained{self.trained}-epochs{self.epochs}"

    @property
    def arms(self) -> tuple[str, ...]:
        if self.size != "1M":
            return RANDOM, HARD
        if self.epochs > 1:
            return RANDOM, HARD, EVERYTHING
        return (RANDOM, HARD, LEARNED) if self.trained < 3000 else (RANDOM, HARD, JUDGE, LEARNED)


@dataclass(frozen=True)
class Draw:
    """The data of a cell for one seed: its pool, held-out problems, and a score of each problem by arm. `area`: AUC of
    each score for more against fewer steps, inside families.
    """

    pool: list[Problem]
    exam: list[Problem]
    scores: dict[str, NDArray[np.float64]]
    area: dict[str, float]


def draw(cell: Cell, seed: int) -> Draw:
    """Draw the data of a cell. The exam depends on the seed only."""
    exam = draw_exam(random.Random(f"exam {seed}"), EXAM_EACH)
    pool = draw_mix(random.Random(f"pool {cell} {seed}"), 2 * cell.trained // cell.epochs, cell.easy, exam)
    chance = np.random.default_rng([seed, *cell.name.encode()])
    steps = np.array([one.label for one in pool])
    judged = steps + chance.normal(size=len(pool))
    scores = {RANDOM: chance.random(len(pool)), HARD: steps, JUDGE: judged, LEARNED: learned(pool, judged)}
    families = np.array([FAMILIES.index(one.family) for one in pool])
    area = {arm: one.value for arm, one in auc(scores, steps, families, resamples=0).items()}
    return Draw(pool, exam, scores, area)


def learned(pool: Sequence[Problem], judged: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores of the filter's scorer `learned`, which has `LABELS` of the judge's labels."""
    labelled = [replace(one, label=float(label)) for one, label in zip(records(pool), judged, strict=True)]
    with tempfile.TemporaryDirectory() as directory:
        scorer = LearnedScorer(ScorerConfig(labels=LABELS), Path(directory))
        scorer.report = lambda line: None
        scorer.fit(lambda: labelled)
        return scorer.score(labelled)


def training_problems(cell: Cell, found: Draw, arm: str, seed: int) -> list[Problem]:
    """Return the problems that an arm trains on, in order: `cell.trained` of them."""
    chance = random.Random(f"order {cell} {arm} {seed}")
    kept = found.pool if arm == EVERYTHING else best_half(found.pool, found.scores[arm], chance)
    order: list[Problem] = []
    while len(order) < cell.trained:
        order += chance.sample(kept, len(kept))
    return order[: cell.trained]


def best_half(pool: Sequence[Problem], scores: NDArray[np.float64], chance: random.Random) -> list[Problem]:
    """Return the half of each family with the highest scores. Equal scores are ordered at random."""
    kept = []
    for family in FAMILIES:
        mine = [(score, chance.random(), place) for place, score in enumerate(scores) if pool[place].family == family]
        mine.sort(reverse=True)
        kept += [pool[place] for *_, place in mine[: len(mine) // 2]]
    return kept


def check_fair(cell: Cell, found: Draw, chosen: dict[str, list[Problem]]) -> None:
    """Raise `ValueError` if arms differ in the number of tokens, or train on held-out problems."""
    sizes = {arm: len(order) for arm, order in chosen.items()}
    if set(sizes.values()) != {cell.trained}:
        raise ValueError(f"arms of {cell.name} train on different amounts: {sizes}")
    held_out = {one.prompt for one in found.exam}
    for arm, order in chosen.items():
        if leaked := sum(one.prompt in held_out for one in order):
            raise ValueError(f"{arm} of {cell.name} trains on {leaked} held-out problems")
