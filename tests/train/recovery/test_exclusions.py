"""Exclusions are part of the order of data: exact from their step on, without effect before it and on other sequences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError
from data.corpus import Corpus, prepare
from data.loader import Loader
from data.sampling import Exclusion
from tests.data.conftest import make_config, write_texts

SEQ_LEN, BATCH, FROM = 32, 8, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("excluded")
    sources = {name: {"kind": "files", "path": str(write_texts(root / name, 8, 60, i))} for i, name in enumerate("ab")}
    return prepare(make_config(root / "cache", sources), lambda line: None)


def order(loader: Loader, steps: int) -> list[tuple[int, int]]:
    """Return the source and the sequence of each sample of the first steps."""
    ordinals = np.arange(steps * BATCH)
    return list(zip(*(found.tolist() for found in loader.locate(ordinals, ordinals // BATCH)), strict=True))


def loader_of(corpus: Corpus, *exclusions: Exclusion, start: int = 0) -> Loader:
    loader = Loader(corpus, SEQ_LEN, BATCH, seed=1)
    loader.exclude(exclusions, start)
    return loader


def spanning(first: int, last: int, step: int = FROM) -> Exclusion:
    """Exclude a document from the middle of sequence `first` to the middle of sequence `last` of source a."""
    return Exclusion("a", first * SEQ_LEN + 9, last * SEQ_LEN + 9, step)


def test_only_excluded_sequences_change_and_only_from_the_step(corpus):
    usual, loader = order(loader_of(corpus), 60), loader_of(corpus, spanning(3, 4))
    changed = order(loader, 60)
    gone = {(0, 3), (0, 4)}
    assert changed[: FROM * BATCH] == usual[: FROM * BATCH]
    assert gone & set(usual[FROM * BATCH :]), "control: without the exclusion they come"
    assert not gone & set(changed[FROM * BATCH :])
    pairs = list(zip(usual[FROM * BATCH :], changed[FROM * BATCH :], strict=True))
    assert all((before == after) != (before in gone) for before, after in pairs)
    assert all(before[0] == after[0] for before, after in pairs), "the blend of sources stays"
    step = next(step for step in range(FROM, 60) if gone & set(usual[step * BATCH : (step + 1) * BATCH]))
    plain = loader_of(corpus).batch(step)
    assert not np.array_equal(loader.batch(step).tokens_BT, plain.tokens_BT), "control: batches follow the order"
    assert np.array_equal(loader.samples(range(step * BATCH, (step + 1) * BATCH)).tokens_BT, plain.tokens_BT)


def test_ranks_and_later_phases_see_the_same_exclusions(corpus):
    loader, later = loader_of(corpus, spanning(3, 4)), loader_of(corpus, spanning(3, 4, FROM + 100), start=100)
    for step in range(0, 40, 3):
        whole = loader.batch(step).tokens_BT
        parts = [loader.batch(step, start, start + 2).tokens_BT for start in range(0, BATCH, 2)]
        assert np.array_equal(whole, np.concatenate(parts)) and np.array_equal(whole, later.batch(step).tokens_BT)
    assert order(loader, 40) != order(loader_of(corpus, spanning(3, 4), start=100), 40), "control: another start"


def test_a_later_exclusion_keeps_the_replacements_before_it(corpus):
    first, second = spanning(3, 4), replace(spanning(0, 40, 30), source="b")
    one, both = order(loader_of(corpus, first), 60), order(loader_of(corpus, first, second), 60)
    assert one[: 30 * BATCH] == both[: 30 * BATCH] and one != both


def test_many_exclusions_leave_the_rest(corpus):
    count = loader_of(corpus)._streams[0].num_sequences(SEQ_LEN)
    left = set(order(loader_of(corpus, spanning(0, count - 3, 0)), 60))
    assert {sequence for source, sequence in left if source == 0} == {count - 2, count - 1}


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ([Exclusion("a", 0, 10**6, 0)], "it is of another run"),
        ([Exclusion("c", 0, 9, 0)], "no such source"),
        ([Exclusion("a", 0, 0, 0)], "it is of another run"),
    ],
)
def test_exclusions_of_another_corpus_are_rejected(corpus, wrong, reason):
    with pytest.raises(ConfigError, match=reason):
        loader_of(corpus, *wrong)


def test_exclusions_that_empty_a_source_are_rejected(corpus):
    count = loader_of(corpus)._streams[0].num_sequences(SEQ_LEN)
    pieces = [spanning(a, b) for a, b in itertools.pairwise(range(0, count - 1, 4))]
    loader_of(corpus, *pieces)
    with pytest.raises(ConfigError, match="leaves no sequence of source a"):
        loader_of(corpus, *pieces, spanning(pieces[-1].sequences(SEQ_LEN)[1], count - 1))
