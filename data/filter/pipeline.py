"""Run the stages of the filter, on any number of processes that share a file system.

Ingest divides an input into shards of records; each later stage adds columns to the same rows. A shard is made by one
process with fixed batching, so results depend neither on the number of processes nor on when a process was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, counted
from core.files import lock_folder, remove_tree, sha256_file, sha256_text
from data.files import find_files
from data.filter.audit.proof import by_length, check_auc, prove
from data.filter.audit.statistics import OTHER
from data.filter.config import FilterRules, KeepUnit, OnError, decisive_settings
from data.filter.input.ingest import Ingest, scan, shard_prefix
from data.filter.input.readers import InputPart
from data.filter.input.records import LABEL, Reason, Record, RecordPicture
from data.filter.runs import SORTED, DiskArrays
from data.filter.score.factory import Models, check_models
from data.filter.score.scorer import CompositeScorer, CostlyScorer, RemoteScorer, Scorer, stored_parts
from data.filter.screen.contamination import EvaluationSets
from data.filter.screen.duplicates import PLACES, DuplicateSearch, Signatures, signatures
from data.filter.screen.gates import Gates
from data.filter.screen.pictures import find_picture_duplicates
from data.filter.select.selection import REASONS, ShardScores, noise_threshold, select
from data.filter.store import StageStore, Workers, barrier, local_items, writing
from data.filter.tables import PICTURES, THUMBNAILS, make_table
from data.sampling import key_of

FORMAT = 2
SHARD_RECORDS = 4096
DECISIONS, THRESHOLDS = "decisions", "thresholds.json"
_SHOWN = 200
"""Characters to show of a malformed record, or of the reason why a record has no score."""
_REASON_NAMES = np.array([reason.name for reason in REASONS], object)


@dataclass(frozen=True)
class FilterJob:
    parts: Sequence[InputPart]
    rules: FilterRules
    scorer: Scorer
    directory: Path
    workers: Workers
    report: Callable[[str], None]
    """Called with lines of progress."""
    count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None
    """Returns the number of tokens of each text; None: count bytes."""
    tokenizer: str = "bytes"
    """Fingerprint of the tokenizer that `count_tokens` uses."""
    models: Models | None = None
    clean: Sequence[Record] = ()
    """Reference text (`rules.select.clean`) that sets the upper threshold."""
    patience_s: float = 0.0
    """Seconds to wait for another process that filters into the directory."""


class Filter:
    """A job in progress. Complete stages are reused."""

    def __init__(self, job: FilterJob) -> None:
        self.job, self.rules, self.workers = job, job.rules, job.workers
        self._is_fitted = False
        self._thumbnails: tuple[str, Any] = ("", None)
        self._parts = scan(job.parts, job.workers)
        rules, parts = decisive_settings(job.rules), [one.fingerprint for one in self._parts]
        screen = {key: rules[key] for key in ("gates", "duplicates", "contamination", "on_error", "seed")}
        sets = [file_digest(path) for path in rules["contamination"]["sets"].values()]
        self._clean = sha256_text(*(record.content for record in job.clean))
        inputs: dict[str, Any] = {"format": FORMAT, "parts": len(parts), "input": sha256_text(*parts)}
        for part in job.parts:
            inputs |= part.keys
        stages, before = [], ""
        for name, made_of in {
            "records": inputs,
            "screened": {**screen, "tokenizer": job.tokenizer, "sets": sets},
            "scored": {"scorer": f"{job.scorer.name} {job.scorer.fingerprint[:16]}"},
            DECISIONS: {**rules, "clean_texts": self._clean},
        }.items():
            made_of = {**made_of, "before": before[:16]} if before else made_of
            fingerprint = job.scorer.fingerprint if name == "scored" else ""
            before = sha256_text(before, json.dumps(made_of), fingerprint)
            stages.append(StageStore(job.directory / name, before, made_of))
        self.records, self.screened, self.scored, self.decided = stages
        self.duplicates = StageStore(job.directory / "duplicates", self.screened.key, self.screened.made_of)
        self._stages = [*stages, self.duplicates]

    def run(self) -> None:
        """Run all stages, skipping shards that exist.

        A `ConfigError` sets aside what was made: all stages before the first score, which is when neither the input nor
        the scorer is known to be right, and then the scores. So the corrected command is not rejected as a change, and
        the same command resumes. Stages of inputs that were corrected are removed in the end.
        """
        with barrier(self.workers):  # reject invalid rules before reading the input, which may take hours
            for stage in self._stages:
                stage.check_key()
            if OTHER + LABEL not in self._score_columns and not any("label_key" in one.keys for one in self.job.parts):
                check_auc(self.rules.select, lambda: None)
            gates = Gates(self.rules.gates)
            sets = EvaluationSets(self.rules.contamination)
        with self._locked():
            self._run(gates, sets)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other commands from the stages: each would remove files that the other needs."""
        with ExitStack() as stack:
            with barrier(self.workers):
                if self.workers.rank == 0:
                    with writing(self.job.directory):
                        lock = lock_folder(self.job.directory, self.job.patience_s)
                    if lock is None:
                        reason = (
                            "another command filters into this folder; wait for it, stop it, or choose another out="
                        )
                        raise ConfigError("out", str(self.job.directory), reason)
                    stack.enter_context(lock)
            yield

    def _run(self, gates: Gates, sets: EvaluationSets) -> None:
        fail = self.rules.on_error is OnError.fail
        Ingest(self.records, self._parts, self.workers, SHARD_RECORDS, fail).run(self.job.report)
        try:
            with barrier(self.workers):
                self._check_names()
            self._screen(gates, sets)
            self._find_duplicates()
            self._score()
            self._decide()
        except ConfigError:
            if self.workers.rank == 0 and not self.decided.has_manifest:
                has_scores = any(self.scored.directory.glob("*.parquet"))
                for stage in [self.scored] if has_scores else self._stages:
                    stage.set_aside()
            raise
        if self.workers.rank == 0:
            for path in chain(
                *(self.job.directory.glob(f"{name}-*") for name in ("records", "screened", "duplicates"))
            ):
                remove_tree(path)

    def _check_names(self) -> None:
        rules = self.rules.select
        for key, names in (("select.domains", rules.domains), ("select.protect", rules.protect)):
            for name in names:
                if name not in self.domains:
                    raise ConfigError(key, name, "no record is of this domain", self.domains[:8])

    # -- records

    def shards_of(self, number: int) -> list[str]:
        """Return the shards of a part of the job, in order."""
        return [shard for shard in self.records.shards if shard.startswith(shard_prefix(number))]

    def rows(self, shard: str) -> list[Record]:
        """Return the records of a shard; malformed ones have no text."""
        names = ["id", "domain", "source", "text", "answer_start"]
        table = self.records.read(shard, names)
        columns = [table[name].to_pylist() for name in names]
        return [
            replace(Record(*values), pictures=pictures, label=None if np.isnan(label) else label)
            for *values, pictures, label in zip(
                *columns, self.pictures(shard), self.labels(shard).tolist(), strict=True
            )
        ]

    def labels(self, shard: str) -> NDArray[np.float64]:
        """Return the input's label of each record of a shard, NaN where a record has none."""
        if not self.records.has_column(shard, LABEL):
            return np.full(self.records.shards[shard], np.nan)
        return np.asarray(self.records.read(shard, [LABEL])[LABEL].to_numpy(zero_copy_only=False), np.float64)

    def mean_labels(self, shard: str) -> NDArray[np.float64]:
        """Return `labels`, but for a text with labelled copies the mean of all its labels."""
        labels, means = self.labels(shard), self._labels_of_copied
        if not means:
            return labels
        names = self.records.read(shard, ["id"])["id"].to_pylist()
        return np.array([means.get(name, label) for name, label in zip(names, labels.tolist(), strict=True)])

    @cached_property
    def label_source(self) -> str | None:
        """Whose labels scores are held against: "input", "scorer" (those of its grader, where the input has none)."""
        if any(self.records.has_column(shard, LABEL) for shard in self.records.shards):
            return "input"
        return "scorer" if OTHER + LABEL in self._score_columns else None

    @cached_property
    def proof(self) -> dict[str, Any] | None:
        """How well the scores agree with the labels; None if no record that competes has one."""
        stages = self.records, self.screened, self.scored
        return prove(self.job.scorer, self.label_source, self.labels, self.mean_labels, *stages)

    def pictures(self, shard: str) -> list[tuple[RecordPicture, ...]]:
        """Return the pictures of each record of a shard, without thumbnails."""
        if not self.records.has_column(shard, PICTURES):
            return [()] * self.records.shards[shard]
        found = self.records.read(shard, [PICTURES])[PICTURES].to_pylist()
        return [tuple(RecordPicture(**picture) for picture in pictures) for pictures in found]

    @cached_property
    def has_pictures(self) -> bool:
        return any(self.records.has_column(shard, PICTURES) for shard in self.records.shards)

    def thumbnails(self, shard: str, row: int) -> list[bytes]:
        """Return small JPEGs of the first pictures of a record. Those of one shard stay in memory."""
        if self._thumbnails[0] != shard:
            has_any = self.records.has_column(shard, THUMBNAILS)
            self._thumbnails = shard, self.records.read(shard, [THUMBNAILS])[THUMBNAILS] if has_any else None
        column = self._thumbnails[1]
        found: list[bytes] = [] if column is None else column[row].as_py()
        return found

    def text(self, shard: str, row: int) -> str:
        found: str = self.records.read(shard, ["text"])["text"][row].as_py()
        return found

    @property
    def tokens(self) -> int:
        return sum(int(np.sum(table["tokens"].to_numpy())) for _, table in self.screened.tables(["tokens"]))

    # -- screen

    def _screen(self, gates: Gates, sets: EvaluationSets) -> None:
        def screen(shard: str) -> Any:
            problems, records = self._problems(shard), self.rows(shard)
            malformed = Reason.protected if self.rules.on_error is OnError.keep else Reason.malformed
            screened = [
                (malformed, problem) if problem is not None else _screened(record, gates, sets)
                for record, problem in zip(records, problems, strict=True)
            ]
            reasons = [None if reason is None else reason.name for reason, _ in screened]
            texts = [record.text for record in records]
            found = signatures(texts, [[picture.sha256 for picture in record.pictures] for record in records])
            sizes = [len(text.encode()) for text in texts]
            counts = np.asarray(self.job.count_tokens(texts) if self.job.count_tokens else sizes, np.int64)
            counts += [sum(picture.tokens for picture in record.pictures) for record in records]
            self.job.report(f"screened {shard}: {sum(map(bool, reasons)):,} of {len(records):,} dropped")
            return make_table(
                reason=reasons,
                detail=[detail for _, detail in screened],
                tokens=counts,
                bytes=np.asarray(sizes, np.int64),
                scored_bytes=np.asarray([len(record.answer.encode()) for record in records], np.int64),
                tie=np.asarray([key_of(self.rules.seed, record.id) for record in records], np.uint64),
                exact=[row.tobytes() for row in found.exact_N2],
                near=[row.tobytes() for row in found.near_NP],
            )

        self.screened.open(self.workers)
        self.screened.make(self.records.shards, self.workers, screen)

    def _problems(self, shard: str) -> list[str | None]:
        """Return why each record is malformed, with the start of its bytes; None: the record is not malformed."""
        problems = self.records.read(shard, ["problem"])["problem"]
        if problems.null_count == len(problems):
            return [None] * len(problems)
        raw = self.records.read(shard, ["raw"])["raw"].to_pylist()
        pairs = zip(problems.to_pylist(), raw, strict=True)
        return [problem and (f"{problem}: {_printable(begin)}" if begin else problem) for problem, begin in pairs]

    def _find_duplicates(self) -> None:
        """Store for each record the id of the earlier record that it duplicates and the reason, or nulls."""
        stage, rules, shards = self.duplicates, self.rules.duplicates, self.screened.shards
        stage.open(self.workers)
        disk = DiskArrays(stage.directory / SORTED, shards, self.workers)
        if not stage.is_complete:
            search = DuplicateSearch(disk, rules, lambda shard: _signatures(self.screened.read(shard)))
            search.run()
            disk.make_texts("names", lambda shard: self.records.read(shard, ["id"])["id"].to_pylist())
            disk.make("pictures", 1, lambda _: self._picture_copies())

            def copies(shard: str) -> Any:
                start, rows = disk.first[shard], shards[shard]
                of, is_exact = search.copies(shard, rows)
                reasons = np.where(is_exact, Reason.duplicate.name, Reason.near_duplicate.name).astype(object)
                # pictures last: a document with the same text has the same pictures, and the one kept is named
                places, originals, reason = disk.between("pictures", start, start + rows - 1).view(np.int64)
                of[places - start], reasons[places - start] = originals, _REASON_NAMES[reason]
                reasons[of < 0] = None
                names = iter(disk.texts("names", of[of >= 0].tolist()))
                return make_table(reason=reasons.tolist(), of=[None if one is None else next(names) for one in reasons])

            stage.make(shards, self.workers, copies)
        disk.remove()

    def _picture_copies(self) -> NDArray[np.uint64]:
        """Return (record, earlier record, code of the reason) for each document with repeated pictures, [3, E]."""
        distance, found = self.rules.duplicates.pictures, []
        if distance is not None and self.has_pictures:
            documents = chain.from_iterable(map(self._pictures_that_passed, self.screened.shards))
            found = find_picture_duplicates(documents, distance)
        rows = [(row, one.of, REASONS.index(one.reason)) for row, one in enumerate(found) if one is not None]
        return np.array(rows, np.uint64).reshape(-1, 3).T

    def _pictures_that_passed(self, shard: str) -> list[tuple[RecordPicture, ...]]:
        """Return the pictures of each record, none for those that the gates dropped."""
        reasons = self.screened.read(shard, ["reason"])["reason"].to_pylist()
        return [() if reason else mine for reason, mine in zip(reasons, self.pictures(shard), strict=True)]

    def reasons(self, shard: str) -> list[str | None]:
        """Return the reason of each record that is decided before scoring, such as a duplicate; None: to be scored."""
        return self._first_of("reason", shard, "reason")

    def details(self, shard: str) -> list[str | None]:
        """Return the detail of each reason; see `Reason.describe`."""
        return self._first_of("detail", shard, "of")

    def _first_of(self, column: str, shard: str, of_duplicates: str) -> list[str | None]:
        """Return what the screen found, or else what the search for duplicates found."""
        pairs = ((self.screened, column), (self.duplicates, of_duplicates))
        columns = [stage.read(shard, [name])[name].to_pylist() for stage, name in pairs]
        return [other if one is None else one for one, other in zip(*columns, strict=True)]

    def passed(self) -> Iterator[Record]:
        """Yield the records to be scored, in order. The label is the mean of those of the record and its copies."""
        for shard in self.records.shards:
            for record, reason in zip(self.rows(shard), self.reasons(shard), strict=True):
                if reason is None:
                    label = self._labels_of_copied.get(record.id)
                    yield record if label is None else replace(record, label=label)

    @cached_property
    def _labels_of_copied(self) -> dict[str, float]:
        """Mean labels of the texts of which exact duplicates are labelled, by the id of the first record."""
        import pyarrow.compute

        texts = []
        for shard in self.records.shards:
            if self.records.has_column(shard, LABEL):
                copies, labels = self.duplicates.read(shard, ["of", "reason"]), self.labels(shard)
                is_copy = pyarrow.compute.equal(copies["reason"], Reason.duplicate.name).fill_null(False)
                first = pyarrow.compute.if_else(is_copy, copies["of"], self.records.read(shard, ["id"])["id"])
                table = pyarrow.table({"id": first, "copy": is_copy, LABEL: labels})
                texts.append(table.filter(pyarrow.array(np.isfinite(labels))))
        if not texts:
            return {}
        found = pyarrow.concat_tables(texts).group_by("id").aggregate([("copy", "any"), (LABEL, "mean")])
        found = found.filter(found["copy_any"])
        return dict(zip(found["id"].to_pylist(), found[f"{LABEL}_mean"].to_pylist(), strict=True))

    # -- score

    def _score(self) -> None:
        self.scored.open(self.workers)
        with barrier(self.workers):
            unanswered = [shard for shard in self.records.shards if self._is_unanswered(shard)]
        if unanswered or not self.scored.is_complete:
            with barrier(self.workers):  # the others read what the first one stored
                if self.workers.rank == 0 or not stored_parts(self.job.scorer):
                    self._fit()
            with barrier(self.workers):
                self._fit()

        def score(shard: str) -> Any:
            reasons = self.reasons(shard)
            columns: dict[str, Any] = {name: np.full(len(reasons), np.nan) for name in self._score_columns}
            columns |= {"why": [None] * len(reasons), "reason": reasons, "detail": self.details(shard)}
            places = [place for place, reason in enumerate(reasons) if reason is None]
            return self._with_scores(shard, columns, places)

        with barrier(self.workers):
            for shard in local_items(unanswered, self.workers):
                table = self.scored.read(shard)
                columns = {name: table[name].to_numpy().copy() for name in self._score_columns}
                columns |= {name: table[name].to_pylist() for name in ("why", "reason", "detail")}
                places = [place for place, why in enumerate(columns["why"]) if why is not None]
                self.scored.write(shard, self._with_scores(shard, columns, places))
        self.scored.make(self.records.shards, self.workers, score)

    def _is_unanswered(self, shard: str) -> bool:
        """Return whether a remote scorer failed for some of the shard's records, which are then scored again."""
        return self.scored.has(shard) and bool(self.scored.read(shard, ["why"])["why"].is_valid().to_numpy().any())

    def _with_scores(self, shard: str, columns: dict[str, Any], places: list[int]) -> Any:
        """Make the shard's table with the scores of the records in rows `places`, or the reasons why they have none."""
        records = self.rows(shard)
        if places:
            for name, scores in self._scores([records[place] for place in places]).items():
                columns[name][places] = scores
        scorer = self.job.scorer
        reasons = scorer.reasons if isinstance(scorer, RemoteScorer) else {}
        for place in places:
            why = None if np.isfinite(columns["score"][place]) else reasons.get(records[place].id)
            columns["why"][place] = None if why is None else _one_line(why)
        self.job.report(f"scored {shard}: {len(places):,} records")
        return make_table(**columns)

    @property
    def _score_columns(self) -> list[str]:
        scorer = self.job.scorer
        return ["score", *(OTHER + name for name in (scorer.others if isinstance(scorer, CompositeScorer) else ()))]

    def _scores(self, records: Sequence[Record]) -> dict[str, NDArray[np.float64]]:
        scorer = self.job.scorer
        if not isinstance(scorer, CompositeScorer):
            return {"score": scorer.score(records)}
        score, others = scorer.score_all(records)
        return {"score": score} | {OTHER + name: found for name, found in others.items()}

    def _fit(self) -> None:
        if self._is_fitted:
            return
        if self.job.models is not None:
            check_models(self.job.models, self.rules.scorer, self.passed, self.job.report)
        scorer = self.job.scorer
        for part in stored_parts(scorer):
            part.report = self.job.report
        if self.workers.rank == 0 and isinstance(scorer, CostlyScorer):
            cost = scorer.cost(lambda: chain(self.passed(), self.job.clean))
            if cost:
                self.job.report(cost)
        if self.workers.rank == 0:
            reasons = Counter(chain.from_iterable(map(self.reasons, self.records.shards)))
            left = (
                f"{reasons.pop(None, 0):,} of {counted(sum(self.records.shards.values()), 'record')} are left to score"
            )
            self.job.report(", ".join([left, *(f"{count:,} {name}" for name, count in sorted(reasons.items()))]))
        scorer.fit(self.passed)
        self._is_fitted = True

    # -- decide

    @cached_property
    def domains(self) -> list[str]:
        """Domains of the records that are not malformed. There is at least one."""
        found: set[str] = set()
        for _, table in self.records.tables(["domain", "problem"]):
            found |= set(table.filter(table["problem"].is_null())["domain"].to_pylist())
        return sorted(found)

    def _shard_scores(self, shard: str) -> tuple[ShardScores, NDArray[np.int64]]:
        """Read the scores of the records that passed the screen, and their rows in the shard."""
        import pyarrow.compute

        scored = self.scored.read(shard, ["score", "reason"])
        screened = self.screened.read(shard, ["tokens", "scored_bytes", "tie"])
        places = np.flatnonzero(scored["reason"].is_null().to_numpy(zero_copy_only=False))
        tokens, length, ties = (screened[name].to_numpy()[places] for name in ("tokens", "scored_bytes", "tie"))
        known = pyarrow.array(self.domains, pyarrow.string())
        # malformed records have no known domain (null); 0 does no harm, since they have no score
        domain = pyarrow.compute.index_in(self.records.read(shard, ["domain"])["domain"], known).fill_null(0)
        scores = ShardScores(
            name=shard,
            score=scored["score"].to_numpy()[places],
            domain=domain.to_numpy().astype(np.int64)[places],
            length=length,
            weight=tokens if self.rules.unit is KeepUnit.tokens else np.ones(len(places), np.int64),
            hash=ties,
        )
        return scores, places

    def _decide(self) -> None:
        noise, by_length = self._noise(), self._by_length()
        with barrier(self.workers):
            content = self._hash_of_scores(noise, by_length)
        self.decided.open(self.workers, content)
        if self.decided.is_complete:
            return
        shards = local_items(list(self.records.shards), self.workers)

        def scores() -> Iterator[ShardScores]:
            return (self._shard_scores(shard)[0] for shard in shards)

        decision = select(scores, self.domains, self.rules, noise, self.workers.sum, by_length)

        def decide(shard: str) -> Any:
            scores, places = self._shard_scores(shard)
            reasons = np.asarray(self.scored.read(shard, ["reason"])["reason"].to_pylist(), object)
            reasons[places] = [REASONS[code].name for code in decision.reasons(scores)]
            kept = [Reason[name].kept for name in reasons]
            bucket = np.full(len(reasons), -1, np.int32)
            # buckets are numbered within a domain, groups across all domains
            first = np.searchsorted(decision.domain_of_group, np.arange(len(decision.domains)))
            bucket[places] = decision.group(scores) - first[scores.domain]
            return make_table(reason=reasons.tolist(), kept=kept, bucket=bucket)

        with barrier(self.workers):
            if self.workers.rank == 0:
                self.decided.write_json(THRESHOLDS, decision.thresholds)
        self.decided.make(self.records.shards, self.workers, decide)

    def _by_length(self) -> NDArray[np.int64]:
        """Return, for each domain, whether its records compete in length buckets. Raises `ConfigError` if labels do not
        prove the score as `select.require_auc` demands.
        """
        found = np.zeros(len(self.domains), np.int64)
        with barrier(self.workers):
            if self.workers.rank == 0:
                check_auc(self.rules.select, lambda: self.proof)
                found[:] = by_length(self.rules.select, self.job.scorer.name, lambda: self.proof, self.domains)
        return self.workers.sum(found)

    def _hash_of_scores(self, noise: float | None, by_length: NDArray[np.int64]) -> str:
        """Hash the scores and buckets. They are not part of the stage's key, but decisions depend on them."""
        digest = hashlib.sha256(repr(noise).encode())
        if not by_length.all():
            digest.update(by_length.tobytes())
        for _, table in self.scored.tables(["score"]):
            digest.update(table["score"].to_numpy().tobytes())
        return digest.hexdigest()

    def _noise(self) -> float | None:
        """Return the score above which a record is noise, or None without clean text, whose scores are stored too."""
        if not self.job.clean:
            return None
        name = f"clean-{self._clean[:16]}"

        def scores() -> NDArray[np.float64]:
            return self.scored.read(name)["score"].to_numpy() if self.scored.has(name) else np.array([np.nan])

        with barrier(self.workers):
            unanswered = isinstance(self.job.scorer, RemoteScorer) and not np.isfinite(scores()).all()
            if self.workers.rank == 0 and (unanswered or not self.scored.has(name)):
                self._fit()
                self.scored.write(name, make_table(score=self.job.scorer.score(self.job.clean)))
        return noise_threshold(scores(), self.rules.select.noise_quantile)


