"""Find planted duplicates by their similarity, whatever the shards and the order of the records."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from data.filter.config import DuplicateConfig
from data.filter.input.records import Reason
from data.filter.screen import duplicates
from data.filter.screen.duplicates import PLACES, SHINGLE, find_duplicates, ngram_hashes, signatures
from data.filter.screen.normalise import canonical, words

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


def document(seed: int, length: int = 200) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=length))


def changed(text: str, share: float, seed: int = 0) -> str:
    """Replace the last words, a fraction `share` of all, so that the similarity follows from `share`."""
    found = text.split()
    count = round(share * len(found))
    return " ".join([*found[: len(found) - count], *document(seed + 10**6, max(1, count)).split()[:count]])


def similarity(one: str, other: str) -> float:
    a, b = (
        {tuple(found[i : i + SHINGLE]) for i in range(len(found) - SHINGLE + 1)} for found in (words(one), words(other))
    )
    return len(a & b) / len(a | b)


def reasons(texts: Sequence[str], config: DuplicateConfig | None = None) -> list[Reason | None]:
    return [copy and copy.reason for copy in find_duplicates([signatures(texts)], config or DuplicateConfig())[0]]


def test_the_first_of_exact_copies_stays():
    texts = ["A  short\ttext", "something else", "a short text", "A SHORT TEXT\n"]
    assert reasons(texts) == [None, None, Reason.duplicate, Reason.duplicate]
    assert reasons(texts, DuplicateConfig(exact=False)) == [None] * 4
    assert find_duplicates([], DuplicateConfig()) == []
    assert find_duplicates([signatures([])], DuplicateConfig()) == [[]]


def test_signs_distinguish_prompts():
    assert reasons(["What is 2 + 3?", "What is 2 - 3?", "What is 2² ?", "What is 22 ?"]) == [None] * 4


def assert_found(share: float, at_least: float, at_most: float, config: DuplicateConfig | None = None) -> None:
    originals = [document(seed) for seed in range(100)]
    copies = [changed(text, share, seed) for seed, text in enumerate(originals)]
    found = reasons([*originals, *copies], config)
    assert found[:100] == [None] * 100
    assert at_least <= sum(reason is Reason.near_duplicate for reason in found[100:]) / 100 <= at_most


@pytest.mark.parametrize(
    ("share", "at_least", "at_most"), [(0.02, 1, 1), (0.05, 0.95, 1), (0.2, 0, 0.02), (0.5, 0, 0), (1, 0, 0)]
)
def test_near_copies_are_found_by_their_similarity(share, at_least, at_most):
    """With 2%, 5%, 20% and 50% of the words changed, the similarity is 0.95, 0.9, 0.66 and 0.33."""
    assert_found(share, at_least, at_most)


def test_check_notices_a_search_that_is_off_or_unverified(monkeypatch):
    with pytest.raises(AssertionError):
        assert_found(0.02, 1, 1, DuplicateConfig(near=None))
    monkeypatch.setattr(duplicates.np, "ceil", lambda _: 0)
    with pytest.raises(AssertionError):
        assert_found(0.2, 0, 0.02)


def test_estimate_is_unbiased():
    """The mean error is within four standard errors of zero, and the variance at most twice the binomial's."""
    errors, variance = [], 0.0
    for seed in range(60):
        one = document(seed)
        other = changed(one, 0.3, seed)
        true = similarity(one, other)
        near = signatures([one, other]).near_NP
        errors.append(float((near[0] == near[1]).mean()) - true)
        variance += true * (1 - true) / PLACES
    assert abs(sum(errors)) < 4 * variance**0.5
    assert sum(error**2 for error in errors) < 2 * variance


def test_a_few_words_have_exact_copies_only():
    assert reasons(["one two three four", "one two three four!"]) == [None, None]
    assert reasons(["one two three four five", "one two three four five!"])[1] is Reason.near_duplicate


def test_result_does_not_depend_on_shards():
    texts = [document(seed % 30, 40 + seed % 7) for seed in range(120)] + ["", "x", "", document(3)]
    whole = reasons(texts)
    assert {Reason.duplicate, Reason.near_duplicate, None} == set(whole)
    for size in (1, 7, 50):
        shards = [signatures(texts[start : start + size]) for start in range(0, len(texts), size)]
        found = [copy for shard in find_duplicates(shards, DuplicateConfig()) for copy in shard]
        assert [copy and copy.reason for copy in found] == whole


def test_groups_do_not_depend_on_order():
    """A chain of near duplicates with unlike ends is one group. In any order, only its first record is kept."""
    chain = [document(0)]
    for step in range(5):
        chain.append(" ".join([*chain[-1].split()[12:], *document(100 + step, 12).split()]))
    assert similarity(chain[0], chain[-1]) < 0.6
    for seed in range(10):
        shuffled = random.Random(seed).sample(chain, len(chain))
        assert reasons(shuffled) == [None] + [Reason.near_duplicate] * 5


def test_a_bucket_leads_on_from_what_it_has_reached():
    """Records 0 and 2 are unlike, and 0 is in every band that 1 and 2 share. The search must still compare 1 and 2."""
    count, width = duplicates.bands(0.8)
    half = width // 2
    near = np.tile(np.arange(PLACES, dtype=np.uint32), (3, 1))
    for start in range(0, 24 // half * width, width):
        near[0, start : start + half] += 1000
        near[2, start + half : start + 2 * half] += 2000
    alike = [int((near[a] == near[b]).sum()) / PLACES for a, b in ((0, 1), (1, 2), (0, 2))]
    assert min(alike[:2]) >= 0.8 > alike[2] and 24 // half < count
    exact = np.arange(6, dtype=np.uint64).reshape(3, 2)
    (found,) = find_duplicates([duplicates.Signatures(exact, near, np.ones(3, bool))], DuplicateConfig())
    assert found == [None, duplicates.Copy(Reason.near_duplicate, 0), duplicates.Copy(Reason.near_duplicate, 0)]


def test_bands_miss_one_percent_at_most_at_the_threshold():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        count, width = duplicates.bands(threshold)
        assert count * width <= PLACES
        assert (1 - threshold**width) ** count <= 0.01


def test_signatures_are_the_same_everywhere():
    """Signatures are stored on disk, so a change of their values would invalidate the stored ones."""
    found = signatures(["The quick brown fox jumps over the lazy dog.", ""])
    assert found.near_possible_N.tolist() == [True, False]
    assert found.near_NP[1].tolist() == [0] * PLACES
    assert int(found.exact_N2[0, 0]) == 0xDE074E6569D22F4B
    assert int(found.near_NP[0].astype(np.uint64).sum()) == 100725610202


def test_words_of_scripts_without_spaces_are_characters():
    assert words("你好, WORLD_x") == ["你", "好", "world", "x"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert canonical("\uff21 e\u0301  É") == "\uff41 é é"


def test_runs_are_hashed_in_order():
    one, other = ngram_hashes(["a", "b", "c", "d"], 3), ngram_hashes(["b", "a", "c", "d"], 3)
    assert len(one) == 2 and not set(one.tolist()) & set(other.tolist())
    assert ngram_hashes(["x", "a", "b", "c"], 3)[1] == one[0]
