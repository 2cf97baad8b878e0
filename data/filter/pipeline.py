"""The stages of the filter, one after the other, on any number of processes that share a file system.

Ingest cuts an input into shards of records; each later stage adds columns to the same rows. A shard is made by one
process with fixed batching, so what comes out does not depend on how many there are, nor on when one was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import files_in, locate, sha256_file, sha256_text
from data.filter.audit.statistics import OTHER
from data.filter.config import FilterRules, KeepUnit, OnError, deciding
from data.filter.input.readers import Broken, InputPart, keys_of
from data.filter.input.records import Reason, Record
from data.filter.score.factory import Models, models_of
from data.filter.score.scorer import CompositeScorer, RemoteScorer, Scorer
from data.filter.screen.contamination import EvaluationSets
from data.filter.screen.duplicates import Copy, Signatures, find_duplicates, signatures
from data.filter.screen.gates import Gates
from data.filter.select.selection import REASONS, ShardScores, check_names, noise_threshold, select
from data.filter.store import StageStore, Workers, share, together
from data.sampling import key_of

FORMAT = 2
SHARD_RECORDS = 4096
DECISIONS, THRESHOLDS = "decisions", "thresholds.json"
_SHOWN = 200
"""Characters of what could not be read, or of why a record has no score."""
UNREADABLE = "unreadable"
"""The domain of what could not be read; a domain of the input may have the same name."""


@dataclass(frozen=True)
class FilterJob:
    """`count_tokens`: of each text; null: bytes stand for tokens. `report` gets lines on the progress."""

    parts: Sequence[InputPart]
    rules: FilterRules
    scorer: Scorer
    directory: Path
    workers: Workers
    report: Callable[[str], None]
    count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None
    tokenizer: str = "bytes"
    """A fingerprint of what counts tokens."""
    models: Models | None = None
    clean: Sequence[Record] = ()
    """Reference text (`rules.select.clean`), of which the scorer's highest scores are not noise."""


