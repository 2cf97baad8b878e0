"""A linear model of labels on the features of records: cross-fitted ridge regression, stored without pickle.

A record is two vectors of hashed n-grams, one of its prompt and one of its answer, with the weights
(1 + log count) * idf and length 1 (Salton and Buckley 1988), and the figures of both. Five models each learn from four
fifths of the labelled records, and score the other fifth; a sixth learns from all and scores the rest. Each is scaled
to mean 0 and standard deviation 1 on the same records, so that scores of different models compare. Features of a
reference model, if any, are further figures, with a weight of their own.
Shapes: N records, T n-grams of all records, L labelled records, M = FOLDS + 1 models, C = 2^(BITS + 1) columns, K
figures, S features of a reference model.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xxhash
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import read_json, write_bytes, write_json
from data.filter.input.records import Record
from data.filter.score.features import BITS, VERSION, ReferenceFeatures, features_of
from data.filter.score.scorer import Direction
from data.filter.screen.normalise import canonical
from data.filter.store import writing

FOLDS = 5
COLUMNS = 2 << BITS
FAMILIAR = 1 << 13
"""N-grams of prompts, and of answers, that count as familiar: the most frequent of the corpus. They are few, so that an
n-gram of another language rarely shares the bucket of one.
"""
ARRAYS, FACTS = "learned.npz", "learned.json"
_BATCH = 64
_LIMIT = 4.0
"""Standard deviations from the mean at which a figure is cut."""
_PENALTIES = np.logspace(-3, 3, 13)
_LINEAR, _SQUARED = 0.4, 0.1
"""Weights of all figures together and of their squares, if that of the n-grams of a prompt is 1."""
_REFERENCE = 0.3
"""Weight of all features of a reference model together."""
_TYPES = {
    "idf_C": np.float32,
    "familiar_C": np.bool_,
    "figures_2K": np.float32,
    "columns": np.int32,
    "weights": np.float32,
    "figure_weights": np.float32,
    "offsets_M": np.float64,
    "identities_L": np.uint64,
    "folds_L": np.uint8,
}

Floats = NDArray[np.float64]


def identity(record: Record) -> int:
    """Return a 64-bit hash of the text without case and white space. Exact duplicates have the same."""
    return xxhash.xxh3_64_intdigest(canonical(record.text).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Vectors:
    """`rows_T` and `columns_T` [T], `values_T` [T]; `figures_NK`."""

    rows_T: NDArray[np.int64]
    columns_T: NDArray[np.int64]
    values_T: Floats
    figures_NK: Floats

    @property
    def matrix(self) -> Any:
        from scipy import sparse

        return sparse.csr_matrix((self.values_T, (self.rows_T, self.columns_T)), (len(self.figures_NK), COLUMNS))


def counts_of(records: Sequence[Record]) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """Return rows, columns and counts of n-grams [T], and figures [N, K]."""
    prompts = features_of([record.prompt for record in records])
    answers = features_of([record.answer for record in records])
    rows = np.concatenate([prompts.rows_T, answers.rows_T])
    columns = np.concatenate([prompts.columns_T, answers.columns_T + (1 << BITS)])
    counts = np.concatenate([prompts.counts_T, answers.counts_T])
    return rows, columns, counts, np.concatenate([prompts.figures_NF, answers.figures_NF], axis=1)


@dataclass(frozen=True)
class Weighting:
    """Statistics of the corpus, fitted without labels. `figures_2K`, `reference_2S`: mean and standard deviation of
    each figure, and of each feature of the model `reference`.
    """

    idf_C: NDArray[np.float32]
    familiar_C: NDArray[np.bool_]
    figures_2K: NDArray[np.float32]
    reference_2S: NDArray[np.float32] | None = None
    reference: ReferenceFeatures | None = None

    @classmethod
    def fitted(cls, records: Iterable[Sequence[Record]]) -> Weighting:
        """Fit to batches of records."""
        total, found = np.zeros(COLUMNS, np.int64), []
        for batch in records:
            _, columns, _, figures = counts_of(batch)
            total += np.bincount(columns, minlength=COLUMNS)
            found.append(figures.astype(np.float32))
        figures_NF = np.concatenate(found).astype(np.float64)
        idf = np.log((1 + len(figures_NF)) / (1 + total)) + 1
        familiar = np.zeros(COLUMNS, bool)
        for side in (slice(None, 1 << BITS), slice(1 << BITS, None)):
            familiar[side][np.argsort(-total[side], kind="stable")[:FAMILIAR]] = True
        return cls(idf.astype(np.float32), familiar & (total > 1), _statistics(figures_NF))

    def beside(self, reference: ReferenceFeatures, records: Sequence[Record]) -> Weighting:
        """Add the features of a reference model, which are scaled on these records."""
        return replace(self, reference=reference, reference_2S=_statistics(reference.of(records).astype(np.float64)))

    def coverage(self, records: Sequence[Record]) -> Floats:
        """Return the fraction of the n-grams of each record that are familiar [N]."""
        rows, columns, counts, _ = counts_of(records)
        seen = np.bincount(rows, counts * self.familiar_C[columns], len(records))
        return np.asarray(seen / np.maximum(np.bincount(rows, counts, len(records)), 1))

    def vectors(self, records: Sequence[Record]) -> Vectors:
        """Weigh the features of records. Those of a record do not depend on the others."""
        rows, columns, counts, figures = counts_of(records)
        values = (1 + np.log(counts)) * self.idf_C[columns]
        sides = 2 * rows + (columns >> BITS)
        norms = np.sqrt(np.bincount(sides, values * values))
        scaled = _scaled(figures, self.figures_2K)
        squared = np.clip(scaled * scaled - 1, -_LIMIT, _LIMIT) / 2
        both = np.concatenate([np.sqrt(_LINEAR) * scaled, np.sqrt(_SQUARED) * squared], axis=1)
        both /= np.sqrt(figures.shape[1])
        if self.reference is not None and self.reference_2S is not None:
            found = _scaled(self.reference.of(records), self.reference_2S)
            both = np.concatenate([both, found * np.sqrt(_REFERENCE / found.shape[1])], axis=1)
        return Vectors(rows, columns, values / norms[sides], both)


def _statistics(figures_NK: Floats) -> NDArray[np.float32]:
    spread = figures_NK.std(axis=0)
    return np.stack([figures_NK.mean(axis=0), np.where(spread > 1e-9, spread, 1)]).astype(np.float32)


def _scaled(figures_NK: NDArray[Any], statistics_2K: NDArray[np.float32]) -> Floats:
    scaled = (figures_NK.astype(np.float64) - statistics_2K[0]) / statistics_2K[1]
    return np.clip(scaled, -_LIMIT, _LIMIT)


@dataclass(frozen=True)
class LinearModel:
    """Models 0 to FOLDS - 1 did not learn from the labelled records of that fold; the last learned from all.

    `columns`: columns whose weight is not 0 in some model. `weights`: theirs [M, len(columns)]. `figure_weights`: those
    of the figures [M, K]. `identities_L`: the labelled records, sorted. `facts`: what people and programs may want to
    know about the model, as JSON.
    """

    weighting: Weighting
    columns: NDArray[np.int32]
    weights: NDArray[np.float32]
    figure_weights: NDArray[np.float32]
    offsets_M: Floats
    identities_L: NDArray[np.uint64]
    folds_L: NDArray[np.uint8]
    facts: dict[str, Any]

    @cached_property
    def weights_MC(self) -> NDArray[np.float32]:
        dense = np.zeros((FOLDS + 1, COLUMNS), np.float32)
        dense[:, self.columns] = self.weights
        return dense

    def score(self, records: Sequence[Record]) -> tuple[Floats, NDArray[np.int64]]:
        """Return the scores [N] and the models that gave them [N]. A score does not depend on the other records, to the
        bit.
        """
        models = self.models_of(records)
        batches = [slice(begin, begin + _BATCH) for begin in range(0, len(records), _BATCH)]
        parts = [self.predict(self.weighting.vectors(records[mine]), models[mine]) for mine in batches]
        return np.concatenate([np.empty(0), *parts]), models

    def models_of(self, records: Sequence[Record]) -> NDArray[np.int64]:
        """Return the model of each record: that of its fold if it is labelled, else the last."""
        found = np.array([identity(record) for record in records], np.uint64)
        places = np.minimum(np.searchsorted(self.identities_L, found), len(self.identities_L) - 1)
        return np.where(self.identities_L[places] == found, self.folds_L[places], FOLDS).astype(np.int64)

    def predict(self, vectors: Vectors, models_N: NDArray[np.int64]) -> Floats:
        each_T = vectors.values_T * self.weights_MC[models_N[vectors.rows_T], vectors.columns_T]
        total = np.bincount(vectors.rows_T, each_T, len(models_N))
        total += (vectors.figures_NK * self.figure_weights[models_N]).sum(axis=1)
        return total - self.offsets_M[models_N]

    @property
    def arrays(self) -> dict[str, Any]:
        values, types = vars(self.weighting) | vars(self), _types(self.weighting.reference)
        return {name: np.ascontiguousarray(values[name], kind) for name, kind in types.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of everything on which scores depend."""
        return _hash(self.arrays, self.weighting.reference)

    def save(self, directory: Path) -> None:
        """Write `ARRAYS`, then `FACTS`, which makes the model complete. Raises `DataError` if it cannot be written."""
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write_bytes(directory / ARRAYS, content.getvalue())
            made_by = {} if (one := self.weighting.reference) is None else {"reference": one.facts}
            own = {"features": VERSION, "fingerprint": self.fingerprint, **made_by}
            write_json(directory / FACTS, own | self.facts)


