"""The keyed permutation and the blend: exact properties, any of which a resumed run relies on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from data import sampling
from data.sampling import Blend, key_of, permute


def is_bijection(places: np.ndarray) -> bool:
    return np.array_equal(np.sort(places), np.arange(len(places)))


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 100, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, key_of("a"), 2**64 - 1):
        assert is_bijection(permute(np.arange(size), size, key))


def test_the_check_sees_what_is_no_bijection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the network's values to the size, instead of walking on, makes rows meet."""
    usual = sampling._feistel
    monkeypatch.setattr(sampling, "_feistel", lambda value, half, key: usual(value, half, key) % np.uint64(100))
    assert not is_bijection(permute(np.arange(100), 100, 1))


def test_permutation_has_random_access() -> None:
    whole = permute(np.arange(10_000), 10_000, 7)
    some = np.array([9_999, 0, 1234, 1234])
    assert np.array_equal(permute(some, 10_000, 7), whole[some])


def test_permutation_of_more_rows_than_a_table_could_hold() -> None:
    size = 3 * 10**12
    places = permute(np.arange(10_000) * 250_000_000, size, 1)
    assert len(np.unique(places)) == 10_000 and places.max() < size and places.min() >= 0


def test_keys_give_unrelated_orders() -> None:
    first, second = permute(np.arange(4096), 4096, 1), permute(np.arange(4096), 4096, 2)
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, np.arange(4096))[0, 1]) < 0.05 and abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_places_are_evenly_spread() -> None:
    """Where row 0 lands, over 6,400 keys: chi-square of 64 cells, far below what a bias would give."""
    cells = np.bincount([int(permute(np.zeros(1, np.int64), 64, key_of(key))[0]) for key in range(6400)], minlength=64)
    assert ((cells - 100) ** 2 / 100).sum() < 130


def test_permutation_refuses_what_lies_outside() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(np.array([index]), 10, 1)


def counts_after(blend: Blend, samples: int) -> np.ndarray:
    return np.bincount(blend.locate(np.arange(samples))[0], minlength=len(blend.names))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.4, "b": 0.25, "c": 0.2, "d": 0.15}, {"a": 1.0, "b": 1e-6}])
def test_blend_gives_each_source_its_share(weights: dict[str, float]) -> None:
    blend, total = Blend(weights, 3), sum(weights.values())
    for blocks in (1, 2, 9):
        samples = blocks * blend.pieces[0].shares.block
        wanted = np.array([samples * weight / total for weight in weights.values()])
        found = counts_after(blend, samples)
        assert found.sum() == samples and np.abs(found - wanted).max() <= 1


def test_share_check_notices_other_weights() -> None:
    found = counts_after(Blend({"a": 0.41, "b": 0.59}, 3), 1024)
    assert abs(found[0] - 0.4 * 1024) > 1


def test_each_source_gives_its_samples_in_order() -> None:
    source, within = Blend({"a": 2.0, "b": 1.0}, 5).locate(np.arange(5000))
    for index in (0, 1):
        given = within[source == index]
        assert np.array_equal(given, np.arange(len(given)))


def test_blend_mixes_within_a_block() -> None:
    source, _ = Blend({"a": 1.0, "b": 1.0}, 5).locate(np.arange(1024))
    assert 300 < np.count_nonzero(np.diff(source)) < 700


def test_blocks_have_orders_of_their_own() -> None:
    source, _ = Blend({"a": 1.0, "b": 1.0}, 5).locate(np.arange(2048))
    assert 0.4 < (source[:1024] == source[1024:]).mean() < 0.6


def test_blend_has_random_access_far_out() -> None:
    blend = Blend({"a": 0.3, "b": 0.7}, 1)
    far = np.arange(10**13, 10**13 + 3000)
    source, within = blend.locate(far)
    one_by_one = [blend.locate(far[i : i + 1]) for i in (0, 1, 1500, 2999)]
    for (s, w), i in zip(one_by_one, (0, 1, 1500, 2999), strict=True):
        assert (s[0], w[0]) == (source[i], within[i])
    assert abs(within[source == 0].max() - 0.3 * 10**13) < 2000


def test_key_depends_on_every_part_and_its_place() -> None:
    assert len({key_of(1, 2), key_of(2, 1), key_of(12), key_of("1", ""), key_of(1)}) == 5


