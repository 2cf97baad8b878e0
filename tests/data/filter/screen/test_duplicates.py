"""Find planted duplicates by their similarity, whatever the shards and the order of the records."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from core.errors import DataError
from data.filter import runs
from data.filter.config import DuplicateConfig
from data.filter.input.records import Reason
from data.filter.screen import duplicates
from data.filter.screen.duplicates import PLACES, SHINGLE, DuplicateSearch, Signatures, ngram_hashes, signatures
from data.filter.screen.normalise import canonical, words
from data.filter.store import OneWorker, Workers
from tests.data.filter.threads import on_threads

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


Found = list[tuple[Reason, int] | None]
"""For each record the reason why it is dropped and the record that is kept, or None."""


def find(shards: Sequence[Signatures], config: DuplicateConfig | None = None, folder: Path | None = None) -> Found:
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return find(shards, config, Path(name))
    return search(shards, config or DuplicateConfig(), folder, OneWorker())


def search(shards: Sequence[Signatures], config: DuplicateConfig, folder: Path, workers: Workers) -> Found:
    by_name = {f"{number}": shard for number, shard in enumerate(shards)}
    sizes = {name: len(shard.exact_N2) for name, shard in by_name.items()}
    done = DuplicateSearch(runs.DiskArrays(folder, sizes, workers), config, by_name.__getitem__)
    done.run()
    pairs = [pair for name in by_name for pair in zip(*done.copies(name, sizes[name]), strict=True)]
    reason = {True: Reason.duplicate, False: Reason.near_duplicate}
    return [None if of < 0 else (reason[bool(is_exact)], int(of)) for of, is_exact in pairs]


def reasons(texts: Sequence[str], config: DuplicateConfig | None = None) -> list[Reason | None]:
    return [copy and copy[0] for copy in find([signatures(texts)], config)]


def test_the_first_of_exact_copies_stays():
    texts = ["A  short\ttext", "something else", "a short text", "A SHORT TEXT\n"]
    assert reasons(texts) == [None, None, Reason.duplicate, Reason.duplicate]
    assert reasons(texts, DuplicateConfig(exact=False)) == [None] * 4


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
        assert [copy and copy[0] for copy in find(shards)] == whole


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
    found = find([Signatures(exact, near, np.ones(3, bool))])
    assert found == [None, (Reason.near_duplicate, 0), (Reason.near_duplicate, 0)]


def test_records_of_a_bucket_are_alike_from_the_threshold_on():
    """Record 1 agrees with record 0 in exactly as many positions as are needed, record 2 in one fewer."""
    near = np.tile(np.arange(PLACES, dtype=np.uint32), (3, 1))
    near[1, 100:] += 1000
    near[2, 99:] += 2000
    pairs = duplicates._connected(np.arange(3, dtype=np.uint64), near.__getitem__, 100)
    assert pairs.T.tolist() == [[0, 1]]


@pytest.mark.parametrize(("near", "needed"), [(0.75, 96), (0.8, 103), (0.3, 39)])
def test_the_threshold_itself_is_near_enough(near, needed):
    """The last positions differ, so that whole bands agree."""
    first = np.arange(PLACES, dtype=np.uint32) + 1
    for agree in (needed - 1, needed):
        other = np.where(np.arange(PLACES) < agree, first, first + 1000)
        shard = Signatures(np.arange(4, dtype=np.uint64).reshape(2, 2), np.stack([first, other]), np.ones(2, np.bool_))
        is_near = agree == needed
        assert find([shard], DuplicateConfig(near=near)) == [None, (Reason.near_duplicate, 0) if is_near else None]


def test_words_are_compared_in_runs_of_five():
    """Estimates are close to the similarity of sets of runs of five words, which differs from that of four or six."""
    one = document(1, 400)
    other = " ".join(word if place % 7 else "x" for place, word in enumerate(one.split()))
    near = signatures([one, other]).near_NP
    assert abs((near[0] == near[1]).mean() - similarity(one, other)) < 0.08
    assert signatures([one, f"{one} {one}"]).near_NP[0] == pytest.approx(signatures([one]).near_NP[0])


def test_pictures_in_another_order_are_another_document():
    texts, digests = ["one text for all of them"] * 4, [["a", "b"], ["b", "a"], ["a", "b"], []]
    found = signatures(texts, digests)
    keys = [tuple(row) for row in found.exact_N2.tolist()]
    assert keys[0] == keys[2] and len(set(keys)) == 3
    assert found.near_NP.any(1).tolist() == [False, False, False, True], "captions may be equal"


def test_bands_miss_one_percent_at_most_at_the_threshold():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        count, width = duplicates.bands(threshold)
        assert count * width <= PLACES
        assert (1 - threshold**width) ** count <= 0.01


def test_signatures_are_the_same_everywhere():
    """Signatures are stored on disk, so a change of their values would invalidate the stored ones."""
    found = signatures(["The quick brown fox jumps over the lazy dog.", ""])
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


# -- on disk


def planted(seed: int, count: int = 80) -> list[Signatures]:
    """Return shards of uneven sizes whose records repeat earlier ones exactly, nearly or in chains, or were dropped."""
    chance = np.random.default_rng(seed)
    near = chance.integers(1, 1 << 32, (count, PLACES), np.uint32)
    exact = chance.integers(0, 1 << 63, (count, 2), np.uint64)
    for row in range(1, count):
        earlier, kind = chance.integers(0, row), chance.random()
        if kind < 0.6:
            near[row] = np.where(chance.random(PLACES) < chance.choice([0.05, 0.15, 0.3]), near[row], near[earlier])
        if kind < 0.1:
            exact[row], near[row] = exact[earlier], near[earlier]
        if 0.6 < kind < 0.7:
            exact[row, 0] = exact[earlier, 0]  # half of a hash is not enough
    possible, passed = chance.random((2, count)) < 0.9
    near[~possible] = 0
    cuts = np.sort(chance.integers(0, count, 12))
    return [Signatures(*one) for one in zip(*(np.split(a, cuts) for a in (exact, near, passed)), strict=True)]


def oracle(shards: Sequence[Signatures], config: DuplicateConfig) -> Found:
    """Compare all pairs, in memory."""
    exact, near, passed = (
        np.concatenate([getattr(shard, name) for shard in shards]) for name in ("exact_N2", "near_NP", "passed_N")
    )
    count, group = len(exact), list(range(len(exact)))
    same = (exact[:, None] == exact[None]).all(2) & passed[:, None] & passed & config.exact
    is_exact = [bool(same[row, :row].any()) for row in range(count)]
    compared = near.any(1) & passed & ~np.array(is_exact)
    agree = (near[:, None] == near[None]) & (compared[:, None] & compared)[..., None]
    number, width = duplicates.bands(config.near or 0.8)
    in_a_band = agree[..., : number * width].reshape(count, count, number, width).all(3).any(2)
    alike = in_a_band & (agree.sum(2) >= np.ceil((config.near or 0.8) * PLACES)) & (config.near is not None)
    for one, other in sorted(zip(*np.nonzero(same | alike), strict=True)) * 2:
        low, high = sorted((group[one], group[other]))
        group = [low if place == high else place for place in group]
    reason = {True: Reason.duplicate, False: Reason.near_duplicate}
    return [None if of == row else (reason[is_exact[row]], of) for row, of in enumerate(group)]


@pytest.fixture
def small_arrays(monkeypatch) -> None:
    """Make several blocks and many ranges of few records, and read a bucket in pieces."""
    monkeypatch.setattr(runs, "BLOCK_RECORDS", 30)
    monkeypatch.setattr(runs, "RANGE_ENTRIES", 400)
    for name in ("_FETCHED", "_TOGETHER", "_JOINED"):
        monkeypatch.setattr(duplicates, name, 3)


@pytest.mark.parametrize(
    "config", [DuplicateConfig(), DuplicateConfig(exact=False, near=0.6), DuplicateConfig(near=None)]
)
def test_search_finds_what_comparing_all_pairs_finds(tmp_path, small_arrays, config):
    for seed in range(2):
        shards = planted(seed)
        wanted = oracle(shards, config)
        assert find(shards, config) == wanted
        assert len({one[0] for one in wanted if one}) == config.exact + (config.near is not None)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_share_the_search(tmp_path, small_arrays, count):
    shards = planted(7)
    alone = find(shards, folder=tmp_path / "1")
    found = on_threads(count, lambda worker: search(shards, DuplicateConfig(), tmp_path / f"{count}", worker))
    assert found == [alone] * count and alone == oracle(shards, DuplicateConfig())
    files = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("1", f"{count}")]
    assert files[0] == files[1] and len(files[0]) > 15


def test_each_file_of_a_search_matters(tmp_path, small_arrays):
    """One that is missing is made again. Control: with one that is empty, the result is another."""
    shards = planted(7)
    wanted = find(shards, folder=tmp_path / "out")
    for path in sorted((tmp_path / "out").iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert find(shards, folder=tmp_path / "out") == wanted and path.read_bytes() == content
    for path in [tmp_path / "out" / "groups-00000.npy", tmp_path / "out" / "exact_repeats-00000.npy"]:
        np.save(path, np.load(path)[:, :0])
        assert find(shards, folder=tmp_path / "out") != wanted


def test_a_damaged_file_of_a_search_is_refused(tmp_path, small_arrays):
    shards = planted(1)
    find(shards, folder=tmp_path)
    path = tmp_path / "bands-00001.npy"
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "pairs-00000.npy").unlink()
    with pytest.raises(DataError, match=r"bands-00001\.npy cannot be read .*: remove it and run again"):
        find(shards, folder=tmp_path)
