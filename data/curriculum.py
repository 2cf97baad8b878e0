"""Chain the sample orders of a run's phases, so that a phase repeats no sample of an earlier phase.

The orders follow from the configuration alone. No phase depends on later ones, so a phase can be appended to a run. The
order of a source continues from phase to phase, epoch after epoch. Phases with another sequence length cut the text
into other sequences and have their own order. Text that earlier phases took still counts towards `max_epochs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from core.errors import ConfigError
from data.corpus import TRAIN, Corpus
from data.loader import Loader

MANY_EPOCHS = 4
"""Up to this many epochs, repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023, arXiv
2305.16264).
"""


@dataclass(frozen=True)
class PhaseSpec:
    """The settings of a phase on which its order of samples depends."""

    name: str
    seq_len: int
    global_batch_size: int
    steps: int
    samples: int
    """The largest number of sequences that the phase can take."""
    weights: Mapping[str, float]
    """Weights of the phase's sources; sources without a weight are dropped."""
    steps_key: str
    """The configuration key of `steps`."""


MOST_EPOCHS = 1000
"""A run that repeats a source more often has the wrong corpus: it would learn almost nothing new."""


def make_loaders(
    corpus: Corpus,
    phases: Sequence[PhaseSpec],
    seed: int,
    max_epochs: Mapping[str, float],
    report: Callable[[str], None],
) -> dict[str, Loader]:
    """Return a loader for each phase, by phase name. `report` gets a line for each source that exceeds `MANY_EPOCHS`.

    Raises `ConfigError` if all sources of a phase are used up before its end.
    """
    loaders: dict[str, Loader] = {}
    origins: dict[int, str] = {}
    taken: dict[int, Counter[str]] = {}  # sequences taken so far, by length and source
    epochs = dict.fromkeys(corpus.sources, 0.0)
    for phase in phases:
        seq_len = phase.seq_len
        own = taken.setdefault(seq_len, Counter())
        origin = origins.setdefault(seq_len, phase.name)
        limits = {
            name: _sequences_left(corpus, name, seq_len, limit, taken)
            for name, limit in max_epochs.items()
            if phase.weights.get(name)
        }
        loader = Loader(corpus, seq_len, phase.global_batch_size, seed, phase.name, phase.weights, origin, own, limits)
        if loader.blend.samples is not None and loader.blend.samples < phase.samples:
            raise _used_up(corpus, phase, loader.blend.samples, max_epochs)
        for name, count in loader.blend.counts(phase.samples).items():
            own[name] += count
            epochs[name] += count / corpus.stream(name, TRAIN).num_sequences(seq_len)
        loaders[phase.name] = loader
    for name, times in epochs.items():
        if times > MOST_EPOCHS:
            size = f"{len(corpus.stream(name, TRAIN)):,} tokens"
            reason = f"the run would repeat its {size} {times:,.0f} times: name a larger corpus, or train fewer steps"
            raise ConfigError(f"data.sources.{name}", None, reason)
        if times > MANY_EPOCHS:
            advice = f"more than {MANY_EPOCHS} teach little; lower its weight or set max_epochs"
            report(f"source {name} is repeated for {times:.1f} epochs: {advice}")
    return loaders


def _sequences_left(corpus: Corpus, name: str, seq_len: int, limit: float, taken: Mapping[int, Counter[str]]) -> int:
    """Count the sequences that a source has left: its limit in epochs, less the epochs that earlier phases took."""
    stream = corpus.stream(name, TRAIN)
    # exact, from the decimal notation: 0.29 of 100 sequences are 29, but floating point gives 28
    left = Fraction(str(limit))
    for length, sequences in taken.items():
        if sequences[name]:
            left -= Fraction(sequences[name], stream.num_sequences(length))
    return max(0, floor(left * stream.num_sequences(seq_len)))


def _used_up(corpus: Corpus, phase: PhaseSpec, samples: int, max_epochs: Mapping[str, float]) -> ConfigError:
    """Make the error for a phase with fewer samples than it needs. It suggests the number of steps that fit."""
    fitting = samples * phase.steps // phase.samples
    names = [name for name, weight in phase.weights.items() if weight]
    parts = [
        f"{name} (max_epochs={max_epochs[name]:g} of {len(corpus.stream(name, TRAIN)):,} tokens)" for name in names
    ]
    left, wanted = (count * phase.seq_len for count in (samples, phase.samples))
    reason = f"phase {phase.name} uses up all of {', '.join(parts)}: {left:,} tokens are left, but it needs {wanted:,}"
    advice = "raise max_epochs or add sources"
    return ConfigError(phase.steps_key, phase.steps, f"{reason}; {advice}", [fitting] if fitting else [])
