"""Scorers agree with scikit-learn, SciPy or a plain program that computes the same from the definition."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import percentileofscore
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import RidgeCV

from core.errors import ConfigError, DataError
from core.files import sha256_text
from data.filter.config import FeatureKind, ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score import features, learned, linear, ngram
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.features import BITS, FIGURES, TEXT_BYTES, VERSION, ReferenceFeatures, features_of
from data.filter.score.learned import LearnedScorer, quotas_of
from data.filter.score.ngram import NgramModel, NgramScorer
from data.filter.score.scorer import Direction, fold, sample_key
from tests.data.filter.score.test_learned import fitted, grader, problems, relabelled
from tests.support.filtering import FixedScorer


class KneserNey:
    """Chen and Goodman 1999, section 2.7, with one discount for each order, by dictionaries."""

    def __init__(self, order: int, texts: list[bytes]) -> None:
        padded = [b"\0" * (order - 1) + text for text in texts]
        grams = Counter(one[i - order : i] for one in padded for i in range(order, len(one) + 1))
        self.levels = [grams]
        while order > 1:
            order -= 1
            grams = Counter(gram[1:] for gram in grams)
            self.levels.append(grams)

    def p(self, context: bytes, byte: int, level: int = 0) -> float:
        if level == len(self.levels):
            return 1 / 256
        grams = self.levels[level]
        after = [count for gram, count in grams.items() if gram[:-1] == context]
        lower = self.p(context[1:], byte, level + 1)
        if not after:
            return lower
        once, twice = (sum(count == n for count in grams.values()) for n in (1, 2))
        d = min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)
        count = grams[context + bytes([byte])]
        return max(count - d, 0) / sum(after) + d * len(after) / sum(after) * lower

    def losses(self, context: bytes, text: bytes) -> list[float]:
        order = len(self.levels)
        whole = b"\0" * order + context + text
        ends = range(len(whole) - len(text), len(whole))
        return [-np.log(self.p(whole[i - order + 1 : i], whole[i])) for i in ends]


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("texts", [[b"the cat sees the dog", b"a dog", b"the the the the", b""], [b"hen"], [b"do" * 9]])
def test_ngram_losses_are_those_of_a_plain_program(order, texts):
    slow, model = KneserNey(order, texts), NgramModel(order, texts)
    for context, text in ((b"", b"the cats"), (b"see", b" a dog"), (b"zz the", b" hen\0\xff"), (b"dog", b"")):
        found = model.losses([context], [text]) / (1 << 20)
        assert found == pytest.approx(slow.losses(context, text), abs=1e-5)


@pytest.mark.parametrize(("window", "size"), [(None, 1 << 23), (3, 300)])
def test_ngram_scores_are_losses_under_the_other_half(window, size):
    """The sample of a half: the records with the lowest hashes that fit. The answer continues its prompt."""
    records = [replace(one, text=one.text[:90], answer_start=50) for one in problems(4, 24)]
    scorer = NgramScorer(3, window, size)
    scorer.fit(lambda: iter(records))
    samples: list[list[bytes]] = [[], []]
    for one in sorted(records, key=sample_key):
        half = samples[fold(one)]
        if sum(map(len, half)) + len(one.text) <= size and len(half) == sum(
            fold(other) == fold(one) and sample_key(other) < sample_key(one) for other in records
        ):
            half.append(one.text.encode())
    models = [KneserNey(3, half) for half in samples]
    for one, score in zip(records[:9], scorer.score(records[:9]), strict=True):
        losses = models[1 - fold(one)].losses(one.prompt.encode(), one.answer.encode())
        n = window or len(losses)
        wanted = max(np.mean(losses[i : i + n]) for i in range(len(losses) - n + 1))
        assert score == pytest.approx(wanted, abs=1e-5)
    assert {fold(one) for one in records[:9]} == {0, 1}


def test_long_records_and_batches_of_ngrams(monkeypatch):
    """Only the beginning of a long record is learned from. Scores do not depend on how many are scored at once."""
    records = [Record(str(n), "d", "s", f"é{one.text}") for n, one in enumerate(problems(4, 24))]
    monkeypatch.setattr(ngram, "_RECORD_BYTES", 40)
    short = [replace(one, text=one.text.encode()[:40].decode()) for one in records]
    found = []
    for some, size in ((records, 1 << 20), (records, 300), (short, 1 << 20)):
        monkeypatch.setattr(ngram, "_SCORED_AT_ONCE", size)
        monkeypatch.setattr(ngram, "fold", lambda record: int(record.id) % 2)
        scorer = NgramScorer(3)
        scorer.fit(lambda some=some: iter(some))
        found.append(scorer.score(records).tolist())
    assert found[0] == found[1] == found[2]


def test_features_do_not_change_without_a_new_version():
    """Stored scorers, and those of streams, depend on each bit. Change VERSION if this changes."""
    strange = ["", "7", " \n", "ab1 Ab22 aB-333", "你好 é a", "\0\0x", "a" * 99, "x y" * TEXT_BYTES, "ю" * TEXT_BYTES]
    found = features_of([*strange, *(one.text for one in problems(4, 20))])
    digest = hashlib.sha256()
    for array in (found.rows_T, found.columns_T, found.counts_T.astype(np.int64), np.round(found.figures_NF * 1e6)):
        digest.update(array.astype(np.int64).tobytes())
    assert (VERSION, digest.hexdigest()[:16]) == ("1", "8069c778b10070a3")
    assert found.columns_T.max() < 1 << BITS and (np.diff((found.rows_T << BITS) + found.columns_T) > 0).all()


def by_hand(records: Any, weighting: linear.Weighting) -> Any:
    """Return n-grams as scikit-learn weighs them, for prompt and answer apart, and the weighted figures."""
    sides, figures = [], []
    for texts in ([one.prompt for one in records], [one.answer for one in records]):
        found = features_of(texts)
        counts = sparse.csr_matrix((found.counts_T, (found.rows_T, found.columns_T)), (len(texts), 1 << BITS))
        sides.append(TfidfTransformer(sublinear_tf=True).fit(counts).transform(counts))
        figures.append(found.figures_NF)
    both = np.concatenate(figures, axis=1)
    spread = both.std(axis=0)
    z = np.clip((both - both.mean(axis=0)) / np.where(spread > 1e-9, spread, 1), -4, 4)
    weighted = np.concatenate([np.sqrt(0.4) * z, np.sqrt(0.1) * np.clip(z**2 - 1, -4, 4) / 2], axis=1)
    return sparse.hstack(sides).tocsr(), weighted / np.sqrt(2 * len(FIGURES))


def test_vectors_are_tf_idf_and_scaled_figures():
    records = [*problems(4, 60), replace(problems(4, 60)[0], answer_start=0)]
    weighting = linear.Weighting.fitted([records[:40], records[40:]])
    found, (ngrams, figures) = weighting.vectors(records), by_hand(records, weighting)
    assert abs(found.matrix - ngrams).max() < 1e-6 and found.matrix.nnz == ngrams.nnz
    assert np.allclose(found.figures_NK, figures, atol=1e-5)
    texts = Counter(ngrams.indices.tolist())
    assert set(np.flatnonzero(weighting.familiar_C)) == {column for column, count in texts.items() if count > 1}
    known = [sum(texts[c] > 1 for c in words_of(one)) / max(len(words_of(one)), 1) for one in records]
    assert np.allclose(weighting.coverage(records), known)


def words_of(record: Record) -> list[int]:
    """Return the column of each word and pair of words, as often as it occurs."""
    found, before = [], 0
    for text in (record.prompt, record.answer):
        one = features_of([text])
        found += np.repeat(one.columns_T + before, one.counts_T.astype(int)).tolist()
        before = 1 << BITS
    return found


def test_only_the_most_frequent_ngrams_are_familiar(monkeypatch):
    monkeypatch.setattr(linear, "FAMILIAR", 5)
    records = problems(4, 60)
    found = linear.Weighting.fitted([records]).familiar_C
    for side in (0, 1):
        texts = Counter(c for one in records for c in set(words_of(one)) if c >> BITS == side)
        mine = np.flatnonzero(found[side << BITS : (side + 1) << BITS]) + (side << BITS)
        assert len(mine) == 5 and min(texts[c] for c in mine.tolist()) >= sorted(texts.values())[-5]


def test_models_are_ridge_regressions_on_the_other_folds():
    """Each is scaled on the reference records, and a labelled record is scored by the one that has not seen it."""
    records, others = list(problems(4, 60)), list(problems(5, 50))
    labels = np.array([one.label for one in records], np.float64)
    weighting = linear.Weighting.fitted([records + others])
    model = linear.learn(weighting, records, labels, others[:40])

    def matrix(some: Any) -> Any:
        found = weighting.vectors(some)
        return sparse.hstack([found.matrix, found.figures_NK]).tocsr()

    domains = np.unique([one.domain for one in records], return_inverse=True)[1]
    folds = model.models_of(records)
    assert sorted(Counter(folds.tolist())) == list(range(linear.FOLDS))
    assert (model.models_of(others) == linear.FOLDS).all()
    assert (np.diff(model.identities_L.astype(object)) > 0).all(), "sorted"
    for number in range(linear.FOLDS + 1):
        mine = folds != number
        targets = linear._targets(labels[mine], domains[mine])
        ridge = RidgeCV(np.logspace(-3, 3, 13), fit_intercept=False).fit(matrix(records)[mine], targets)
        scale = ridge.predict(matrix(others[:40]))
        for some in (records, others):
            wanted = (ridge.predict(matrix(some)) - scale.mean()) / scale.std()
            assert np.allclose(model.predict(weighting.vectors(some), np.full(len(some), number)), wanted, atol=1e-4)
            own = model.models_of(some) == number
            assert np.allclose(model.score(some)[0][own], wanted[own], atol=1e-4)


def test_targets_are_by_hand():
    """Ranks over all labels, less their mean over all, less the mean of a domain, which shrinks with two labels more."""
    found = linear._targets(np.array([5.0, 1, 5, 9]), np.array([0, 0, 1, 1]))
    ranks = np.array([2.5, 1, 2.5, 4]) / 4 - 2.5 / 4
    assert found == pytest.approx(ranks - np.repeat([ranks[:2].sum() / 4, ranks[2:].sum() / 4], 2))


def lowest(records: Any, count: int) -> list[Record]:
    return sorted(records, key=sample_key)[:count]


@pytest.mark.parametrize("has_grader", [False, True])
def test_what_is_learned_from_has_the_lowest_hashes(tmp_path, monkeypatch, has_grader):
    """Labelled records in each domain by its quota, and of all records those of the corpus and of the scales."""
    monkeypatch.setattr(learned, "CORPUS", 120)
    monkeypatch.setattr(learned, "REFERENCE", 50)
    records = [one if number % 3 else replace(one, label=None) for number, one in enumerate(problems(4, 240))]
    labeler = grader() if has_grader else None
    reports: list[str] = []
    scorer = fitted(records, tmp_path, labeler, reports, labels=60)
    assert [one[:20] for one in reports] == ["fixed grades 60 reco"] * has_grader + ["learned from 60 labe"]
    assert scorer.direction is Direction.hard
    able = [one for one in records if has_grader or one.label is not None]
    counts = Counter(one.domain for one in able)
    quotas = quotas_of(dict(counts), counts, 60)
    chosen = [one for name in counts for one in lowest([r for r in able if r.domain == name], quotas[name])]
    assert scorer.model is not None and len(chosen) == 60
    model, facts = scorer.model, scorer.model.facts
    assert set(model.identities_L.tolist()) == {linear.identity(one) for one in chosen}
    known = {one.content: one.label for one in problems(4, 240)}
    weighting = linear.Weighting.fitted([lowest(records, 120)])
    assert np.allclose(model.weighting.idf_C, weighting.idf_C)
    assert np.allclose(model.weighting.figures_2K, weighting.figures_2K, rtol=1e-3)
    labels = np.array([known[one.content] for one in chosen], np.float64)
    wanted = linear.learn(weighting, chosen, labels, lowest(records, 50))
    assert np.allclose(scorer.score(records), wanted.score(records)[0], atol=1e-3)
    coverage = weighting.coverage(lowest(records, 50))
    assert facts["coverage"] == pytest.approx([coverage.mean(), coverage.std()])
    assert facts["label_range"] == [labels.min(), labels.max()] and facts["records"] == 240 and facts["labels"] == 60
    assert facts["labels_by_domain"] == {name: quotas[name] for name in sorted(counts)}
    assert scorer.score_all(records)[1]["fold"].tolist() == model.models_of(records).tolist()
    label = scorer.score_all(records)[1].get("label")
    if has_grader:
        mine = {one.content for one in chosen}
        given = [known[one.content] if one.content in mine else np.nan for one in records]
        assert np.array_equal(label, given, equal_nan=True)
    else:
        assert label is None


def test_quotas_are_half_equal_and_half_in_proportion():
    counts = Counter(a=300, b=100)
    assert quotas_of(dict(counts), counts, 40) == {"a": 25, "b": 15}
    unequal = Counter(a=70, b=20, c=10)
    assert quotas_of(dict(unequal), unequal, 31) == {"a": 16, "b": 8, "c": 7}, "16.02, 8.27, 6.72"
    assert quotas_of({"a": 300, "b": 14}, counts, 40) == {"a": 26, "b": 14}, "the rest is for the others"
    assert quotas_of({"a": 300, "b": 100}, Counter(a=100, b=100, c=1000), 41) == {"a": 21, "b": 20}


@pytest.mark.parametrize(("most", "count"), [(5, 200), (40, 39), (40, 41)])
def test_the_lowest_keys_are_kept(most, count):
    keys: set[int] = set()
    given = np.random.default_rng(most).permutation(1000)[:count].tolist()
    for key in given:
        learned._add_lowest(keys, key, most)
        assert len(keys) < 2 * most
    assert sorted(keys)[:most] == sorted(given)[:most]


def test_ranks_of_an_ensemble_are_percentiles_of_a_sample():
    records = list(problems(4, 60))
    bare = lowest(records, 25)[3].id
    members = [
        FixedScorer(lambda one: len(one.text) // 100),
        FixedScorer(lambda one: np.inf if one.id == bare else -one.label),
    ]
    scorer = EnsembleScorer(members, sample=25)
    members[0].direction = Direction.quality
    members[1].fit = lambda _: setattr(members[1], "direction", Direction.quality)  # type: ignore[method-assign]
    scorer.fit(lambda: iter(records))
    assert scorer.direction is Direction.quality, "that of its members, which a fit may set"
    sample, ranks = lowest(records, 25), []
    for member in members:
        known = [score for score in member.score(sample) if np.isfinite(score)]
        ranks.append([percentileofscore(known, score, "mean") / 100 for score in member.score(records)])
    scores, others = scorer.score_all(records)
    wanted = np.where([one.id == bare for one in records], np.nan, np.mean(ranks, axis=0))
    assert scores == pytest.approx(wanted, nan_ok=True) and np.isnan(scores).sum() == 1
    assert list(others) == list(scorer.others) == ["fixed[0]", "fixed[1]", "length", "random"]
    for name, member in zip(others, members, strict=False):
        assert others[name].tolist() == member.score(records).tolist()


def test_a_stored_scorer_is_not_learned_again(tmp_path):
    records = [replace(one, answer_start=None) for one in relabelled(problems(4, 60), range(60))]
    directory = fitted(records, tmp_path).directory
    assert LearnedScorer(ScorerConfig(ScorerKind.learned), tmp_path).direction is Direction.quality, "that is stored"
    stored = LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(directory)), tmp_path / "other")
    reports: list[str] = []
    stored.report = reports.append
    assert stored.direction is Direction.quality
    stored.fit(lambda: iter(relabelled(records, range(60, 0, -1))))
    assert not reports and not (tmp_path / "other").exists() and stored.directory == directory
    assert stored.model and stored.fingerprint == sha256_text("learned", stored.model.fingerprint)
    assert stored.model.facts["labels"] == 60, "a label of 0 is a label"


def test_a_model_is_known_by_all_that_it_computes_with(tmp_path, monkeypatch):
    """And is complete only with all of its files."""
    records = problems(4, 60)
    labels = np.array([one.label for one in records], np.float64)
    model = linear.learn(linear.Weighting.fitted([records]), records, labels, records)
    found = [model.fingerprint]
    for name, array in model.arrays.items():
        changed = array.copy()
        changed.flat[-1] = not changed.flat[-1] if array.dtype == np.bool_ else changed.flat[-1] + 1
        owner = model.weighting if hasattr(model.weighting, name) else model
        new = replace(owner, **{name: changed})
        found.append((new if owner is model else replace(model, weighting=new)).fingerprint)
    assert len(set(found)) == len(found) == 10
    model.facts.update(labels_from="m", direction="hard", more=[1])
    model.save(tmp_path)
    again = linear.load(tmp_path)
    assert again.facts == model.facts and again.fingerprint == model.fingerprint
    assert again.score(problems(5, 40))[0].tobytes() == model.score(problems(5, 40))[0].tobytes()
    whole, npy = (tmp_path / linear.ARRAYS).read_bytes(), io.BytesIO()
    np.save(npy, labels)
    for content, more in ((b"", {}), (npy.getvalue(), {}), (whole, {"reference": 3}), (whole, {"fingerprint": "0"})):
        model.facts.update(more)
        model.save(tmp_path)
        (tmp_path / linear.ARRAYS).write_bytes(content)
        with pytest.raises(ConfigError, match=r"^model=.* damaged or foreign learned scorer"):
            linear.load(tmp_path)
        [model.facts.pop(key) for key in more]
    monkeypatch.setattr(linear, "write_bytes", Mock(side_effect=OSError("full")))
    with pytest.raises(DataError, match="cannot write"):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new" / linear.FACTS).exists()


def test_features_of_a_model_are_read_once_and_kept_in_bounds(monkeypatch):
    """Each row is that of its record, in any batch, with copies, and where memory is full."""
    asked: list[tuple[str, str]] = []

    def read(pairs: Any) -> Any:
        asked.extend(pairs)
        rows = [[len(prompt), len(answer), ord(answer[0])] for prompt, answer in pairs]
        return np.array(rows, np.float32), sum(len(answer) > 5 for _, answer in pairs)

    texts = ["ab", "a", "ab", "cdefghi", "b"]
    records = [Record(str(n), "d", "s", f"Q{text}", 1) for n, text in enumerate(texts)]
    wanted = [[1, len(text), ord(text[0])] for text in texts]
    monkeypatch.setattr(features, "_KEPT_BYTES", 5 * 12)
    found = ReferenceFeatures(FeatureKind.hidden, "m", read, "f")
    for some in (slice(0, 3), slice(None), slice(None, None, -1)):
        assert found.of(records[some]).tolist() == wanted[some]
    assert len(asked) == len(set(asked)) == 4
    assert found.cost().endswith("; 1 of 4 records are longer than what the model reads, and are cut")
    monkeypatch.setattr(found, "_seconds", 6.0)
    assert found.cost(200).startswith("features of m (hidden): 1.5e+03 ms a record, 5.0 min for 200 in one process;")
    assert found.facts == {"features": "hidden", "model": "m", "fingerprint": "f"}
    many = [Record(str(n), "d", "s", f"Q{n:03}", 1) for n in range(4)]
    for _ in range(2):
        found.of(many)
    assert len(asked) == 4 + 2 * 4, "what does not fit is read again"


@pytest.mark.parametrize("share, warns", [(0.65, False), (0.55, True)])
def test_coverage_is_compared_with_a_share_of_the_usual(tmp_path, monkeypatch, share, warns):
    """A report comes below 60% of the coverage that the model had in training."""
    directory = fitted(problems(4, 240), tmp_path).directory
    stored, reports = LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(directory)), tmp_path), list[str]()
    stored.report = reports.append
    stored.fit(lambda: [])
    assert stored.model is not None
    stored.model.facts["coverage"] = [0.5, 0.0]
    monkeypatch.setattr(linear.Weighting, "coverage", lambda self, batch: np.full(len(batch), share * 0.5))
    stored.score(problems(5, 40))
    assert bool(reports) == warns
