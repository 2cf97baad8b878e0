"""Phases share one data order: epochs and limits of sources continue from phase to phase."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from core.errors import ConfigError
from data.corpus import TRAIN, Corpus
from data.curriculum import PhaseSpec, make_loaders
from data.loader import Loader
from tests.data.conftest import silent, write_texts

SEQ_LEN, BATCH = 32, 8
Given = dict[str, list[tuple[int, ...]]]


def phase(name: str, steps: int, weights: dict[str, float], seq_len: int = SEQ_LEN) -> PhaseSpec:
    return PhaseSpec(name, seq_len, BATCH, steps, steps * BATCH, weights, f"{name}.steps")


def taken_by(corpus: Corpus, loader: Loader, steps: int) -> Given:
    """Return the sequences that a loader takes from each source."""
    found: Given = {name: [] for name in corpus.sources}
    for step in range(steps):
        batch = loader.batch(step)
        for tokens, source in zip(batch.tokens_BT.tolist(), batch.sources_B.tolist(), strict=True):
            found[corpus.sources[source]].append(tuple(tokens))
    return found


def all_sequences(corpus: Corpus, source: str) -> Counter[tuple[int, ...]]:
    stream = corpus.stream(source, TRAIN)
    return Counter(tuple(stream.window(n * SEQ_LEN, SEQ_LEN).tolist()) for n in range(count(corpus, source)))


def run(corpus: Corpus, phases: list[PhaseSpec], limits: dict[str, float] | None = None) -> list[Given]:
    loaders = make_loaders(corpus, phases, 1, limits or {}, silent)
    return [taken_by(corpus, loaders[one.name], one.steps) for one in phases]


def count(corpus: Corpus, source: str) -> int:
    return corpus.stream(source, TRAIN).num_sequences(SEQ_LEN)


def test_a_later_phase_continues_the_epochs_of_a_source(corpus):
    """Epochs end within phases. In between are a phase without the source and one with longer sequences."""
    whole, own = count(corpus, "short"), {"short": 1.0}
    steps = 3 * whole // (2 * BATCH) // 2
    between = [phase("other", 3, {"long": 1.0}), phase("long", 2, own, 64)]
    first, other, longer, last = run(corpus, [phase("main", steps, own), *between, phase("end", 4 * steps, own)])
    given = first["short"] + last["short"]
    for epoch in range(len(given) // whole):
        assert Counter(given[epoch * whole : (epoch + 1) * whole]) == all_sequences(corpus, "short")
    assert not other["short"] and not first["long"] and len(longer["short"][0]) == 64
    alone = [taken_by(corpus, Loader(corpus, SEQ_LEN, BATCH, 1, name, own), steps)["short"] for name in ("a", "b")]
    assert Counter((alone[0] + alone[1])[:whole]) != all_sequences(corpus, "short"), "control: phases by themselves"


def test_the_first_phase_is_the_plain_loader(corpus):
    """The order of the first phase depends neither on later phases nor on limits that are not reached."""
    weights = {"long": 3.0, "short": 1.0}
    wanted = taken_by(corpus, Loader(corpus, SEQ_LEN, BATCH, 1, "main", weights), 40)
    first = phase("main", 40, weights)
    assert run(corpus, [first])[0] == run(corpus, [first], {"short": 1000.0})[0] == wanted
    assert run(corpus, [first, phase("end", 9, {"short": 1.0}), phase("long", 3, weights, 64)])[0] == wanted


def test_a_limit_is_kept_through_phases(corpus):
    weights = {"long": 1.0, "short": 1.0}
    phases = [phase("main", 60, weights), phase("end", 300, weights)]
    first, last = run(corpus, phases, {"short": 1.5})
    whole = count(corpus, "short")
    assert len(first["short"] + last["short"]) == int(1.5 * whole)
    assert set(Counter(first["short"] + last["short"]).values()) == {1, 2}
    assert not run(corpus, [*phases, phase("more", 5, weights)], {"short": 1.5})[2]["short"]
    assert len([one for part in run(corpus, phases) for one in part["short"]]) > 1.5 * whole, "control"


def test_a_limit_counts_sequences_of_any_length(corpus):
    """After half an epoch in short sequences, half an epoch is left for long sequences."""
    whole = count(corpus, "short")
    steps = whole // 2 // BATCH
    phases = [phase("main", steps, {"short": 1.0}), phase("end", 60, {"short": 1.0, "long": 1.0}, 64)]
    _, last = run(corpus, phases, {"short": 1.0})
    assert 64 * len(last["short"]) == pytest.approx((whole - steps * BATCH) * SEQ_LEN, abs=64)


def test_a_run_that_outlasts_its_sources_is_refused(corpus):
    weights = {"long": 1.0, "short": 1.0}
    limits = {"long": 0.5, "short": 2.0}
    there = sum(int(limits[name] * count(corpus, name)) for name in weights)
    with pytest.raises(ConfigError) as caught:
        run(corpus, [phase("main", 5, weights), phase("end", 10_000, weights)], limits)
    fitting = (there - 5 * BATCH) // BATCH
    text = str(caught.value)
    assert text.startswith("end.steps=10000: phase end uses up all of long (max_epochs=0.5 of")
    assert f"{(there - 5 * BATCH) * SEQ_LEN:,} tokens are left" in text and text.endswith(f"; try {fitting}")
    run(corpus, [phase("main", 5, weights), phase("end", fitting, weights)], limits)
    with pytest.raises(ConfigError):
        run(corpus, [phase("main", 5, weights), phase("end", fitting + 1, weights)], limits)


def test_many_epochs_are_reported(corpus):
    said: list[str] = []
    whole = count(corpus, "short")
    for times in (3.9, 4.3):
        make_loaders(corpus, [phase("main", int(times * whole / BATCH), {"short": 1.0})], 1, {}, said.append)
    assert len(said) == 1 and re.match(r"source short is repeated for 4\.[23] epochs: ", said[0])


def test_shares_are_of_tokens_without_padding(make_corpus, tmp_path):
    """In one source a third of the tokens is padding, in the other hardly any."""
    texts = (("wasteful", 300, 10), ("dense", 30, 900))
    sources = {name: {"path": str(write_texts(tmp_path / name, *size, seed=size[1]))} for name, *size in texts}
    for settings, padded in (({"align": 64}, True), ({}, False)):
        corpus = make_corpus(sources, **settings)
        loader = Loader(corpus, 64, 2048, seed=1, weights={"wasteful": 1.0, "dense": 3.0})
        batch = loader.batch(0)
        eos = corpus.tokenizer.eos_id
        padding = (batch.tokens_BT[:, 1:] == eos) & (batch.tokens_BT[:, :-1] == eos)
        used = [64 * int(own.sum()) - int(padding[own].sum()) for own in (batch.sources_B == 0, batch.sources_B == 1)]
        assert used[0] / sum(used) == pytest.approx(0.25, abs=0.01)
        share = float((batch.sources_B == 0).double().mean())
        assert share > 0.28 if padded else share == 0.25, "without padding the shares are exact"


def test_a_share_too_small_for_any_blend_is_refused(corpus):
    with pytest.raises(ConfigError, match=r"data.sources.short.weight=1e-09: is less than one sequence in 1,048,576"):
        Loader(corpus, SEQ_LEN, BATCH, 1, weights={"long": 1.0, "short": 1e-9})
