"""The keyed permutation and the blend: exact properties that a resumed run relies on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from data import sampling
from data.sampling import Blend, key_of, permute


def is_bijection(places: np.ndarray) -> bool:
    return np.array_equal(np.sort(places), np.arange(len(places)))


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 100, 1000, 4097])
def test_permutation_is_a_bijection(size):
    for key in (0, 1, key_of("a"), 2**64 - 1):
        assert is_bijection(permute(np.arange(size), size, key))


def test_bijection_check_sees_collisions(monkeypatch):
    """Control: reducing the Feistel network's values modulo the size, instead of cycle walking, makes them collide."""
    usual = sampling._feistel
    monkeypatch.setattr(sampling, "_feistel", lambda value, half, key: usual(value, half, key) % np.uint64(100))
    assert not is_bijection(permute(np.arange(100), 100, 1))


def test_permutation_has_random_access_at_any_size():
    whole = permute(np.arange(10_000), 10_000, 7)
    some = np.array([9_999, 0, 1234, 1234])
    assert np.array_equal(permute(some, 10_000, 7), whole[some])
    size = 3 * 10**12  # more than a table could hold
    places = permute(np.arange(10_000) * 250_000_000, size, 1)
    assert len(np.unique(places)) == 10_000 and places.max() < size and places.min() >= 0


def test_keys_give_unrelated_orders():
    first, second = permute(np.arange(4096), 4096, 1), permute(np.arange(4096), 4096, 2)
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, np.arange(4096))[0, 1]) < 0.05 and abs(np.corrcoef(first, second)[0, 1]) < 0.05
    # chi-square, over 64 cells, of where index 0 lands for 6,400 keys; a bias would give far more than 130
    cells = np.bincount([int(permute(np.zeros(1, np.int64), 64, key_of(key))[0]) for key in range(6400)], minlength=64)
    assert ((cells - 100) ** 2 / 100).sum() < 130
    assert len({key_of(1, 2), key_of(2, 1), key_of(12), key_of("1", ""), key_of(1)}) == 5


@pytest.mark.parametrize("index", [-1, 10])
def test_permutation_rejects_indices_outside(index):
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        permute(np.array([index]), 10, 1)


def locate(blend: Blend, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each sample in [start, stop), and its index among the samples of that source."""
    found = [np.empty((2, 0), np.int64)]
    while start < stop:
        here = blend.range_around(start)
        inside = slice(start - here.begin, stop - here.begin)
        found.append(np.stack([here.sources[inside], here.within[inside]]))
        start += found[-1].shape[1]
    source, within = np.concatenate(found, axis=1)
    return source, within


def counts_of(blend: Blend, samples: int) -> np.ndarray:
    return np.bincount(locate(blend, 0, samples)[0], minlength=len(blend.names))


def assert_in_order(blend: Blend, samples: int) -> None:
    """Assert that each source gives its samples in order, without a gap."""
    source, within = locate(blend, 0, samples)
    for index in range(len(blend.names)):
        given = within[source == index]
        assert np.array_equal(given, np.arange(len(given)))


FOUR = {"a": 0.4, "b": 0.25, "c": 0.2, "d": 0.15}


@pytest.mark.parametrize("weights", [{"a": 1.0}, FOUR, {"a": 1.0, "b": 1e-6}])
def test_blend_gives_each_source_its_share(weights):
    blend, total = Blend(weights, 3), sum(weights.values())
    for blocks in (1, 2, 9):
        samples = blocks * blend.segments[0].shares.block
        wanted = np.array([samples * weight / total for weight in weights.values()])
        found = counts_of(blend, samples)
        assert found.sum() == samples and np.abs(found - wanted).max() <= 1
    assert abs(counts_of(Blend({"a": 0.41, "b": 0.59}, 3), 1024)[0] - 0.4 * 1024) > 1, "control: other weights"


def digest(blend: Blend) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in locate(blend, 0, 5000))).hexdigest()


def test_orders_of_blends_never_change():
    """The digests date from before blends had limits. Runs that began then must resume with the same sequences."""
    assert digest(Blend(FOUR, 3)) == "a797573a5d53fd79a58e67d0fedd2d8f3354636de72b86e50a53f070b3f692b8"
    assert digest(Blend({"a": 1.0, "b": 1e-6}, 3)) == "0937cd00e2e32172b6356b11549c85e3f7fe58ba0740560ebc765f8597c6c216"
    assert digest(Blend({"a": 0.4, "b": 0.25, "x": 0.0, "c": 0.2, "d": 0.15}, 3)) == digest(Blend(FOUR, 3))
    assert digest(Blend({"a": 1.0}, 3)) != digest(Blend(FOUR, 3)) != digest(Blend(FOUR, 4)), "control"
    assert digest(Blend(FOUR, 3, {"a": 10**6})) == digest(Blend(FOUR, 3)), "a limit that is not reached"


@pytest.mark.parametrize("share", [3e-4, 1e-5, 1e-3])
def test_a_small_share_loses_no_sample(share):
    assert_in_order(Blend({"a": 0.3, "b": share, "c": 0.7 - share}, 1), 400 * 1024)


def test_blocks_too_short_for_a_share_lose_samples(monkeypatch):
    monkeypatch.setattr(sampling, "_LARGEST_BLOCK", sampling._BLOCK)
    with pytest.raises(AssertionError):
        test_a_small_share_loses_no_sample(3e-4)


LIMITED = {"a": 700, "b": 5000, "c": 0, "d": 1}


def limited(limits: dict[str, int] = LIMITED, **more: float) -> Blend:
    return Blend({"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1, **more}, 3, limits)


def test_others_take_the_share_of_a_used_up_source():
    blend = limited(e=0.2)
    assert_in_order(blend, 40_000)
    source, _ = locate(blend, 0, 40_000)
    ends = {name: int(np.flatnonzero(source == i).max(initial=-1)) for i, name in enumerate(blend.names)}
    assert ends["c"] == -1 and ends["d"] < 30 and ends["a"] < 2000 < ends["b"] < 12_000
    between = np.bincount(source[2048:8192], minlength=5) / 6144
    assert between[[1, 4]] == pytest.approx([0.5, 0.5], abs=0.02), "b and e keep their proportion"
    assert blend.samples is None and set(source[12_000:]) == {4}


def test_a_blend_ends_with_its_last_source():
    blend = limited()
    assert blend.samples == sum(LIMITED.values())
    assert dict(zip(blend.names, counts_of(blend, blend.samples).tolist(), strict=True)) == LIMITED
    with pytest.raises(IndexError, match="outside the blend's 5701"):
        blend.range_around(5701)
    assert limited(dict.fromkeys("abcd", 0)).samples == 0


@pytest.mark.parametrize("samples", [0, 1, 25, 700, 1024, 1500, 3000, 5701])
def test_counts_are_those_of_the_samples(samples):
    assert list(limited().counts(samples).values()) == counts_of(limited(), samples).tolist()


def test_limited_blends_have_random_access_far_out():
    blend = Blend({"a": 0.5, "b": 0.5}, 3, {"a": 10**12})
    begin = blend.segments[1].begin
    assert abs(begin - 2 * 10**12) < 2000 and len(blend.segments) == 2
    here = blend.range_around(begin - 1)
    assert here.begin + len(here.sources) == begin, "cut where the source ends"
    assert here.within[here.sources == 0].max() == 10**12 - 1
    assert blend.counts(begin)["a"] == 10**12
    source, within = locate(blend, begin - 1, begin + 6)
    assert source[1:].tolist() == [1] * 6 and np.array_equal(within[1:] - within[1], np.arange(6))