class Filter:
    """A job in progress. Stages that are whole already are opened, not made again."""

    def __init__(self, job: FilterJob) -> None:
        self.job, self.rules, self.workers = job, job.rules, job.workers
        self._is_fitted = False
        rules, parts = deciding(job.rules), [part.fingerprint for part in job.parts]
        screen = {key: rules[key] for key in ("gates", "duplicates", "contamination", "on_error", "seed")}
        screen |= {
            "tokenizer": job.tokenizer,
            "sets": [of_file(path) for path in rules["contamination"]["sets"].values()],
        }
        self._clean = sha256_text(*(record.content for record in job.clean))
        inputs: dict[str, Any] = {"format": FORMAT, "parts": len(parts), "input": sha256_text(*parts)}
        for part in job.parts:
            inputs |= part.keys
        scorer = {"scorer": f"{job.scorer.name} {job.scorer.fingerprint[:16]}"}
        stages, before = [], ""
        for name, made_of in {
            "records": inputs,
            "screened": screen,
            "scored": scorer,
            DECISIONS: {**rules, "clean_texts": self._clean},
        }.items():
            made_of = {**made_of, "before": before[:16]} if before else made_of
            fingerprint = job.scorer.fingerprint if name == "scored" else ""
            before = sha256_text(before, json.dumps(made_of), fingerprint)
            stages.append(StageStore(job.directory / name, before, made_of))
        self.records, self.screened, self.scored, self.decided = stages

    def run(self) -> None:
        """Make what is missing of all stages."""
        with together(self.workers):  # before the input is read, which may take hours
            gates, sets = self._gates(), EvaluationSets(self.rules.contamination)
        self._ingest()
        with together(self.workers):
            if self.rules.select.domains or self.rules.select.protect:
                check_names(self.domains, self.rules)
        self._screen(gates, sets)
        self._score()
        self._decide()

    # -- ingest

    def _ingest(self) -> None:
        stage = self.records
        stage.open(self.workers)
        if stage.is_whole:
            return
        shards: dict[str, int] = {}
        try:
            with together(self.workers):
                for place, part in share(list(enumerate(self.job.parts)), self.workers):
                    self._ingest_part(place, part)
            with together(self.workers):
                for place in range(len(self.job.parts)):
                    shards |= stage.read_json(_part(place))
                self._refuse_unreadable(shards)
                self._refuse_double_names(shards)
        except ConfigError:
            if self.workers.rank == 0:
                stage.remove()  # who then gives another key would be refused for this one
            raise
        stage.close(shards, self.workers)
        self.job.report(f"read {sum(shards.values()):,} records of {len(self.job.parts)} parts")

    def _ingest_part(self, place: int, part: InputPart) -> None:
        if (self.records.directory / _part(place)).exists() and all(
            map(self.records.has, self.records.read_json(_part(place)))
        ):
            return
        shards: dict[str, int] = {}
        rows: list[Record | Broken] = []

        def write() -> None:
            name = f"{place:05d}-{len(shards):06d}"
            self.records.write(name, _records_table(rows))
            shards[name] = len(rows)
            rows.clear()

        for row in part.records():
            if isinstance(row, Broken) and self.rules.on_error is OnError.fail:
                reason = f"cannot be read: {row.reason}"
                raise ConfigError("input", row.source, reason, ["on_error=drop, which counts such records"])
            rows.append(row)
            if len(rows) == SHARD_RECORDS:
                write()
        if rows:
            write()
        self.records.write_json(_part(place), shards)

    def _refuse_unreadable(self, shards: dict[str, int]) -> None:
        """Where no record at all is one, the keys are wrong, or the input is not what was meant."""
        if not shards:
            raise ConfigError("input", None, f"{', '.join(part.name for part in self.job.parts)} holds no record")
        if any(self.records.read(shard, ["problem"])["problem"].null_count for shard in shards):
            return
        table = self.records.read(next(iter(shards)), ["source", "problem", "raw"])
        source, problem, raw = (table[name][0].as_py() for name in ("source", "problem", "raw"))
        keys = ", ".join(map(repr, keys_of(raw)))
        has = "" if problem.endswith(keys) else f"; its keys are {keys}"
        reason = f"none of {sum(shards.values()):,} records can be read; {source}: {problem}{has}"
        raise ConfigError("input", None, reason, ["text_key=", "prompt_key= with response_key=", "messages_key="])

    def _refuse_double_names(self, shards: dict[str, int]) -> None:
        """Names must tell records apart, or a journey could not be told. Kept as 64-bit hashes."""
        if self.workers.rank:
            return
        seen: set[int] = set()
        for shard in shards:
            table = self.records.read(shard, ["id", "source"])
            for name, source in zip(table["id"].to_pylist(), table["source"].to_pylist(), strict=True):
                if (key := key_of(name)) in seen:
                    reason = f"two records are called {name!r}: {self._first(shards, name)} and {source}"
                    advice = "make the names differ, or leave id_key out: then file and line are the name"
                    raise ConfigError("id_key", None, f"{reason}; {advice}")
                seen.add(key)

    def _first(self, shards: dict[str, int], name: str) -> str:
        """Where the first record of this name is."""
        for shard in shards:
            table = self.records.read(shard, ["id", "source"])
            if name in (ids := table["id"].to_pylist()):
                return str(table["source"][ids.index(name)].as_py())
        return "?"

    def rows(self, shard: str) -> list[Record]:
        """The records of a shard; broken ones have no text."""
        names = ["id", "domain", "source", "text", "answer_start"]
        table = self.records.read(shard, names)
        return [Record(*values) for values in zip(*(table[name].to_pylist() for name in names), strict=True)]

    def text(self, shard: str, row: int) -> str:
        found: str = self.records.read(shard, ["text"])["text"][row].as_py()
        return found

    @property
    def tokens(self) -> int:
        """Of all records, as they were counted when they were screened."""
        return sum(int(np.sum(table["tokens"].to_numpy())) for _, table in self.screened.tables(["tokens"]))

    # -- screen

    def _gates(self) -> Gates:
        try:
            return Gates(self.rules.gates)
        except ConfigError as error:
            raise error.under("gates") from None

    def _screen(self, gates: Gates, sets: EvaluationSets) -> None:
        def screen(shard: str) -> Any:
            problems, rows = self._problems(shard), self.rows(shard)
            malformed = Reason.protected if self.rules.on_error is OnError.keep else Reason.malformed
            found = [
                (malformed, problem) if problem is not None else _screened(record, gates, sets)
                for record, problem in zip(rows, problems, strict=True)
            ]
            reasons = [_name(reason) for reason, _ in found]
            texts = [record.text for record in rows]
            sizes = [len(text.encode()) for text in texts]
            counts = self.job.count_tokens(texts) if self.job.count_tokens else sizes
            self.job.report(f"screened {shard}: {sum(map(bool, reasons)):,} of {len(rows):,} left out")
            return _table(
                reason=reasons,
                detail=[detail for _, detail in found],
                tokens=np.asarray(counts, np.int64),
                bytes=np.asarray(sizes, np.int64),
                scored_bytes=np.asarray([len(record.answer.encode()) for record in rows], np.int64),
                tie=np.asarray([key_of(self.rules.seed, record.id) for record in rows], np.uint64),
                **_columns(signatures(texts)),
            )

        self.screened.open(self.workers)
        self.screened.make(self.records.shards, self.workers, screen)

    def _problems(self, shard: str) -> list[str | None]:
        """Why records could not be read, and how what is there begins; None: they could."""
        problems = self.records.read(shard, ["problem"])["problem"]
        if problems.null_count == len(problems):
            return [None] * len(problems)
        raw = self.records.read(shard, ["raw"])["raw"].to_pylist()
        return [p and f"{p}: {_beginning(begin)}" for p, begin in zip(problems.to_pylist(), raw, strict=True)]

    @cached_property
    def duplicates(self) -> dict[str, list[Copy | None]]:
        """Of each shard's records, which earlier one they repeat. The same on every process."""
        if not self.rules.duplicates.exact and self.rules.duplicates.near is None:  # no signature need be in memory
            return {shard: [None] * rows for shard, rows in self.screened.shards.items()}
        found = find_duplicates([_signatures(table) for _, table in self.screened.tables()], self.rules.duplicates)
        return dict(zip(self.screened.shards, found, strict=True))

    def reasons(self, shard: str) -> list[str | None]:
        """Why records are out before they are scored; None: they are not."""
        reasons: list[str | None] = self.screened.read(shard, ["reason"])["reason"].to_pylist()
        copies = [copy.reason.name if copy else None for copy in self.duplicates[shard]]
        return [reason or copy for reason, copy in zip(reasons, copies, strict=True)]

    def details(self, shard: str) -> list[str | None]:
        """What is known of each reason besides: see `Reason.describe`."""
        details: list[str | None] = self.screened.read(shard, ["detail"])["detail"].to_pylist()
        copies = self.duplicates[shard]
        kept = np.array([copy.of for copy in copies if copy is not None], np.int64)
        names = iter(self._ids.take(kept).to_pylist())
        return [detail if copy is None else next(names) for detail, copy in zip(details, copies, strict=True)]

    @cached_property
    def _ids(self) -> Any:
        """Of all records, in order."""
        import pyarrow

        return pyarrow.concat_tables([table for _, table in self.records.tables(["id"])])["id"]

    def passed(self) -> Iterator[Record]:
        """Every record that is to be scored, in order."""
        for shard in self.records.shards:
            for record, reason in zip(self.rows(shard), self.reasons(shard), strict=True):
                if reason is None:
                    yield record

    # -- score

    def _score(self) -> None:
        self.scored.open(self.workers)
        with together(self.workers):
            unanswered = [shard for shard in self.records.shards if self._is_unanswered(shard)]
        if unanswered or not self.scored.is_whole:
            with together(self.workers):
                self._fit()

        def score(shard: str) -> Any:
            reasons = self.reasons(shard)
            columns: dict[str, Any] = {name: np.full(len(reasons), np.nan) for name in self._score_columns}
            columns |= {"why": [None] * len(reasons), "reason": reasons, "detail": self.details(shard)}
            places = [place for place, reason in enumerate(reasons) if reason is None]
            return self._with_scores(shard, columns, places)

        with together(self.workers):
            for shard in share(unanswered, self.workers):
                table = self.scored.read(shard)
                columns = {name: table[name].to_numpy().copy() for name in self._score_columns}
                columns |= {name: table[name].to_pylist() for name in ("why", "reason", "detail")}
                places = [place for place, why in enumerate(columns["why"]) if why is not None]
                self.scored.write(shard, self._with_scores(shard, columns, places))
        self.scored.make(self.records.shards, self.workers, score)

    def _is_unanswered(self, shard: str) -> bool:
        """Whether the scorer got no answer for some of the shard's records, and could ask again."""
        return self.scored.has(shard) and bool(self.scored.read(shard, ["why"])["why"].is_valid().to_numpy().any())

    def _with_scores(self, shard: str, columns: dict[str, Any], places: list[int]) -> Any:
        """The shard's table, the records at `places` scored: their scores, or why there are none."""
        rows = self.rows(shard)
        if places:
            for name, scores in self._scores([rows[place] for place in places]).items():
                columns[name][places] = scores
        scorer = self.job.scorer
        reasons = scorer.reasons if isinstance(scorer, RemoteScorer) else {}
        for place in places:
            why = None if np.isfinite(columns["score"][place]) else reasons.get(rows[place].id)
            columns["why"][place] = None if why is None else _one_line(why)
        self.job.report(f"scored {shard}: {len(places):,} records")
        return _table(**columns)

    @property
    def _score_columns(self) -> list[str]:
        scorer = self.job.scorer
        return ["score", *(OTHER + name for name in (scorer.others if isinstance(scorer, CompositeScorer) else ()))]

    def _scores(self, records: Sequence[Record]) -> dict[str, NDArray[np.float64]]:
        """What goes into each of these columns."""
        scorer = self.job.scorer
        if not isinstance(scorer, CompositeScorer):
            return {"score": scorer.score(records)}
        score, others = scorer.score_all(records)
        return {"score": score} | {OTHER + name: found for name, found in others.items()}

    def _refuse_memory(self) -> None:
        """A model must not score what it has learnt: what is known by heart looks easy."""
        if self.job.models is None:
            return
        for key, name in models_of(self.rules.scorer):
            try:
                warning = self.job.models.check_unseen(name, self.passed())
            except ConfigError as error:
                raise error.under(key) from None
            if warning is not None:
                self.job.report(f"warning: {key}: {warning}")

    def _fit(self) -> None:
        if not self._is_fitted:
            self._refuse_memory()
            self.job.scorer.fit(self.passed)
            self._is_fitted = True

    # -- decide

    @cached_property
    def domains(self) -> list[str]:
        """Of the records that could be read: there is one at least."""
        found: set[str] = set()
        for _, table in self.records.tables(["domain", "problem"]):
            found |= set(table.filter(table["problem"].is_null())["domain"].to_pylist())
        return sorted(found)

    def _shard_scores(self, shard: str) -> tuple[ShardScores, NDArray[np.int64]]:
        """Of the records that were to be scored, and their places among all of the shard."""
        import pyarrow.compute

        scored = self.scored.read(shard, ["score", "reason"])
        screened = self.screened.read(shard, ["tokens", "scored_bytes", "tie"])
        places = np.flatnonzero(scored["reason"].is_null().to_numpy(zero_copy_only=False))
        columns = {name: screened[name].to_numpy()[places] for name in ("tokens", "scored_bytes", "tie")}
        known = pyarrow.array(self.domains, pyarrow.string())
        # what could not be read has no place among them, and no score either
        domain = pyarrow.compute.index_in(self.records.read(shard, ["domain"])["domain"], known).fill_null(0)
        by_tokens = self.rules.unit is KeepUnit.tokens
        scores = ShardScores(
            name=shard,
            score=scored["score"].to_numpy()[places],
            domain=domain.to_numpy().astype(np.int64)[places],
            length=columns["scored_bytes"],
            weight=columns["tokens"] if by_tokens else np.ones(len(places), np.int64),
            hash=columns["tie"],
        )
        return scores, places

    def _decide(self) -> None:
        with together(self.workers):
            self.decided.refuse_other()
        noise = self._noise()
        with together(self.workers):
            content = self._hash_of_scores(noise)
        self.decided.open(self.workers, content)
        if self.decided.is_whole:
            return
        mine = share(list(self.records.shards), self.workers)
        decision = select(
            lambda: (self._shard_scores(shard)[0] for shard in mine),
            self.domains,
            self.rules,
            noise,
            self.workers.sum,
        )

        def decide(shard: str) -> Any:
            scores, places = self._shard_scores(shard)
            reasons = np.asarray(self.scored.read(shard, ["reason"])["reason"].to_pylist(), object)
            reasons[places] = [REASONS[code].name for code in decision.reasons(scores)]
            kept = [Reason[name].kept for name in reasons]
            bucket = np.full(len(reasons), -1, np.int32)
            # of its own domain: groups are numbered through all of them
            first = np.searchsorted(decision.domain_of_group, np.arange(len(decision.domains)))
            bucket[places] = decision.group(scores) - first[scores.domain]
            return _table(reason=reasons.tolist(), kept=kept, bucket=bucket)

        with together(self.workers):
            if self.workers.rank == 0:
                self.decided.write_json(THRESHOLDS, decision.thresholds)
        self.decided.make(self.records.shards, self.workers, decide)

    def _hash_of_scores(self, noise: float | None) -> str:
        """Scores may be taken again, and then it is decided again."""
        digest = hashlib.sha256(repr(noise).encode())
        for _, table in self.scored.tables(["score"]):
            digest.update(table["score"].to_numpy().tobytes())
        return digest.hexdigest()

    def _noise(self) -> float | None:
        """The score above which a record is noise. The clean texts' scores are kept with the others."""
        if not self.job.clean:
            return None
        name = f"clean-{self._clean[:16]}"
        with together(self.workers):
            if self.workers.rank == 0 and not self.scored.has(name):
                self._fit()
                self.scored.write(name, _table(score=self.job.scorer.score(self.job.clean)))
        return noise_threshold(self.scored.read(name)["score"].to_numpy(), self.rules.select.noise_quantile)


