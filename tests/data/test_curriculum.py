"""Phases as one order: rows are not taken twice, epochs are counted through, limits end sources and runs in time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from data.corpus import TRAIN, Corpus
from data.curriculum import PhaseSpec, make_loaders
from data.loader import Loader
from tests.data.conftest import silent, write_texts

CONTEXT, BATCH = 32, 8
Given = dict[str, list[tuple[int, ...]]]


def phase(name: str, steps: int, weights: dict[str, float], context: int = CONTEXT) -> PhaseSpec:
    return PhaseSpec(name, context, BATCH, steps, steps * BATCH, weights, f"{name}.steps")


def rows_of(corpus: Corpus, loader: Loader, steps: int) -> Given:
    """The rows that each source gives in a phase."""
    found: Given = {name: [] for name in corpus.sources}
    for step in range(steps):
        batch = loader.batch(step)
        for tokens, source in zip(batch.tokens_BT.tolist(), batch.sources_B.tolist(), strict=True):
            found[corpus.sources[source]].append(tuple(tokens))
    return found


def all_rows(corpus: Corpus, source: str) -> Counter[tuple[int, ...]]:
    stream = corpus.stream(source, TRAIN)
    return Counter(tuple(stream.window(r * CONTEXT, CONTEXT).tolist()) for r in range(stream.num_sequences(CONTEXT)))


def run(corpus: Corpus, phases: list[PhaseSpec], limits: dict[str, float] | None = None) -> list[Given]:
    loaders = make_loaders(corpus, phases, 1, limits or {}, silent)
    return [rows_of(corpus, loaders[one.name], one.steps) for one in phases]


def epoch_steps(corpus: Corpus, source: str) -> int:
    return corpus.stream(source, TRAIN).num_sequences(CONTEXT) // BATCH


def test_a_later_phase_goes_on_where_a_source_stood(corpus: Corpus) -> None:
    """Two phases of one source make up its first epoch; with a phase between that leaves it out."""
    steps = epoch_steps(corpus, "short") // 2
    phases = [phase("main", steps, {"short": 1.0}), phase("other", 3, {"long": 1.0}), phase("end", steps, {"short": 1})]
    first, between, last = run(corpus, phases)
    seen = Counter(first["short"] + last["short"])
    assert max(seen.values()) == 1 and seen <= all_rows(corpus, "short") and len(first["short"]) == steps * BATCH
    assert not between["short"] and not first["long"]


def test_a_phase_by_itself_repeats_rows(corpus: Corpus) -> None:
    """What happens where phases know nothing of each other."""
    steps = epoch_steps(corpus, "short") // 2
    first, last = (
        rows_of(corpus, Loader(corpus, CONTEXT, BATCH, 1, name, {"short": 1.0}), steps) for name in ("main", "end")
    )
    assert max(Counter(first["short"] + last["short"]).values()) == 2


def test_epochs_end_in_the_middle_of_a_phase(corpus: Corpus) -> None:
    rows = corpus.stream("short", TRAIN).num_sequences(CONTEXT)
    steps = 3 * rows // (2 * BATCH) // 2
    found = run(corpus, [phase("main", steps, {"short": 1.0}), phase("end", 4 * steps, {"short": 1.0})])
    given = found[0]["short"] + found[1]["short"]
    for epoch in range(len(given) // rows):
        assert Counter(given[epoch * rows : (epoch + 1) * rows]) == all_rows(corpus, "short")


def test_a_single_phase_is_the_plain_loader(corpus: Corpus) -> None:
    weights = {"long": 3.0, "short": 1.0}
    (found,) = run(corpus, [phase("main", 40, weights)])
    assert found == rows_of(corpus, Loader(corpus, CONTEXT, BATCH, 1, "main", weights), 40)
    (capped,) = run(corpus, [phase("main", 40, weights)], {"short": 1000.0})
    assert capped == found


def test_a_phase_does_not_depend_on_those_after_it(corpus: Corpus) -> None:
    weights = {"long": 3.0, "short": 1.0}
    first = phase("main", 5, weights)
    (alone,) = run(corpus, [first])
    assert run(corpus, [first, phase("end", 9, {"short": 1.0}), phase("long", 3, weights, 64)])[0] == alone


def test_rows_of_another_length_have_an_order_of_their_own_and_going_back_goes_on(corpus: Corpus) -> None:
    steps = epoch_steps(corpus, "short") // 2
    phases = [phase("a", steps, {"short": 1}), phase("b", 2, {"short": 1}, 64), phase("c", steps, {"short": 1})]
    first, middle, last = run(corpus, phases)
    assert max(Counter(first["short"] + last["short"]).values()) == 1 and len(middle["short"][0]) == 64


def test_a_limit_is_kept_through_phases(corpus: Corpus) -> None:
    weights = {"long": 1.0, "short": 1.0}
    phases = [phase("main", 60, weights), phase("end", 300, weights)]
    first, last = run(corpus, phases, {"short": 1.5})
    rows = corpus.stream("short", TRAIN).num_sequences(CONTEXT)
    assert len(first["short"] + last["short"]) == int(1.5 * rows)
    assert set(Counter(first["short"] + last["short"]).values()) == {1, 2}
    assert not run(corpus, [*phases, phase("more", 5, weights)], {"short": 1.5})[2]["short"]
    assert len([row for part in run(corpus, phases) for row in part["short"]]) > 1.5 * rows, "control"


def test_a_limit_counts_rows_of_any_length(corpus: Corpus) -> None:
    """Half an epoch in short rows leaves half of one in long ones."""
    rows = corpus.stream("short", TRAIN).num_sequences(CONTEXT)
    steps = rows // 2 // BATCH
    phases = [phase("main", steps, {"short": 1.0}), phase("end", 60, {"short": 1.0, "long": 1.0}, 64)]
    _, last = run(corpus, phases, {"short": 1.0})
    assert 64 * len(last["short"]) == pytest.approx((rows - steps * BATCH) * CONTEXT, abs=64)


def test_a_run_that_outlasts_its_sources_is_refused_with_what_fits(corpus: Corpus) -> None:
    weights = {"long": 1.0, "short": 1.0}
    limits = {"long": 0.5, "short": 2.0}
    there = sum(int(limits[name] * corpus.stream(name, TRAIN).num_sequences(CONTEXT)) for name in weights)
    with pytest.raises(ConfigError) as caught:
        run(corpus, [phase("main", 5, weights), phase("end", 10_000, weights)], limits)
    fitting = (there - 5 * BATCH) // BATCH
    text = str(caught.value)
    assert text.startswith("end.steps=10000: phase end uses up all of long (max_epochs=0.5 of")
    assert f"{(there - 5 * BATCH) * CONTEXT:,} tokens are left" in text and text.endswith(f"; try {fitting}")
    run(corpus, [phase("main", 5, weights), phase("end", fitting, weights)], limits)
    with pytest.raises(ConfigError):
        run(corpus, [phase("main", 5, weights), phase("end", fitting + 1, weights)], limits)


def test_many_epochs_are_told(corpus: Corpus) -> None:
    said: list[str] = []
    rows = corpus.stream("short", TRAIN).num_sequences(CONTEXT)
    for times in (3.9, 4.3):
        make_loaders(corpus, [phase("main", int(times * rows / BATCH), {"short": 1.0})], 1, {}, said.append)
    assert len(said) == 1 and re.match(r"source short is gone through 4\.[23] times: ", said[0])


def test_shares_are_of_tokens_that_are_not_padding(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    """Documents of one source leave a third of its rows empty, those of the other hardly anything."""
    sources: dict[str, Any] = {
        "wasteful": {"path": str(write_texts(tmp_path / "a", 300, words=10, seed=1))},
        "dense": {"path": str(write_texts(tmp_path / "b", 30, words=900, seed=2))},
    }
    for settings, padded in (({"align": 64}, True), ({}, False)):
        corpus = make_corpus(sources, **settings)
        loader = Loader(corpus, 64, 2048, seed=1, weights={"wasteful": 1.0, "dense": 3.0})
        batch = loader.batch(0)
        eos = corpus.tokenizer.eos_id
        padding = (batch.tokens_BT[:, 1:] == eos) & (batch.tokens_BT[:, :-1] == eos)
        used = [64 * int(own.sum()) - int(padding[own].sum()) for own in (batch.sources_B == 0, batch.sources_B == 1)]
        assert used[0] / sum(used) == pytest.approx(0.25, abs=0.01)
        rows = float((batch.sources_B == 0).double().mean())
        assert rows > 0.28 if padded else rows == 0.25, "without padding the shares are exact"


def test_a_share_too_small_for_any_blend_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"data.sources.short.weight=1e-09: is less than one row in 1,048,576"):
        Loader(corpus, CONTEXT, BATCH, 1, weights={"long": 1.0, "short": 1e-9})