def _hash(arrays: Mapping[str, NDArray[Any]], reference: ReferenceFeatures | None) -> str:
    digest = hashlib.sha256(VERSION.encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    if reference is not None:
        digest.update(reference.fingerprint.encode())
    return digest.hexdigest()


def _types(reference: ReferenceFeatures | None) -> dict[str, Any]:
    return _TYPES if reference is None else {**_TYPES, "reference_2S": np.float32}


def load(directory: Path, reference: ReferenceFeatures | None = None) -> LinearModel:
    """Read a stored model. `reference`: the model that computed its features, if it has features of one.

    Raises `ConfigError` under `model` if there is no stored model, or it is damaged, and under `features` or
    `reference` if it learned from other features.
    """
    advice = ["the output directory of leviathan filter scorer.kind=learned"]
    strings = dict.fromkeys(("features", "fingerprint", "labels_from", "direction"), str)
    try:
        facts = read_json(directory / FACTS, strings)
        if facts["features"] != VERSION:
            raise ValueError(f"it was stored by another version ({facts['features']}, not {VERSION}): learn it again")
        _check_reference(facts.get("reference"), reference)
        if facts["direction"] not in Direction.__members__:
            raise ValueError(f"direction is {facts['direction']!r}")
        with np.load(directory / ARRAYS) as stored:  # refuses pickled objects
            found = {name: stored[name].astype(kind) for name, kind in _types(reference).items()}
        if _hash(found, reference) != facts["fingerprint"]:
            raise ValueError(f"{ARRAYS} does not belong to {FACTS}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "holds no learned scorer" if missing else f"holds a damaged or foreign learned scorer ({error})"
        raise ConfigError("model", str(directory), reason, advice) from None
    of_weighting = {name: found.pop(name) for name in Weighting.__match_args__ if name in found}
    more = {key: value for key, value in facts.items() if key not in ("features", "fingerprint", "reference")}
    return LinearModel(Weighting(**of_weighting, reference=reference), facts=more, **found)


def _check_reference(stored: Any, given: ReferenceFeatures | None) -> None:
    """Raise `ConfigError` unless a stored model's features are those of the model that is given."""
    kind = "ngrams" if given is None else given.kind.value
    if stored is None:
        if given is not None:
            raise ConfigError("features", kind, "the stored scorer learned from n-grams alone", ["ngrams"])
        return
    features, name, fingerprint = (str(stored[key]) for key in ("features", "model", "fingerprint"))
    learned = f"the stored scorer learned from features ({features}) of {name}"
    if given is None or kind != features:
        raise ConfigError("features", kind, learned, [f"{features} with scorer.reference={name}"])
    if given.fingerprint != fingerprint:
        reason = f"is another model, or reads another scorer.seq_len: {learned}"
        raise ConfigError("reference", given.name, reason, [name])


def learn(
    weighting: Weighting,
    records: Sequence[Record],
    labels_L: Floats,
    reference: Sequence[Record],
) -> LinearModel:
    """Fit the models to labelled records of different identities. `reference`: records on which models are scaled.

    Only the order of labels counts: they are replaced by their ranks, less the mean rank of their domain. The penalty
    is that with the least leave-one-out error among the labels from which a model learns.
    """
    from threadpoolctl import threadpool_limits

    identities = np.array([identity(record) for record in records], np.uint64)
    domains = np.unique([record.domain for record in records], return_inverse=True)[1]
    folds, order = np.empty(len(domains), np.int64), np.argsort(identities)
    folds[np.lexsort((identities, domains))] = np.arange(len(domains)) % FOLDS  # each domain is in all folds
    vectors, others = weighting.vectors(records), weighting.vectors(reference)
    matrix, figures, scaled_on = vectors.matrix, vectors.figures_NK, others.matrix
    weights, of_figures, offsets = [], [], []
    with threadpool_limits(1):  # sums of several threads differ in the last bits
        for fold in range(FOLDS + 1):
            mine = np.flatnonzero(folds != fold)
            found = _ridge(matrix[mine], figures[mine], _targets(labels_L[mine], domains[mine]))
            predicted = scaled_on @ found[0] + others.figures_NK @ found[1]
            spread = predicted.std()
            spread = spread if spread > 1e-9 else 1.0
            weights.append(found[0] / spread)
            of_figures.append(found[1] / spread)
            offsets.append(predicted.mean() / spread)
    columns = np.flatnonzero(np.any(weights, axis=0)).astype(np.int32)
    return LinearModel(
        weighting=weighting,
        columns=columns,
        weights=np.stack(weights)[:, columns].astype(np.float32),
        figure_weights=np.stack(of_figures).astype(np.float32),
        offsets_M=np.array(offsets),
        identities_L=identities[order],
        folds_L=folds[order].astype(np.uint8),
        facts={},
    )


def _targets(labels: Floats, domains: NDArray[np.int64]) -> Floats:
    """Return the ranks of labels in [0, 1], less the mean of their domain, which counts less if it has few labels."""
    from scipy.stats import rankdata

    ranks = rankdata(labels) / len(labels)
    ranks -= ranks.mean()
    count, total = np.bincount(domains), np.bincount(domains, ranks)
    return np.asarray(ranks - (total / (count + 2))[domains], np.float64)


def _ridge(matrix: Any, figures: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Return the weights of the columns [C] and of the figures [K]."""
    from scipy import sparse
    from sklearn.linear_model import RidgeCV

    used = np.unique(matrix.indices)
    both = sparse.hstack([matrix[:, used], sparse.csr_matrix(figures)]).tocsr()
    found = RidgeCV(_PENALTIES, fit_intercept=False).fit(both, targets).coef_
    weights = np.zeros(COLUMNS)
    weights[used] = found[: len(used)]
    return weights, found[len(used) :]