def _part(place: int) -> str:
    return f"part-{place:05d}.json"


def of_file(path: str) -> str:
    """A hash of its content; of what is no file all that is in it, or its name: who reads it says what is wrong."""
    try:
        place = locate(path)
        return sha256_text(*map(sha256_file, files_in(place) if place.is_dir() else [place]))
    except (OSError, ConfigError):
        return path


def _beginning(raw: bytes | None) -> str:
    text = (raw or b"").decode(errors="replace")[:_SHOWN]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _screened(record: Record, gates: Gates, sets: EvaluationSets) -> tuple[Reason | None, str | None]:
    """Why it is left out, and from which set it is."""
    reason = gates(record)
    if reason is None and (name := sets(record.text)) is not None:
        return Reason.contaminated, name
    return reason, None


def _columns(found: Signatures) -> dict[str, Any]:
    """Signatures as columns; those of records that are out already are left empty when they are read."""
    import pyarrow

    def binary(values: NDArray[Any]) -> Any:
        width = values.shape[1] * values.itemsize
        return pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(width), len(values), [None, pyarrow.py_buffer(np.ascontiguousarray(values))]
        )

    return {"exact": binary(found.exact_N2), "near": binary(found.near_NP), "near_possible": found.near_possible_N}


def _signatures(table: Any) -> Signatures:
    out = table["reason"].is_valid().to_numpy()
    exact = np.frombuffer(b"".join(table["exact"].to_pylist()), np.uint64).reshape(len(table), -1).copy()
    near = np.frombuffer(b"".join(table["near"].to_pylist()), np.uint32).reshape(len(table), -1)
    # what is out already is nobody's original: give each an exact mark of its own
    exact[out, 0], exact[out, 1] = np.flatnonzero(out), np.iinfo(np.uint64).max
    return Signatures(exact, near, table["near_possible"].to_numpy() & ~out)


