"""Learn difficulty from few labels: a column of the input, or the grades that another scorer gives to a sample.

The sample is drawn at random in each domain. Half of it is divided equally, the rest in proportion to the records.
`linear.py` has the model. It reads words, not meaning: it finds what the labels of a corpus have in common with its
wording, so a corpus of another kind needs labels of its own.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError, counted
from core.files import read_json, sha256_text
from data.filter.audit.separation import FOLD
from data.filter.config import LEAST_LABELS as LEAST
from data.filter.config import ScorerConfig
from data.filter.input.records import LABEL, Record
from data.filter.score.features import VERSION, ReferenceFeatures
from data.filter.score.linear import FACTS, LinearModel, Weighting, identity, learn, load
from data.filter.score.scorer import CostlyScorer, Direction, Scorer, key_of_content, sample_key

CORPUS = 1 << 16
"""Records, those with the lowest hashes, to which the weights of words are fitted."""
REFERENCE = 1024
"""Records on which the models are scaled."""
TRIES = 1.5
"""Records that a labeler may be asked about, per label that is wanted."""
FAR = 0.6
"""Coverage of another input, as a fraction of that of the training data, below which a warning is reported."""
_BATCH, _ASKED_AT_ONCE, _CHECKED = 64, 128, 16


@dataclass
class _Survey:
    """What one pass over the records finds. Keys are `sample_key`s, those of `candidates` in increasing order."""

    digest: str
    labelled: Counter[str]
    counts: Counter[str]
    candidates: dict[str, list[int]]
    corpus: list[int]
    has_prompts: bool


class LearnedScorer(Scorer):
    """Score by a linear model of labels, in standard deviations of the corpus. Only learning needs scikit-learn.

    `directory`: where the model is stored. A stored model of the same records and settings is not learned again. With
    `config.model` a stored model is used as it is, and `fit` only compares the records with its training data.
    `reference`: features that are used beside n-grams.
    """

    name = "learned"
    report: Callable[[str], None]
    """Called with lines of progress and warnings."""

    def __init__(
        self,
        config: ScorerConfig,
        directory: Path,
        labeler: Scorer | None = None,
        reference: ReferenceFeatures | None = None,
    ) -> None:
        self.wanted, self.labeler, self.reference, self.report = config.labels, labeler, reference, print
        self.model: LinearModel | None = None
        self._is_stored, self._grades = config.model is not None, dict[int, float]()
        self._is_checked = not self._is_stored
        self.direction, what, taught = Direction.hard, "labels", ""
        if labeler is not None:
            self.direction, what, taught = labeler.direction, labeler.measures, labeler.fingerprint
        if config.model is not None:
            model = load(stored_in(Path(config.model).expanduser()), reference)
            self._use(model)
            what = model.facts["labels_from"]
            self.fingerprint, self.directory = sha256_text("learned", model.fingerprint), Path(config.model)
        else:
            made_by = () if reference is None else (reference.fingerprint,)
            self.fingerprint = sha256_text("learned", "2", VERSION, str(config.labels), taught, *made_by)
            self.directory = directory / f"learned-{self.fingerprint[:8]}"
            if (stored := self.directory / FACTS).exists():
                name = read_json(stored, {"direction": str})["direction"]
                self.direction = Direction.__members__.get(name, self.direction)
        self.measures = f"learned from {what}, in standard deviations of the corpus"

    @property
    def others(self) -> tuple[str, ...]:
        return (FOLD,) if self.labeler is None else (FOLD, LABEL)

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return self.score_all(records)[0]

    def score_all(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        if self.model is None:
            raise ValueError("fit comes before score")
        if not self._is_checked and len(records) >= _CHECKED:
            self._check_coverage(records)
        scores, models = self.model.score(records)
        others = {FOLD: models.astype(np.float64)}
        if self.labeler is not None:
            others[LABEL] = np.array([self._grades.get(identity(record), np.nan) for record in records], np.float64)
        return scores, others

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        if self._is_stored:
            if sample := list(itertools.islice(records(), REFERENCE)):
                self._check_coverage(sample)
                if self.reference is not None:
                    self.reference.of(sample[:_CHECKED])
                    self.report(self.reference.cost())
            return
        survey = self._survey(records())
        if (self.directory / FACTS).exists():
            stored = load(self.directory, self.reference)
            if stored.facts.get("input") == survey.digest:
                self._use(stored)
                return
        self._check_labels(survey)
        if self.labeler is None:
            self.direction = Direction.hard if survey.has_prompts else Direction.quality
        _check_installed()
        quotas, keys = self._quotas(survey)
        wanted, corpus = set(itertools.chain.from_iterable(keys.values())), set(survey.corpus)
        reference = set(survey.corpus[:REFERENCE])
        found: dict[int, Record] = {}
        scaled_on: list[Record] = []

        def of_corpus() -> Iterator[Record]:
            for record in records():
                key = sample_key(record)
                if key in wanted and (self.labeler is not None or record.label is not None):
                    found.setdefault(key, record)
                if key in reference:
                    scaled_on.append(record)
                if key in corpus:
                    yield record

        weighting = Weighting.fitted(_batches(of_corpus()))
        if self.labeler is None:
            different: dict[int, Record] = {}
            for key in sorted(found):
                different.setdefault(identity(found[key]), found[key])
            chosen = list(different.values())
            labels = np.array([record.label for record in chosen], np.float64)
        else:
            chosen, labels = self._graded({name: [found[key] for key in mine] for name, mine in keys.items()}, quotas)
        self._check_learnable(chosen, labels)
        if self.reference is not None:
            weighting = weighting.beside(self.reference, scaled_on)
            self.report(self.reference.cost(survey.counts.total()))
        model = learn(weighting, chosen, labels, scaled_on)
        model.facts.update(self._facts(weighting, chosen, labels, scaled_on, survey))
        model.save(self.directory)
        self._use(load(self.directory, self.reference))
        self.report(self._summary(model.facts))

    def _use(self, model: LinearModel) -> None:
        self.model, self.direction = model, Direction[model.facts["direction"]]
        pairs = model.facts.get("grades", {})
        self._grades = {int(key, 16): float(grade) for key, grade in pairs.items()}

    def _survey(self, records: Iterable[Record]) -> _Survey:
        digest, labelled, counts = hashlib.sha256(), Counter[str](), Counter[str]()
        candidates: dict[str, set[int]] = defaultdict(set)
        corpus: set[int] = set()
        has_prompts = False
        most = math.ceil(self.wanted * TRIES)
        for record in records:
            content = record.content
            digest.update(f"{content}{record.domain}\0{record.label}".encode())
            key = key_of_content(content)
            counts[record.domain] += 1
            has_prompts |= bool(record.prompt)
            labelled[record.domain] += record.label is not None
            if self.labeler is not None or record.label is not None:
                _add_lowest(candidates[record.domain], key, most)
            _add_lowest(corpus, key, CORPUS)
        lowest = {domain: heapq.nsmallest(most, keys) for domain, keys in sorted(candidates.items())}
        return _Survey(digest.hexdigest(), labelled, counts, lowest, heapq.nsmallest(CORPUS, corpus), has_prompts)

    def _check_labels(self, survey: _Survey) -> None:
        records, labelled = survey.counts.total(), survey.labelled.total()
        there = f"{counted(records, 'different record')} passed the screen"
        if records < LEAST:
            raise ConfigError("scorer.kind", "learned", f"needs {LEAST} records to learn from, and {there}")
        if self.labeler is None and labelled < LEAST:
            reason = f"needs {LEAST} labels or more: {there}, {labelled} of them labelled"
            advice = ["label_key=COLUMN", "scorer.labeler={kind: judge, url: URL, judge: MODEL}", "scorer.model=DIR"]
            raise ConfigError("scorer.kind", "learned", reason, advice[bool(labelled) :])

    def _quotas(self, survey: _Survey) -> tuple[dict[str, int], dict[str, list[int]]]:
        """Return how many labels to take from each domain, and the keys of the records that may have them, in order."""
        counts = survey.labelled if self.labeler is None else survey.counts
        quotas = quotas_of({domain: len(keys) for domain, keys in survey.candidates.items()}, counts, self.wanted)
        spare = 1.0 if self.labeler is None else TRIES
        return quotas, {name: survey.candidates[name][: math.ceil(quotas[name] * spare)] for name in quotas}

    def _graded(
        self, candidates: dict[str, list[Record]], quotas: dict[str, int]
    ) -> tuple[list[Record], NDArray[np.float64]]:
        """Ask the labeler about records of each domain until it has graded as many as wanted, or none is left."""
        assert self.labeler is not None
        self.labeler.fit(lambda: itertools.chain.from_iterable(candidates.values()))
        sample = [one for name, mine in candidates.items() for one in mine[: quotas[name]]]
        cost = self.labeler.cost(lambda: sample) if isinstance(self.labeler, CostlyScorer) else ""
        self.report(cost or f"{self.labeler.name} grades {counted(len(sample), 'record')}")
        chosen: dict[int, Record] = {}
        while True:
            asked = []
            for name, mine in candidates.items():
                missing = quotas[name] - sum(one.domain == name for one in chosen.values())
                asked += mine[:missing]
                del mine[:missing]
            if not asked:
                break
            for batch in _batches(asked, _ASKED_AT_ONCE):
                for record, grade in zip(batch, self.labeler.score(batch).tolist(), strict=True):
                    if np.isfinite(grade):
                        chosen.setdefault(identity(record), record)
                        self._grades.setdefault(identity(record), grade)
        wanted, graded = sum(quotas.values()), f"{self.labeler.name} graded {counted(len(chosen), 'record')}"
        if len(chosen) < LEAST:
            advice = "look at its endpoint and run again; answers so far are kept"
            raise DataError(f"{graded}, and the scorer learned needs {LEAST}: {advice}")
        if len(chosen) < wanted:
            self.report(f"warning: {self.labeler.name} graded only {len(chosen):,} of the {wanted:,} records wanted")
        return list(chosen.values()), np.array([self._grades[key] for key in chosen])

    def _check_learnable(self, records: Sequence[Record], labels: NDArray[np.float64]) -> None:
        key = "label_key" if self.labeler is None else "scorer.labeler"
        if len(records) < LEAST:
            reason = f"{counted(len(records), 'different text')} with labels; the scorer learned needs {LEAST} or more"
            raise ConfigError(key, None, reason)
        pairs = {(record.domain, label) for record, label in zip(records, labels.tolist(), strict=True)}
        if len(pairs) == len({domain for domain, _ in pairs}):
            reason = "labels differ between domains only, and a record is compared with its domain; omit domain_key"
            if labels.min() == labels.max():
                reason = (
                    f"all {len(labels)} labels are {labels[0]:g}: there is nothing to learn; use labels that differ"
                )
            raise ConfigError(key, None, reason)

    def _facts(
        self,
        weighting: Weighting,
        records: Sequence[Record],
        labels: NDArray[np.float64],
        scaled_on: Sequence[Record],
        survey: _Survey,
    ) -> dict[str, Any]:
        coverage = weighting.coverage(scaled_on)
        pairs = {f"{identity(record):016x}": label for record, label in zip(records, labels.tolist(), strict=True)}
        return {
            "input": survey.digest,
            "records": survey.counts.total(),
            "labels": len(records),
            "labels_from": self.labeler.measures if self.labeler is not None else "labels",
            "direction": self.direction.name,
            "label_range": [float(labels.min()), float(labels.max())],
            "labels_by_domain": dict(sorted(Counter(record.domain for record in records).items())),
            "coverage": [float(coverage.mean()), float(coverage.std())],
            **({"grades": pairs} if self.labeler is not None else {}),
        }

    def _summary(self, facts: dict[str, Any]) -> str:
        one = self.reference
        beside = "" if one is None else f" scorer.features={one.kind.value} scorer.reference={one.name}"
        return (
            f"learned from {facts['labels']:,} labels in {self.directory}; "
            f"to use it elsewhere: scorer.kind=learned scorer.model={self.directory}{beside}"
        )

    def _check_coverage(self, records: Sequence[Record]) -> None:
        """Report a warning if the records have few of the n-grams that are frequent in the training data."""
        assert self.model is not None
        self._is_checked = True
        usual = self.model.facts.get("coverage", [0.0, 0.0])[0]
        found = float(np.concatenate([self.model.weighting.coverage(batch) for batch in _batches(records)]).mean())
        if found < FAR * usual:
            self.report(
                f"warning: {self.directory} learned from other text: {found:.0%} of the words here are frequent there, "
                f"against {usual:.0%} of its own; its scores may mean nothing: label records of this input"
            )


def stored_in(path: Path) -> Path:
    """Return the directory of the model: `path`, or that below the output directory `path` of a filter."""
    if (path / FACTS).exists():
        return path
    found = sorted(one.parent for one in path.glob(f"stages/learned-*/{FACTS}"))
    if len(found) > 1:
        raise ConfigError("model", str(path), "holds several learned scorers: name one", [str(one) for one in found])
    return found[0] if found else path


def quotas_of(available: dict[str, int], counts: Counter[str], wanted: int) -> dict[str, int]:
    """Return how many labels to take from each domain: half of them equally, the rest in proportion to `counts`, by
    largest remainders. Domains with too few leave their part to the others.
    """
    quotas = dict.fromkeys(sorted(available), 0)
    while (missing := wanted - sum(quotas.values())) > 0:
        open_ = [domain for domain in quotas if quotas[domain] < available[domain]]
        if not open_:
            break
        total = sum(counts[domain] for domain in open_)
        shares = {domain: missing * (1 / len(open_) + counts[domain] / total) / 2 for domain in open_}
        spare = missing - sum(map(int, shares.values()))
        for place, domain in enumerate(sorted(open_, key=lambda domain: int(shares[domain]) - shares[domain])):
            quotas[domain] = min(available[domain], quotas[domain] + int(shares[domain]) + (place < spare))
    return quotas


def _add_lowest(keys: set[int], key: int, most: int) -> None:
    """Add a key to a set that keeps at least the `most` lowest, and at most twice as many."""
    keys.add(key)
    if len(keys) >= 2 * most:
        lowest = heapq.nsmallest(most, keys)
        keys.clear()
        keys.update(lowest)


def _batches(records: Iterable[Record], size: int = _BATCH) -> Iterator[list[Record]]:
    rest = iter(records)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _check_installed() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("kind", "learned", "needs scikit-learn: pip install 'leviathan[filter]'") from None