def digest(blend: Blend) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in blend.locate(np.arange(5000)))).hexdigest()


def test_blends_without_limits_are_what_they_always_were() -> None:
    """Taken before there were limits: a run that began then goes on with the same rows."""
    four = Blend({"a": 0.4, "b": 0.25, "c": 0.2, "d": 0.15}, 3)
    assert digest(four) == "a797573a5d53fd79a58e67d0fedd2d8f3354636de72b86e50a53f070b3f692b8"
    assert digest(Blend({"a": 1.0, "b": 1e-6}, 3)) == "0937cd00e2e32172b6356b11549c85e3f7fe58ba0740560ebc765f8597c6c216"
    assert digest(Blend({"a": 0.4, "b": 0.25, "x": 0.0, "c": 0.2, "d": 0.15}, 3)) != digest(Blend({"a": 1.0}, 3))
    late = Blend({"a": 0.4, "b": 0.25, "c": 0.2, "d": 0.15}, 3, {"a": 10**6})
    assert digest(late) == digest(four), "a limit that is not reached changes nothing"


@pytest.mark.parametrize("share", [3e-4, 1e-5, 1e-3])
def test_a_small_share_in_the_middle_loses_no_sample(share: float) -> None:
    blend = Blend({"a": 0.3, "b": share, "c": 0.7 - share}, 1)
    source, within = blend.locate(np.arange(400 * 1024))
    for index in range(3):
        assert np.array_equal(within[source == index], np.arange((source == index).sum()))


def test_blocks_too_short_for_a_share_lose_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_LARGEST_BLOCK", sampling._BLOCK)
    with pytest.raises(AssertionError):
        test_a_small_share_in_the_middle_loses_no_sample(3e-4)


LIMITED = {"a": 700, "b": 5000, "c": 0, "d": 1}


def limited(left: dict[str, int] = LIMITED, **more: float) -> Blend:
    return Blend({"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1, **more}, 3, left)


def test_a_source_that_is_used_up_gives_its_share_to_the_others() -> None:
    blend = limited(e=0.2)
    source, within = blend.locate(np.arange(40_000))
    for index, name in enumerate(blend.names):
        given = within[source == index]
        assert np.array_equal(given, np.arange(len(given))) and len(given) == LIMITED.get(name, len(given))
    ends = {name: int(np.flatnonzero(source == i).max(initial=-1)) for i, name in enumerate(blend.names)}
    assert ends["c"] == -1 and ends["d"] < 30 and ends["a"] < 2000 < ends["b"] < 12_000
    between = np.bincount(source[2048:8192], minlength=5) / 6144
    assert between[[1, 4]] == pytest.approx([0.5, 0.5], abs=0.02), "b and e keep their proportion"
    assert blend.samples is None and set(source[12_000:]) == {4}


def test_a_blend_ends_with_its_last_source_and_wastes_no_sample() -> None:
    blend = limited()
    assert blend.samples == sum(LIMITED.values())
    counts = np.bincount(blend.locate(np.arange(blend.samples))[0], minlength=4)
    assert dict(zip(blend.names, counts.tolist(), strict=True)) == LIMITED
    with pytest.raises(IndexError, match="outside the blend's 5701"):
        blend.stretch(5701)
    assert limited(dict.fromkeys("abcd", 0)).samples == 0


@pytest.mark.parametrize("samples", [0, 1, 25, 700, 1024, 1500, 3000, 5701])
def test_what_was_given_is_what_is_counted(samples: int) -> None:
    blend = limited()
    counts = np.bincount(blend.locate(np.arange(samples))[0], minlength=4)
    assert list(blend.given(samples).values()) == counts.tolist()


def test_limited_blends_have_random_access_far_out() -> None:
    blend = Blend({"a": 0.5, "b": 0.5}, 3, {"a": 10**12})
    piece = blend.pieces[1]
    assert abs(piece.begin - 2 * 10**12) < 2000 and len(blend.pieces) == 2
    here = blend.stretch(piece.begin - 1)
    assert here.begin + len(here.sources) == piece.begin, "cut where the source ends"
    assert here.within[here.sources == 0].max() == 10**12 - 1
    assert blend.given(piece.begin)["a"] == 10**12
    source, within = blend.locate(np.array([piece.begin + 5, piece.begin - 1, piece.begin]))
    assert source[0] == source[2] == 1 and within[0] == within[2] + 5
