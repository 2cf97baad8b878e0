"""Filtering of lines of JSON as they come, without an end and without a second look.

Every `BATCH` lines are screened, scored and decided (`stream.StreamSelector`, one for each domain that turns up), and
what stays is in the file before the next are read. What it trades away against `pipeline`: no duplicates are looked
for, records of like length do not compete among themselves, and a scorer that must see all records first is refused.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError
from core.files import write_json
from data.filter.config import FilterRules, KeepUnit, OnError, ScorerKind
from data.filter.input.readers import RecordError, RecordMaker
from data.filter.input.records import Reason, Record
from data.filter.score.scorer import Scorer
from data.filter.screen.contamination import EvaluationSets
from data.filter.screen.gates import Gates
from data.filter.select.selection import REASONS, ShardScores, noise_threshold
from data.filter.select.streaming import StreamSelector
from data.sampling import key_of

BATCH = 64
"""Lines that are decided together. A slow stream waits for so many."""
KEPT, COUNTS = "kept.jsonl", "stream.json"
_FITTED = (ScorerKind.ngram, ScorerKind.ensemble)


def check_rules(rules: FilterRules) -> None:
    """Raise `ConfigError` for rules that need all records before the first is decided."""
    if rules.scorer.kind in _FITTED:
        reason = "needs all records before it scores one, and a stream has no end"
        raise ConfigError("scorer.kind", rules.scorer.kind, reason, ["loss", "judge", "length", "random"])
    if rules.select.floor:
        raise ConfigError("select.floor", rules.select.floor, "a stream has no number of records to fill up", [0])


@dataclass
class LineFilter:
    """`count_tokens`: of each text; null: bytes stand for tokens. `clean`: as in a `Job`."""

    make: RecordMaker
    rules: FilterRules
    scorer: Scorer
    count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None
    clean: Sequence[Record] = ()
    check: Callable[[Sequence[Record]], None] = lambda records: None
    """Called with the first records that are scored."""
    reasons: Counter[Reason] = field(default_factory=Counter)
    """Of all lines so far."""
    weight: Counter[bool] = field(default_factory=Counter)
    """Documents or tokens that came to be scored, by whether they stay."""

    def __post_init__(self) -> None:
        check_rules(self.rules)
        self._gates, self._sets = Gates(self.rules.gates), EvaluationSets(self.rules.contamination)
        scores = self.scorer.score(self.clean) if self.clean else None
        self._noise = None if scores is None else noise_threshold(scores, self.rules.select.noise_quantile)
        self._selectors: dict[str, StreamSelector] = {}

    def run(self, lines: Iterable[bytes], out: Path) -> None:
        """Write `kept.jsonl` while the lines come and `stream.json` when they end, or are made to."""
        out.mkdir(parents=True, exist_ok=True)
        if (out / KEPT).exists():
            raise ConfigError("out", str(out), f"holds {KEPT} already: choose another out=")
        numbered = ((number, line.rstrip(b"\r\n")) for number, line in enumerate(lines, 1) if line.strip())
        with open(out / KEPT, "xb") as file:
            try:
                while batch := list(itertools.islice(numbered, BATCH)):
                    file.writelines(line + b"\n" for line in self.kept(batch))
                    file.flush()
            finally:
                write_json(out / COUNTS, self.counts())

    def kept(self, batch: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """The lines that stay of these, in their order; each comes with its number."""
        found = [self._screened(number, line) for number, line in batch]
        scored = [one for one in found if isinstance(one, Record)]
        decided = iter(self._decided(scored) if scored else ())
        reasons = [next(decided) if isinstance(one, Record) else one for one in found]
        self.reasons.update(reasons)
        return [line for (_, line), reason in zip(batch, reasons, strict=True) if reason.kept]

    def _screened(self, number: int, line: bytes) -> Record | Reason:
        """The record of a line, or why it need not be scored."""
        place, on_error = f"-:{number}", self.rules.on_error
        try:
            text = line.decode()
            record = self.make(json.loads(text), place, text)
        except (RecordError, ValueError, RecursionError) as error:
            if on_error is OnError.fail:
                problem = f"cannot be read: {str(error)[:200]}"
                raise ConfigError("input", place, problem, ["on_error=drop, which counts such records"]) from None
            return Reason.protected if on_error is OnError.keep else Reason.malformed
        if (reason := self._gates(record)) is not None:
            return reason
        return record if self._sets(record.text) is None else Reason.contaminated

    def _decided(self, records: Sequence[Record]) -> list[Reason]:
        self.check(records)
        self.check = lambda records: None
        score, texts = self.scorer.score(records), [record.text for record in records]
        length = np.array([len(text.encode()) for text in texts], np.int64)
        weight = length if self.count_tokens is None else np.array(self.count_tokens(texts), np.int64)
        weight = weight if self.rules.unit is KeepUnit.tokens else np.ones(len(records), np.int64)
        ties = np.array([key_of(self.rules.seed, record.id) for record in records], np.uint64)
        names = np.array([record.domain for record in records], object)
        found = np.empty(len(records), object)
        for name in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names == name)
            columns = (score[rows], np.zeros(len(rows), np.int64), length[rows], weight[rows], ties[rows])
            codes = self._selector(name).decide(ShardScores(records[rows[0]].source, *columns))
            found[rows] = [REASONS[code] for code in codes]
        for reason, size in zip(found, weight.tolist(), strict=True):
            self.weight[reason.kept] += size
        return list(found)

    def _selector(self, name: str) -> StreamSelector:
        """Of one domain: which there are is not known before they come, and each is decided by itself."""
        if name not in self._selectors:
            select = self.rules.select
            domains = {name: select.domains[name]} if name in select.domains else {}
            protect = [name] if name in select.protect else []
            rules = replace(self.rules, select=replace(select, domains=domains, protect=protect))
            self._selectors[name] = StreamSelector([name], rules, self._noise)
        return self._selectors[name]

    def counts(self) -> dict[str, Any]:
        """What became of the lines so far. `rate`: share of `unit` that stays, of what was scored."""
        scored = sum(self.weight.values())
        return {
            "lines": sum(self.reasons.values()),
            "kept": sum(count for reason, count in self.reasons.items() if reason.kept),
            "reasons": {reason.name: self.reasons[reason] for reason in Reason if reason in self.reasons},
            "unit": self.rules.unit.name,
            "rate": self.weight[True] / scored if scored else None,
            "keep": self.rules.keep,
        }
