"""Filter a stream of JSON lines.

Each batch of `BATCH` lines is screened, scored and selected (`StreamSelector`, one per domain). The kept lines are
written before the next batch is read. In contrast to `pipeline`, duplicates are not detected and there are no length
buckets. Scorers that must see all records first are rejected.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError
from core.files import write_json
from data.filter.config import FilterRules, InputConfig, KeepUnit, OnError
from data.filter.input.readers import MalformedRecord, read_record
from data.filter.input.records import Reason, Record
from data.filter.score.scorer import Scorer
from data.filter.screen.contamination import EvaluationSets
from data.filter.screen.gates import Gates
from data.filter.select.selection import REASONS, ShardScores, noise_threshold
from data.filter.select.streaming import StreamSelector
from data.sampling import key_of

BATCH = 64
"""Number of lines to decide together. With a slow stream, lines wait until a batch is full."""
KEPT, COUNTS = "kept.jsonl", "stream.json"


def check_rules(rules: FilterRules) -> None:
    """Raise `ConfigError` for rules that need all records before the first decision."""
    if rules.scorer.reads_all_first:
        reason = "needs all records before it scores the first, and a stream has no end"
        advice = ["loss", "judge", "length", "random", "learned with scorer.model=DIR"]
        raise ConfigError("scorer.kind", rules.scorer.kind, reason, advice)
    if rules.select.floor:
        reason = "cannot be applied to a stream, whose number of records is unknown"
        raise ConfigError("select.floor", rules.select.floor, reason, [0])
    if (bar := rules.select.require_auc) is not None:
        raise ConfigError("select.require_auc", bar, "cannot be checked on a stream, which has no audit", ["null"])


@dataclass
class LineFilter:
    """Filter lines in batches. `count_tokens` returns the number of tokens of each text; None: bytes count as tokens.
    `clean`: reference text whose scores set the limit above which a record is noise.
    """

    config: InputConfig
    rules: FilterRules
    scorer: Scorer
    count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None
    clean: Sequence[Record] = ()
    check: Callable[[Sequence[Record]], None] = lambda records: None
    """Called once, with the first records to be scored."""
    reasons: Counter[Reason] = field(default_factory=Counter)
    """Number of lines so far by reason."""
    weight: Counter[bool] = field(default_factory=Counter)
    """Number of scored documents or tokens, by whether they were kept."""

    def __post_init__(self) -> None:
        self._gates, self._sets = Gates(self.rules.gates), EvaluationSets(self.rules.contamination)
        scores = self.scorer.score(self.clean) if self.clean else None
        self._noise = None if scores is None else noise_threshold(scores, self.rules.select.noise_quantile)
        self._selectors: dict[str, StreamSelector] = {}  # by domain; domains are not known in advance

    def run(self, lines: Iterable[bytes], out: Path) -> None:
        """Write `kept.jsonl` as lines arrive, and `stream.json` at the end of the stream or on an interrupt."""
        out.mkdir(parents=True, exist_ok=True)
        if (out / KEPT).exists():
            raise ConfigError("out", str(out), f"already holds {KEPT}: choose another out=")
        numbered = ((number, line.rstrip(b"\r\n")) for number, line in enumerate(lines, 1) if line.strip())
        with open(out / KEPT, "xb") as file:
            try:
                while batch := list(itertools.islice(numbered, BATCH)):
                    file.writelines(line + b"\n" for line in self.kept(batch))
                    file.flush()
            finally:
                write_json(out / COUNTS, self.counts())

    def kept(self, batch: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Return the kept lines of a batch of (number, line), in order."""
        screened = [self._screened(number, line) for number, line in batch]
        records = [one for one in screened if isinstance(one, Record)]
        decided = iter(self._decided(records) if records else ())
        reasons = [next(decided) if isinstance(one, Record) else one for one in screened]
        self.reasons.update(reasons)
        return [line for (_, line), reason in zip(batch, reasons, strict=True) if reason.kept]

    def _screened(self, number: int, line: bytes) -> Record | Reason:
        """Return the record of a line, or why it is not scored."""
        record = read_record(self.config, line, f"-:{number}")
        if isinstance(record, MalformedRecord):
            if self.rules.on_error is OnError.fail:
                raise record.error
            return Reason.protected if self.rules.on_error is OnError.keep else Reason.malformed
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
        reasons = np.empty(len(records), object)
        for name in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names == name)
            columns = (score[rows], np.zeros(len(rows), np.int64), length[rows], weight[rows], ties[rows])
            selector = self._selectors.setdefault(name, StreamSelector(name, self.rules, self._noise))
            codes = selector.decide(ShardScores(records[rows[0]].source, *columns))
            reasons[rows] = [REASONS[code] for code in codes]
        for reason, size in zip(reasons, weight.tolist(), strict=True):
            self.weight[reason.kept] += size
        return list(reasons)

    def counts(self) -> dict[str, Any]:
        """Return counts of the lines so far. `rate`: the fraction of the scored `unit` that was kept."""
        scored = sum(self.weight.values())
        return {
            "lines": sum(self.reasons.values()),
            "kept": sum(count for reason, count in self.reasons.items() if reason.kept),
            "reasons": {reason.name: self.reasons[reason] for reason in Reason if reason in self.reasons},
            "unit": self.rules.unit.name,
            "rate": self.weight[True] / scored if scored else None,
            "keep": self.rules.keep,
        }