def file_digest(path: str) -> str:
    """Hash the content of a file, folder or pattern. Return the path if it cannot be read: a later stage says why."""
    try:
        return sha256_text(*(sha256_file(file) for _, file in find_files(path)))
    except (OSError, ConfigError):
        return path


def _printable(raw: bytes | None) -> str:
    text = (raw or b"").decode(errors="replace")[:_SHOWN]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _screened(record: Record, gates: Gates, sets: EvaluationSets) -> tuple[Reason | None, str | None]:
    """Return why a record is dropped (None: it passes), and the evaluation set with which it has text in common."""
    reason = gates(record)
    if reason is None and (name := sets(record.text)) is not None:
        return Reason.contaminated, name
    return reason, None


def _signatures(table: Any) -> Signatures:
    """Read the signatures of a shard."""
    exact, near = (b"".join(table[name].to_pylist()) for name in ("exact", "near"))
    exact_N2 = np.frombuffer(exact, np.uint64).reshape(-1, 2)
    near_NP = np.frombuffer(near, np.uint32).reshape(-1, PLACES)
    return Signatures(exact_N2, near_NP, table["reason"].is_null().to_numpy())


def _one_line(text: str) -> str:
    """Shorten a server's or verifier's message to one line of valid UTF-8."""
    return " ".join(text.split())[:_SHOWN].encode("utf-8", "replace").decode()
