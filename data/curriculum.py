"""The phases of a run as one order of samples: what a phase has taken of a source, the next ones do not take again.

All of it follows from the configuration before the first step; no phase depends on those after it, so that one may be
added to a run. A source goes on in its order from phase to phase, through its epochs. Rows of another length are cut
anew, so there an order of their own begins; what was taken before counts towards `max_epochs` all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from core.errors import ConfigError
from data.corpus import TRAIN, Corpus
from data.loader import Loader, PhaseOffset

MANY_EPOCHS = 4
"""Up to here repeated tokens teach nearly as much as new ones, with more they soon teach little (Muennighoff et al.
2023, arXiv 2305.16264).
"""


@dataclass(frozen=True)
class PhaseRows:
    """What the order of samples must know of a phase. `samples`: rows that it takes at most; `weights`: shares of its
    sources, others are left out; `steps_key`: where a user sets `steps`.
    """

    name: str
    context: int
    global_batch_size: int
    steps: int
    samples: int
    weights: Mapping[str, float]
    steps_key: str


def make_loaders(
    corpus: Corpus,
    phases: Sequence[PhaseRows],
    seed: int,
    max_epochs: Mapping[str, float],
    report: Callable[[str], None],
) -> dict[str, Loader]:
    """A loader for each phase, by its name. `max_epochs`: of the sources that have a limit. `report` gets a line for
    each source that is repeated many times.

    Raises `ConfigError` where all of a phase's sources are used up before its end.
    """
    loaders: dict[str, Loader] = {}
    origins: dict[int, str] = {}
    taken: dict[int, Counter[str]] = {}  # rows by context and source
    epochs = dict.fromkeys(corpus.sources, 0.0)
    for phase in phases:
        origin = origins.setdefault(phase.context, phase.name)
        rows = taken.setdefault(phase.context, Counter())
        left = {
            name: _rows_left(corpus, name, phase.context, limit, taken)
            for name, limit in max_epochs.items()
            if phase.weights.get(name)
        }
        past = PhaseOffset(origin, dict(rows))
        loader = Loader(
            corpus, phase.context, phase.global_batch_size, seed, phase.name, phase.weights, past=past, left=left
        )
        if loader.blend.samples is not None and loader.blend.samples < phase.samples:
            raise _used_up(corpus, phase, loader.blend.samples, max_epochs)
        given = loader.blend.given(phase.samples)
        rows.update(given)
        for name, count in given.items():
            epochs[name] += count / corpus.stream(name, TRAIN).rows(phase.context)
        loaders[phase.name] = loader
    for name, times in epochs.items():
        if times > MANY_EPOCHS:
            advice = f"beyond {MANY_EPOCHS} times it teaches less and less; lower its weight or set max_epochs"
            report(f"source {name} is gone through {times:.1f} times: {advice}")
    return loaders


def _rows_left(corpus: Corpus, name: str, context: int, limit: float, taken: Mapping[int, Mapping[str, int]]) -> int:
    """Rows of this context that a source still gives: of its limit, less what it gave in rows of any length."""
    stream = corpus.stream(name, TRAIN)
    # as it was written: 0.29 of 100 rows are 29, which floating point makes 28
    left = Fraction(str(limit))
    for other, rows in taken.items():
        if rows.get(name):
            left -= Fraction(rows[name], stream.rows(other))
    return max(0, floor(left * stream.rows(context)))


def _used_up(corpus: Corpus, phase: PhaseRows, samples: int, max_epochs: Mapping[str, float]) -> ConfigError:
    """What there is, and how many steps it is enough for."""
    fitting = samples * phase.steps // phase.samples
    names = [name for name, weight in phase.weights.items() if weight]
    parts = [
        f"{name} (max_epochs={max_epochs[name]:g} of {len(corpus.stream(name, TRAIN)):,} tokens)" for name in names
    ]
    there, wanted = (count * phase.context for count in (samples, phase.samples))
    reason = (
        f"phase {phase.name} uses up all of {', '.join(parts)}: {there:,} tokens are left for it, {wanted:,} wanted"
    )
    advice = "raise max_epochs or add sources"
    return ConfigError(phase.steps_key, phase.steps, f"{reason}; {advice}", [fitting] if fitting else [])