def _one_line(text: str) -> str:
    """The beginning of what a server or somebody's verifier said, in what can be written to a file."""
    return " ".join(text.split())[:_SHOWN].encode("utf-8", "replace").decode()


def _name(reason: Reason | None) -> str | None:
    return None if reason is None else reason.name


def _records_table(rows: Sequence[Record | Broken]) -> Any:
    whole = [Record(r.id, UNREADABLE, r.source, "") if isinstance(r, Broken) else r for r in rows]
    return _table(
        id=[record.id for record in whole],
        domain=[record.domain for record in whole],
        source=[record.source for record in whole],
        text=[record.text for record in whole],
        answer_start=[record.answer_start for record in whole],
        raw=[row.raw if isinstance(row, Broken) or row.raw is None else row.raw.encode() for row in rows],
        problem=[row.reason if isinstance(row, Broken) else None for row in rows],
    )


def _table(**columns: Any) -> Any:
    """A table; columns that are all null keep their kind, so that shards fit together."""
    import pyarrow

    strings = ("id", "domain", "source", "text", "problem", "reason", "detail", "why")
    kinds = dict.fromkeys(strings, pyarrow.string())
    kinds |= {"answer_start": pyarrow.int32(), "raw": pyarrow.binary()}
    return pyarrow.table({name: pyarrow.array(values, kinds.get(name)) for name, values in columns.items()})
